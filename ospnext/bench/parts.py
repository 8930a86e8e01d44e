"""Where the time of a forward goes: the device time of every operator, by torch.profiler, added up in a few parts.

`key_averages` knows operators by their own names only, and an `aten::amax` may be quantization or not: so this walks
the events, and looks at the operators that an operator runs in, too."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

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


def part_of(names: Sequence[str]) -> str:
    """The part of an operator, from its name and those of the operators that it runs in, innermost first."""
    ours = [name.removeprefix("ospnext::") for name in names if name.startswith("ospnext::")]
    if any("attention" in name for name in ours) or any("scaled_dot_product" in name for name in names):
        return "attention"
    if {"quantized_linear", "linear_gelu_tanh"} & set(ours) or any(_plain(name) in _PRODUCTS for name in names):
        return "linear"
    if any(name.startswith("hif8_") for name in ours):
        return "quantize"
    if ours or _plain(names[0]) in _ARITHMETIC or names[0].startswith("triton_"):  # compiled code is called triton_...
        return "elementwise"
    return "other"


@functools.lru_cache(4096)
def _plain(name: str) -> str:
    """The name of an aten operator without namespace and in-place mark; names of other libraries as they are."""
    return name.removeprefix("aten::").rstrip("_") if name.startswith("aten::") else name


def profiled(call: Call, device: torch.device, *, repeats: int = 1) -> dict[str, float]:
    """Milliseconds of each part in one call, the mean of `repeats`; on a CPU the time its operators took."""
    surface = Device(device)
    surface.synchronize()
    with torch.profiler.profile(activities=torch.profiler.supported_activities(), acc_events=True) as run:
        for _ in range(repeats):
            call()
        surface.synchronize()
    events = list(run.events() or ())
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.device_type == DeviceType.CPU and not event.is_async:
            found[part_of(tuple(_names(event)))] += _own(event, surface)
    if not surface.is_cpu:  # kernels that belong to no operator
        everything = sum(e.time_range.elapsed_us() for e in events if _is_kernel(e))
        found["other"] += max(0.0, everything - sum(found.values()))
    return {part: microseconds / 1e3 / repeats for part, microseconds in found.items()}


def _own(event: Any, surface: Device) -> float:
    """Microseconds of the kernels that this operator has started itself."""
    if surface.is_cpu:
        return event.self_cpu_time_total
    if event.is_user_annotation:  # its "kernels" are a bracket around those of others
        return 0.0
    return sum(kernel.duration for kernel in event.kernels)


def _is_kernel(event: Any) -> bool:
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def _names(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent
