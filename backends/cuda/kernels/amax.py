"""The largest magnitude of a whole tensor, read once at the rate of memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ptx import larger_magnitude
from .row_quantize import magnitude_bits

_BLOCK, _BLOCKS = 4096, 8


def amax_of_all(x: Tensor) -> Tensor:
    """fp32 with every dimension 1; NaN where there is one, 0 of nothing. x is fp32, bf16 or fp16, with any strides."""
    x, shape = x.contiguous(), [1] * x.ndim
    if not x.numel():
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    parts = torch.empty(triton.cdiv(x.numel(), _BLOCK * _BLOCKS), dtype=torch.int32, device=x.device)
    _largest[(len(parts),)](x, parts, x.numel(), BLOCK=_BLOCK, BLOCKS=_BLOCKS, num_warps=8)
    return parts.amax().view(torch.float32).view(shape)


@triton.jit
def _largest(x_ptr, parts_ptr, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], x_ptr.dtype.element_ty)
    for i in tl.static_range(BLOCKS):
        at = start + i * BLOCK
        largest = larger_magnitude(largest, tl.load(x_ptr + at, mask=at < count, other=0.0))
    tl.store(parts_ptr + tl.program_id(0), tl.max(magnitude_bits(largest.to(tl.float32))))
