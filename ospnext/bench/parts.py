"""Where the time of a forward goes: the device time of every operator, between two events of its stream, added up in a
few parts.

No profiler: it stops the device between calls, and clocks then move. An operator's own inner calls belong to it."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext.bench.measure import Call
from ospnext.ops.device import Device

#: In the order of the report. "other" is all that fits nowhere else: copies, fills, embeddings of the timestep.
PARTS = ("linear", "attention", "elementwise", "quantize", "other")

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_scaled_mm_v2", "_int_mm"}
#: What plain PyTorch definitions of fused operators are made of.
_ARITHMETIC = {
    *("add", "sub", "rsub", "mul", "div", "pow", "square", "neg", "sqrt", "rsqrt", "exp", "tanh", "addcmul", "lerp"),
    *("mean", "var", "var_mean", "sum", "layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"),
    *("gelu", "silu", "complex", "view_as_complex", "view_as_real", "stack", "index", "index_select", "gather"),
}


@functools.lru_cache(4096)
def part_of(name: str) -> str:
    """The part of an operator, by its name ("aten::mm")."""
    ours, plain = name.startswith("ospnext::"), _plain(name)
    if (ours and "attention" in name) or "scaled_dot_product" in name:
        return "attention"
    if plain in _PRODUCTS or plain in ("quantized_linear", "linear_gelu_tanh"):
        return "linear"
    if ours and plain.startswith("hif8_"):
        return "quantize"
    return "elementwise" if ours or plain in _ARITHMETIC else "other"


def _plain(name: str) -> str:
    """Without namespace and in-place mark; names of other libraries as they are."""
    library, _, inner = name.rpartition("::")
    return inner.rstrip("_") if library in ("aten", "ospnext") else name


def timed_parts(call: Call, device: torch.device) -> dict[str, float]:
    """Milliseconds of each part in one call, which must not be compiled: a graph has no operators left to time."""
    clock = _Clock(Device(device))
    with clock:
        call()
    return clock.parts()


class _Clock(TorchDispatchMode):
    """Events around every operator that PyTorch is asked for. On a CPU, whose operators are done when they return, the
    host's own clock."""

    def __init__(self, surface: Device) -> None:
        super().__init__()
        self.surface = surface
        self.taken: list[tuple[str, Any, Any]] = []
        surface.synchronize()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            return func(*args, **(kwargs or {}))
        started = self._now()
        result = func(*args, **(kwargs or {}))
        self.taken.append((func._schema.name, started, self._now()))
        return result

    def _now(self) -> Any:
        if self.surface.is_cpu:
            return time.perf_counter()
        event = torch.get_device_module(self.surface.device).Event(enable_timing=True)
        event.record()
        return event

    def parts(self) -> dict[str, float]:
        self.surface.synchronize()
        found = dict.fromkeys(PARTS, 0.0)
        for name, started, ended in self.taken:
            lasted = 1e3 * (ended - started) if self.surface.is_cpu else started.elapsed_time(ended)
            found[part_of(name)] += lasted
        return found
