"""A tensor [T, C] without the mean of each channel, as HiFloat8 codes of one scale; and what is to be added again.

Sums on FP8 tensor cores keep few bits, so that long ones of numbers with one sign lose a part of themselves. Values
without their mean lose next to nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics import carrier
from ospnext.numerics.scaling import ScaleMode, scale_of

from .carry import carry, divide
from .rows import dense

_ROWS, _BLOCK = 256, 256


def quantize_centred(x_TC: Tensor, scale_max: float, scale_mode: ScaleMode) -> tuple[Tensor, Tensor, Tensor]:
    """(carried codes [T, C], their scale [], centre fp32 [C]): x is about codes * scale + centre, and so exactly on
    the mean of each channel. Two passes, which read x and write codes; not finite where x is not.
    """
    x_TC = dense(x_TC)
    tokens, channels = x_TC.shape
    shift = carrier.shift_for(scale_max)
    grid = (triton.cdiv(tokens, _ROWS), triton.cdiv(channels, _BLOCK))
    sums, low, high = (torch.empty(grid[0], channels, dtype=torch.float32, device=x_TC.device) for _ in range(3))
    _statistics[grid](x_TC, sums, low, high, tokens, channels, x_TC.stride(0), ROWS=_ROWS, BLOCK=_BLOCK)
    mean = sums.sum(0) / tokens
    # NaN passes through the mean alone: a minimum need not keep it.
    amax = torch.maximum(high.amax(0) - mean, mean - low.amin(0)).amax()
    scale = scale_of(amax, scale_max, scale_mode)
    codes = torch.empty(x_TC.shape, dtype=torch.uint8, device=x_TC.device)
    _codes[grid](
        *(x_TC, mean, scale, codes, sums, tokens, channels, x_TC.stride(0)), SHIFT=shift, ROWS=_ROWS, BLOCK=_BLOCK
    )
    by = carrier.carried_scale(scale, shift)
    # The mean of what was rounded away goes back, too: with many tokens it is all that there is.
    return codes.view(carrier.DTYPE), by, mean - sums.sum(0) * (by / tokens) + 0.0 * scale


@triton.jit
def _statistics(x_ptr, sum_ptr, low_ptr, high_ptr, tokens, channels, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    total = tl.zeros([BLOCK], tl.float32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    token, last = first, tl.minimum(first + ROWS, tokens)
    while token < last:
        x = tl.load(x_ptr + token * stride + column, mask=inside, other=0.0).to(tl.float32)
        total += x
        low, high = tl.minimum(low, x), tl.maximum(high, x)
        token += 1
    at = tl.program_id(0) * channels + column
    tl.store(sum_ptr + at, total, mask=inside)
    tl.store(low_ptr + at, low, mask=inside)
    tl.store(high_ptr + at, high, mask=inside)


@triton.jit
def _codes(
    x_ptr,
    mean_ptr,
    scale_ptr,
    codes_ptr,
    sum_ptr,
    tokens,
    channels,
    stride,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    mean = tl.load(mean_ptr + column, mask=inside, other=0.0)
    scale = tl.load(scale_ptr)
    total = tl.zeros([BLOCK], tl.float32)
    token, last = first, tl.minimum(first + ROWS, tokens)
    while token < last:
        x = tl.load(x_ptr + token * stride + column, mask=inside, other=0.0).to(tl.float32)
        code = carry(divide(tl.where(inside, x - mean, 0.0), scale), scale, SHIFT, False)
        total += code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        tl.store(codes_ptr + token * channels + column, code, mask=inside)
        token += 1
    tl.store(sum_ptr + tl.program_id(0) * channels + column, total, mask=inside)
