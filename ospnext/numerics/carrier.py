"""HiFloat8 values as FP8 E4M3 numbers, which tensor cores multiply: a power of two times each value. No kernel here.

A carried operand is E4M3 codes and the scale of the HiFloat8 ones over that power of two, so that plain numbers times
the scale are again the values. Those from 2^(-8 - shift) on are exact; smaller ones are rounded to E4M3."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ospnext.numerics import hif8

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
_MOST = 8


def shift_for(scale_max: float) -> int:
    """The largest power of two by which magnitudes up to `scale_max` stay within E4M3: 4 for 15, 1 for 224."""
    return max(shift for shift in range(_MOST + 1) if shift == 0 or scale_max * 2**shift <= LARGEST)


def carry(codes: Tensor, scale: Tensor, scale_max: float) -> tuple[Tensor, Tensor]:
    """Carried codes and their scale, of HiFloat8 ones (uint8) at most `scale_max`. What E4M3 cannot hold is NaN."""
    shift = shift_for(scale_max)
    return table(codes.device, shift)[codes.int()].view(DTYPE), carried_scale(scale, shift)


def carried_scale(scale: Tensor, shift: int) -> Tensor:
    """The scale of carried codes, from that of the HiFloat8 ones."""
    return scale * 2.0**-shift


def values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What either kind of codes stands for, before its scale; exact in `dtype`."""
    return hif8.decode(codes, dtype) if codes.dtype == torch.uint8 else codes.to(dtype)


@functools.cache
def table(device: torch.device, shift: int) -> Tensor:
    """uint8 [256]: by HiFloat8 code, the E4M3 code of 2^shift times its value. Zero has no sign, as in HiFloat8."""
    numbers = hif8.decode(torch.arange(256, dtype=torch.uint8)) * 2.0**shift
    numbers = torch.where(numbers.abs() <= LARGEST, numbers, torch.nan)
    with torch.inference_mode(False):  # kept for callers of every mode
        codes = numbers.to(DTYPE).view(torch.uint8)
        return codes.masked_fill(codes == 0x80, 0).to(device)
