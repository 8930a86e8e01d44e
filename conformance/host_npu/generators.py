"""Random numbers of the host NPU: drawn by the CPU's generator from the seed and position of the device's own.

The device's generator holds a seed and an offset. Each draw starts a CPU generator from both and moves the offset on.
So seeds, saved states, `fork_rng` and recomputation by checkpoints repeat what they repeat on a device; the numbers are
not those of a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: How far a draw moves the offset: it must be a multiple of 4 there. How much is drawn does not matter here.
STEP = 4
#: The CPU generator's seed is the device's plus this much for every draw, modulo 2^64: no two seeds meet soon, and even
#: the first numbers are not those that the CPU draws from the same seed.
SPREAD = 0x9E3779B97F4A7C15


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that `torch.manual_seed` seeds for `device`."""
    module: Any = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    return module.default_generators[index]


def next_cpu_generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator for one operator, and `generator` one step further."""
    offset = generator.get_offset()
    generator.set_offset(offset + STEP)
    seed = (generator.initial_seed() + SPREAD * (offset // STEP + 1)) % (1 << 64)
    return torch.Generator(device="cpu").manual_seed(seed - (1 << 64) if seed >> 63 else seed)


@contextmanager
def instead_of_cpus(generator: torch.Generator) -> Iterator[None]:
    """For operators that draw but take no generator: the CPU's default one draws as `generator`, then is put back."""
    before = torch.get_rng_state()
    torch.set_rng_state(next_cpu_generator(generator).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)
