"""HiFloat8: one value in 8 bits, with more mantissa near 1 and more range far from it. The format, and casts to and
from it.

A code is a sign, a prefix that says how long the exponent is, the exponent and what is left as mantissa (arXiv
2409.16626). Codes are uint8. Their order is not that of the values: never compare or sort them.

Rounding is to nearest, halves away from zero. Hybrid rounding, which hardware offers beside it, is left out on purpose:
its recipe for the random bits is not published, so that no two implementations could be held to the same result.

Models call the casts of `ospnext.ops`, which can be traced; these here keep tables and cannot."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FormatInfo:
    """As `torch.finfo`. `eps` is the step at 1; between 2^4 and 2^8 steps are twice, and beyond four times as coarse
    relative to the value. `overflow` is the smallest magnitude that rounds to infinity, `underflow` the smallest that
    does not round to zero.
    """

    bits: int = 8
    max: float = 2.0**15
    min: float = -(2.0**15)
    eps: float = 2.0**-3
    tiny: float = 2.0**-15
    smallest_subnormal: float = 2.0**-22
    overflow: float = 1.25 * 2.0**15
    underflow: float = 2.0**-23
    #: Largest values that still have three and two bits of mantissa: the usual ends of a scaled forward and backward.
    max_of_3_bits: float = 15.0
    max_of_2_bits: float = 224.0


INFO = FormatInfo()

ZERO, NAN, INF, NEGATIVE_INF = 0x00, 0x80, 0x6F, 0xEF

#: (prefix, its bits, exponent bits, mantissa bits); the prefix stands right below the sign.
_CLASSES = ((0b0001, 4, 0, 3), (0b001, 3, 1, 3), (0b01, 2, 2, 3), (0b10, 2, 3, 2), (0b11, 2, 4, 1))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def encode(x: Tensor, *, saturate: bool = False) -> Tensor:
    """The code of every element of x (fp64, fp32, bf16 or fp16): uint8, shape of x, contiguous.

    Magnitudes of 40960 and more become infinite, with `saturate` 32768. Magnitudes below 2^-23 become zero, which has
    no sign. NaN becomes 0x80.

    Raises:
        TypeError: x has another dtype.
    """
    _require_float(x)
    return _look_up(x, _codes_by_key(x.device, saturate))


def round_to_grid(x: Tensor, *, saturate: bool = False) -> Tensor:
    """`decode(encode(x))` in the dtype of x, which holds every HiFloat8 value exactly. Has no gradient."""
    _require_float(x)
    return _look_up(x, _values_by_key(x.device, x.dtype, saturate))


def decode(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The value of every code (uint8): shape of `codes`, contiguous. Exact in fp16, bf16 and wider dtypes.

    Raises:
        TypeError: `codes` are not uint8, or `dtype` is not one of fp64, fp32, bf16 and fp16.
    """
    if codes.dtype != torch.uint8 or dtype not in _DTYPES:
        raise TypeError(f"HiFloat8 codes are uint8 and decode to fp64, fp32, bf16 or fp16; got {codes.dtype}, {dtype}")
    table = _decoding(codes.device, dtype)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for found, given in _blocks(out, codes):
        torch.index_select(table, 0, given.to(torch.int32), out=found)
    return out


# ---- the format


def value_of(code: int) -> float:
    """The value of one code, read field by field."""
    sign, rest = (-1.0 if code & 0x80 else 1.0), code & 0x7F
    if code == ZERO:
        return 0.0
    if code == NAN:
        return math.nan
    if rest == INF:  # takes the place of 1.5 * 2^15
        return sign * math.inf
    if rest < 0b1000:  # prefix 0000: powers of two below the normal values
        return sign * 2.0 ** (rest - 23)
    exponent_bits, mantissa_bits = next((e, m) for prefix, n, e, m in _CLASSES if rest >> (7 - n) == prefix)
    mantissa = 1 + (rest & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    exponent = 0
    if exponent_bits:  # a sign, then a magnitude whose leading one is implied
        field = (rest >> mantissa_bits) & ((1 << exponent_bits) - 1)
        magnitude_bits = exponent_bits - 1
        exponent = 1 << magnitude_bits | field & ((1 << magnitude_bits) - 1)
        exponent = -exponent if field >> magnitude_bits else exponent
    return sign * mantissa * 2.0**exponent


def _rounded(exponent: int, sixteenths: int) -> float:
    """The grid value nearest to the positive number 2^exponent * sixteenths / 16, or to any above it but below the next
    such number: halves go up, so whatever follows the bit below the last one kept does not matter.
    """
    if exponent < -23:
        return 0.0
    if exponent == -23:  # half of the smallest value, and up
        return INFO.smallest_subnormal
    kept = next((bits for bits, limit in ((3, 3), (2, 7), (1, 15)) if abs(exponent) <= limit), 0)
    value = ((sixteenths + (8 >> kept)) >> (4 - kept)) * 2.0 ** (exponent - kept)
    return value if value <= INFO.max else math.inf


# ---- tables
#
# Since halves go away from zero, one bit below the three that are kept decides. Sign, exponent and four bits of
# mantissa of an fp32 number, 13 in all, are therefore enough to look up its code.

_NAN_KEY = 0x0FF8


@functools.cache
def _rounded_by_key(saturate: bool) -> list[float]:
    """The value that each of the 2^13 keys rounds to."""
    values = []
    for key in range(1 << 13):
        sign, exponent, sixteenths = (-1 if key >> 12 else 1), (key >> 4 & 0xFF) - 127, 16 + (key & 0xF)
        if exponent == 128 and sixteenths > 16:
            values.append(math.nan)
            continue
        value = sign * _rounded(exponent, sixteenths) + 0.0  # -0 + 0 is 0
        values.append(max(-INFO.max, min(INFO.max, value)) if saturate else value)
    return values


@functools.cache
def _codes_by_key(device: torch.device, saturate: bool) -> Tensor:
    code_of = {value_of(code): code for code in range(256) if code != NAN}
    codes = [NAN if math.isnan(value) else code_of[value] for value in _rounded_by_key(saturate)]
    with torch.inference_mode(False):  # kept for callers of every mode
        return torch.tensor(codes, dtype=torch.uint8, device=device)


@functools.cache
def _values_by_key(device: torch.device, dtype: torch.dtype, saturate: bool) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_rounded_by_key(saturate), dtype=dtype, device=device)


@functools.cache
def _decoding(device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([value_of(code) for code in range(256)], dtype=dtype, device=device)


def _require_float(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"HiFloat8 is made from fp64, fp32, bf16 or fp16; got {x.dtype}")


def _look_up(x: Tensor, table: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=table.dtype, device=x.device)
    for found, given in _blocks(out, x):
        torch.index_select(table, 0, _key(given), out=found)
    return out


def _key(x: Tensor) -> Tensor:
    """int32 [N]: sign, exponent and leading four bits of the mantissa of x [N] as an fp32 number, cut off."""
    if x.dtype == torch.float64:
        return _key_of_fp64(x)
    if x.dtype == torch.bfloat16:
        bits, magnitude, infinity, below = x.view(torch.int16), 0x7FFF, 0x7F80, 3
    else:
        bits, magnitude, infinity, below = x.float().view(torch.int32), 0x7FFFFFFF, 0x7F800000, 19  # fp16 is exact here
    nan = (bits & magnitude) > infinity
    return (bits >> below).to(torch.int32).bitwise_and_(0x1FFF).masked_fill_(nan, _NAN_KEY)


def _key_of_fp64(x: Tensor) -> Tensor:
    """Straight from the 52 bits of mantissa: a step by way of fp32 would round twice."""
    bits = x.view(torch.int64)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    infinity = 0x7FF << 52
    # Exponents outside fp32's range all end up as zero or infinity, whichever mantissa they have.
    exponent = ((magnitude >> 52) - 1023).clamp_(-127, 127).masked_fill_(magnitude == infinity, 128)
    key = (exponent + 127) << 4 | (magnitude >> 48 & 0xF) | (bits >> 51 & 0x1000)
    return key.masked_fill_(magnitude > infinity, _NAN_KEY).to(torch.int32)


def _blocks(out: Tensor, given: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat pieces of both, so that what is computed on the way stays in cache, or at least small."""
    size = 1 << 18 if out.device.type == "cpu" else 1 << 25
    yield from zip(out.view(-1).split(size), given.reshape(-1).split(size), strict=True)
