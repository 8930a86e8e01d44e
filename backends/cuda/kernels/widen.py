"""E4M3 numbers times their scale, plus a number for each channel, in a wider dtype and in one pass: a byte read and a
result written for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def widen(numbers: Tensor, scale: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous float8_e4m3fn numbers [..., C] times one fp32 scale, plus fp32 [C], rounded once to `dtype`. The last
    dimensions of the numbers may be several that make C.
    """
    out = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
    if count := numbers.numel():
        _widen[(triton.cdiv(count, _BLOCK),)](
            numbers, scale, centre, out, count, centre.numel(), BLOCK=_BLOCK, num_warps=8
        )
    return out


@triton.jit
def _widen(numbers_ptr, scale_ptr, centre_ptr, out_ptr, count, channels, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    numbers = tl.load(numbers_ptr + at, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(centre_ptr + at % channels)
    tl.store(out_ptr + at, (numbers * tl.load(scale_ptr) + centre).to(out_ptr.dtype.element_ty), mask=inside)
