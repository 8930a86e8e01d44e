"""HiFloat8 once more, by arithmetic on fp64 values, for the oracles of the quantize family: shares nothing with
`ospnext.numerics`, which backends use. CPU only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A quotient closer to a tie than this, relative, may be rounded either way by arithmetic that is right to a few units
#: of fp32. Inputs of exact cases keep away from ties by as much.
TIE_MARGIN = 2.0**-20


def rounded(x: Tensor, *, saturate: bool = False) -> Tensor:
    """The HiFloat8 value nearest to each element, halves away from zero, in fp64."""
    x = x.double()
    magnitude = x.abs()
    _, exponent = torch.frexp(magnitude)
    exponent = exponent - 1  # magnitude = 1.m * 2^exponent
    distance = exponent.abs()
    kept = (distance <= 3).int() + (distance <= 7).int() + (distance <= 15).int()
    step = torch.ldexp(torch.ones_like(x), exponent - kept)
    value = torch.floor(magnitude / step + 0.5) * step
    value = torch.where(exponent == -23, 2.0**-22, value)
    value = torch.where(exponent < -23, 0.0, value)
    value = torch.where(magnitude == 0, 0.0, value)
    value = torch.where(magnitude >= 40960, 32768.0 if saturate else math.inf, value)
    value = torch.where(x.isnan(), math.nan, value)
    return torch.where(x < 0, -value, value)


def codes_of(value: Tensor) -> Tensor:
    """uint8 codes of HiFloat8 values, put together from their fields."""
    magnitude = value.double().abs()
    mantissa, exponent = torch.frexp(torch.where(torch.isfinite(magnitude), magnitude, 1.0))
    exponent = exponent - 1
    fraction = mantissa * 2 - 1
    below, g = (exponent < 0).int(), exponent.abs()

    def fields(prefix: int, first: int, kept: int) -> Tensor:
        """Prefix, sign of the exponent, what exceeds the smallest exponent of the class, mantissa."""
        width = first.bit_length() - 1
        return (((prefix << 1 | below) << width | (g - first)) << kept) | (fraction * 2**kept).int()

    code = torch.where(g == 0, 0x08 | (fraction * 8).int(), fields(0b11, 8, 1))
    for prefix, first, last, kept in ((0b001, 1, 1, 3), (0b01, 2, 3, 3), (0b10, 4, 7, 2)):
        code = torch.where((g >= first) & (g <= last), fields(prefix, first, kept), code)
    code = torch.where(exponent <= -16, exponent + 23, code)
    code = torch.where(magnitude == 0, 0, code)
    code = torch.where(magnitude.isinf(), 0x6F, code)
    code = torch.where(value < 0, code | 0x80, code)
    return torch.where(value.isnan(), 0x80, code).to(torch.uint8)


def decoded(codes: Tensor) -> Tensor:
    """The value of each code in fp64, by looking for it among the codes of all values."""
    values = rounded(torch.exp2(torch.linspace(-26, 16.5, 20_000, dtype=torch.float64))).unique()
    values = torch.cat((values, -values, torch.tensor([math.nan])))
    table = torch.zeros(256, dtype=torch.float64)
    table[codes_of(values).long()] = values
    return table[codes.long()]


def carried(values: Tensor, scale_max: float) -> tuple[Tensor, float]:
    """(2^n times each value as E4M3 has it, in fp64; 2^n): three bits of mantissa, steps of 2^-9 at least, ties to
    even, nothing beyond 448.
    """
    power = 2.0 ** min(8, max(0, math.floor(math.log2(448 / scale_max))))
    magnitude = values.double().abs() * power
    _, exponent = torch.frexp(torch.where(torch.isfinite(magnitude), magnitude, 1.0))
    step = torch.exp2((exponent.double() - 4).clamp_min(-9))
    numbers = torch.round(magnitude / step) * step
    numbers = torch.where(numbers <= 448, numbers, math.nan)
    return torch.where(values < 0, -numbers, numbers), power


def amax_of(x: Tensor, granularity: str) -> Tensor:
    """Largest magnitude in fp32, with every dimension that it was taken over kept as 1. Nothing at all has 0."""
    if granularity == "tensor":
        dims = tuple(range(x.ndim))
    else:
        dims = (x.ndim - 1,) if granularity == "row" else (x.ndim - 2,)
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    if x.numel() == 0:
        return torch.zeros(shape)
    return x.double().abs().amax(dims, keepdim=True).float()


def scale_of(amax: Tensor, scale_max: float, mode: str) -> Tensor:
    """fp32; see MEANING in quantize.py."""
    scale = torch.maximum(amax, torch.tensor(1e-12)) / torch.tensor(scale_max)
    if mode == "pow2":
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_max(127)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(torch.isfinite(amax), scale, math.nan)


def quantized(
    x: Tensor, scale_max: float, mode: str = "amax", granularity: str = "tensor", amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(HiFloat8 values in fp64, fp32 scale)."""
    scale = scale_of(amax_of(x, granularity) if amax is None else amax, scale_max, mode)
    return rounded(_quotient(x, scale)), scale


def _quotient(x: Tensor, scale: Tensor) -> Tensor:
    """In the arithmetic of the contract: fp32, and fp64 for fp64."""
    return (x if x.dtype == torch.float64 else x.float()) / scale


def away_from_ties(x: Tensor, scale_max: float, mode: str, granularity: str, amax: Tensor | None = None) -> Tensor:
    """x with zeros where a quotient lies so near to a tie, but not on it with a power of two for a scale, that correct
    arithmetic may fall on either side. The largest magnitudes stay, so that the scale does.
    """
    if mode == "pow2":
        return x
    amax = amax_of(x, granularity) if amax is None else amax
    quotient = x.double() / scale_of(amax, scale_max, mode).double()
    near = rounded(quotient * (1 - TIE_MARGIN)) != rounded(quotient * (1 + TIE_MARGIN))
    return torch.where(near & quotient.isfinite(), 0.0, x).to(x.dtype)
