"""E4M3 as a carrier of HiFloat8: how far values can be shifted up, and the E4M3 number of each code. No kernel here."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ospnext.numerics import hif8

LARGEST = 448.0
_MOST = 8


def shift_for(scale_max: float) -> int:
    """The largest power of two by which magnitudes up to `scale_max` stay within E4M3: 4 for 15, 1 for 224."""
    return max(shift for shift in range(_MOST + 1) if shift == 0 or scale_max * 2**shift <= LARGEST)


@functools.cache
def table(device: torch.device, shift: int) -> Tensor:
    """uint8 [256]: by HiFloat8 code, the E4M3 code of 2^shift times its value. Values from 2^(-8 - shift) on are exact,
    smaller ones are rounded; what E4M3 cannot hold is NaN.
    """
    values = hif8.decode(torch.arange(256, dtype=torch.uint8)) * 2.0**shift
    values = torch.where(values.abs() <= LARGEST, values, torch.nan)
    with torch.inference_mode(False):  # kept for callers of every mode
        return values.to(torch.float8_e4m3fn).view(torch.uint8).to(device)
