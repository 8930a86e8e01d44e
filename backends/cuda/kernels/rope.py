"""Rotary embedding of interleaved pairs: one program turns all heads of a token, whose angles it loads once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .rows import dense, new, row_of, warps

#: Elements of a program: 64 heads of 128 channels.
_TILE = 8192


def rope(x_BNHD: Tensor, cos_NP: Tensor, sin_NP: Tensor, inverse: bool = False) -> Tensor:
    """x turned by the angles of its tokens, or with `inverse` turned back."""
    x, cos, sin = dense(x_BNHD), dense(cos_NP), dense(sin_NP)
    out = new(x)
    if x.numel():
        _, tokens, heads, head_dim = x.shape
        width = triton.next_power_of_2(head_dim)
        height = min(triton.next_power_of_2(heads), max(1, _TILE // width))
        pieces = triton.cdiv(heads, height)
        _turn_tokens[(x.shape[0] * tokens * pieces,)](
            *(x, cos, sin, out, tokens, heads, head_dim, pieces),
            *(*x.stride()[:3], cos.stride(0), sin.stride(0)),
            INVERSE=inverse,
            HEADS=height,
            DIM=width,
            num_warps=warps(height * width),
        )
    return out


@triton.jit
def turn(x_HD, cos_P, sin_P, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Each pair of channels (2m, 2m + 1) of x times the complex number cos[m] + i sin[m]."""
    real, imaginary = tl.split(tl.reshape(x_HD, [HEADS, DIM // 2, 2]))
    cos, sin = cos_P[None, :], sin_P[None, :]
    return tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), [HEADS, DIM])


@triton.jit
def angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, pairs, INVERSE: tl.constexpr, PAIRS: tl.constexpr):
    """fp32 cos and sin [P] of the angles of one token, or of the opposite ones."""
    pair = tl.arange(0, PAIRS)
    cos = tl.load(row_of(cos_ptr, 0, token, 0, cos_stride) + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    sin = tl.load(row_of(sin_ptr, 0, token, 0, sin_stride) + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    return cos, sin


@triton.jit
def _turn_tokens(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    heads,
    head_dim,
    pieces,
    sample_stride,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    sample, token = row // tokens, row % tokens
    head, channel = (piece * HEADS + tl.arange(0, HEADS))[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (channel < head_dim)
    start = row_of(x_ptr, sample, token, sample_stride, token_stride)
    x = tl.load(start + head.to(tl.int64) * head_stride + channel, mask=inside, other=0.0).to(tl.float32)
    cos, sin = angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, head_dim // 2, INVERSE, DIM // 2)
    out = turn(x, cos, sin, HEADS, DIM).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * (heads * head_dim) + head * head_dim + channel, out, mask=inside)
