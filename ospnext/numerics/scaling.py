"""How scales follow from values: the same arithmetic on every device. No format lives here."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

ScaleMode = Literal["amax", "pow2"]
SCALE_MODES: tuple[ScaleMode, ...] = get_args(ScaleMode)

#: What shares a scale: the whole tensor, each row (the last dimension) or each channel (the last dimension but one).
Granularity = Literal["tensor", "row", "channel"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

#: Smaller magnitudes count as this one, so that no scale is subnormal.
SMALLEST_AMAX = 1e-12


def scale_shape(shape: torch.Size, granularity: Granularity) -> list[int]:
    """Of the scale of a tensor of `shape`: dimensions that share one are 1."""
    if granularity == "tensor":
        return [1] * len(shape)
    dim = len(shape) - (1 if granularity == "row" else 2)
    return [1 if d == dim else n for d, n in enumerate(shape)]


def amax_of(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitude, fp32 in `scale_shape`; NaN where there is one, 0 where there is nothing."""
    shape = scale_shape(x.shape, granularity)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    # One pass without a temporary, unlike x.abs().amax().
    if granularity == "tensor":
        low, high = torch.aminmax(x)
    else:
        low, high = torch.aminmax(x, dim=-1 if granularity == "row" else -2, keepdim=True)
    return torch.maximum(-low, high).float().reshape(shape)


def scale_of(amax: Tensor, scale_max: float, mode: ScaleMode = "amax") -> Tensor:
    """fp32 scale s for which x / s has the largest magnitude `scale_max`; shape of `amax`, which is fp32.

    "amax": amax / scale_max. "pow2": the power of two at or next above that, by which division is exact on every
    device. Where amax is 0 the scale is 1; where it is infinite or NaN the scale is NaN, and so is all that it scales.
    """
    # By a tensor: CUDA multiplies by the reciprocal where the divisor is a plain number, which is off by an ulp.
    scale = amax.clamp_min(SMALLEST_AMAX) / amax.new_full((), scale_max)
    if mode == "pow2":
        scale = _next_power_of_two(scale)
    scale = scale.masked_fill(amax == 0, 1.0)
    return scale.masked_fill(~torch.isfinite(amax), torch.nan)


def _next_power_of_two(x: Tensor) -> Tensor:
    """Of positive fp32 numbers, by their bits; at most 2^127."""
    bits = x.view(torch.int32)
    return (bits + 0x7FFFFF & 0x7F800000).clamp_max(0x7F000000).view(torch.float32)
