"""A device that answers otherwise: emulated operators are broken one at a time, in a process that has the host NPU, and
the item that asks for it must say so. Prints one JSON object; test_device_acceptance.py says what it must be.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from ospnext.conformance.acceptance.ask import ask, items_of
from ospnext.conformance.host_npu.operators import attention, cast, layouts, quant_matmul, quantize, rotary

ITEMS = {item.id: item for item in items_of("ascend", None)}
inverted, contiguous = attention.mask_of, torch.Tensor.is_contiguous


def one_block(statistics: torch.Tensor, lengths: Any, layout: str) -> list[torch.Tensor]:
    """[N, T, 8] in memory, as the documents have it."""
    tokens, heads, _ = statistics.shape
    return list(statistics.view(heads, tokens, 8)[:, : sum(lengths)].split(lengths, dim=1))


def kept(op: str, mask: torch.Tensor | None, *args: Any, **named: Any) -> Any:
    return inverted(op, None if mask is None else ~mask, *args, **named)


def turned_back(x: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    same, other = honest_rotated(x, mode)
    return same, -other


honest_rotated, honest_saturated = rotary._rotated, quantize.saturated

#: Item -> (module of the emulation, its function, what takes the place of it).
BROKEN: dict[str, tuple[ModuleType, str, Callable[..., Any]]] = {
    "cast/to-hif8": (cast, "encoded", quantize.saturated),
    "quantize/codes": (quantize, "saturated", lambda x: honest_saturated(x) ^ (x == 1.0).to(torch.uint8)),
    "division/quantize": (quantize, "saturated", lambda x: honest_saturated(x * (1 + 2.0**-18))),
    "quant_matmul/transposed-views": (quant_matmul, "_plain", contiguous),
    "quant_matmul/one-scale-each": (quant_matmul, "_of_output_path", lambda scale: scale),
    "fusion/mask": (attention, "mask_of", kept),
    "packed/statistics": (layouts, "statistics_views", one_block),
    "rotary/interleave": (rotary, "_rotated", turned_back),
}


@contextlib.contextmanager
def broken(module: ModuleType, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    honest = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, honest)


if __name__ == "__main__":
    found = {}
    for identifier, place in BROKEN.items():
        with broken(*place):
            record = ask(ITEMS[identifier], torch.device("npu"))
        found[identifier] = {name: record[name] for name in ("verdict", "answer", "follows", "error")}
    print(json.dumps(found))
