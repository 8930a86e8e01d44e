"""Times and peak memory of a call, by the device's own events where it has any."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ospnext.ops.device import Device

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of each repeat."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def shortest(self) -> float:
        return min(self.times)

    @property
    def longest(self) -> float:
        return max(self.times)


def timed(call: Call, device: torch.device, *, repeats: int, warm_up: int = 1) -> Timing:
    """Each repeat begins when everything before it is done."""
    for _ in range(warm_up):
        call()
    surface = Device(device)
    surface.synchronize()
    return Timing(tuple(_once(call, surface) for _ in range(repeats)))


def _once(call: Call, surface: Device) -> float:
    if surface.is_cpu:
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    module = torch.get_device_module(surface.device)
    start, end = (module.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    surface.synchronize()
    return start.elapsed_time(end)


def release() -> None:
    """Give memory of what is no longer referenced back to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
