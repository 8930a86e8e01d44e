"""Root-mean-square norm of rows held in registers, and the same with a rotary embedding behind it. A row has heads of
channels; without the embedding its chunks take their place.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .ptx import widened
from .rope import angles, turn
from .rows import ROWS, chunks, dense, inverse_root, mean_of, new, partial_sums, row_of, stream, streams, warps


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = new(x)
    if x.numel():
        (x_BNC,) = streams(x)
        _launch_forward(x_BNC, weight, None, None, out, eps, chunks(x_BNC.shape[-1])[0])
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Any, ...]:
    grad_BNC, x_BNC = streams(grad, x)
    dx, dweight = _gradients(grad_BNC, (*grad_BNC.stride()[:2], 0), x_BNC, weight, None, None, eps, 1)
    return dx.view(x.shape), dweight, None


def rms_norm_rope(x_BNC: Tensor, weight_C: Tensor, cos_NP: Tensor, sin_NP: Tensor, eps: float) -> Tensor:
    """[B, N, H, D], where D is twice the number of angles of a token."""
    samples, tokens, channels = x_BNC.shape
    head_dim = 2 * cos_NP.shape[1]
    out = new(x_BNC, samples, tokens, channels // head_dim, head_dim)
    if x_BNC.numel():
        _launch_forward(stream(x_BNC), weight_C, dense(cos_NP), dense(sin_NP), out, eps, head_dim)
    return out


def rms_norm_rope_backward(
    grad_BNHD: Tensor, x_BNC: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Any, ...]:
    grad = dense(grad_BNHD)
    dx, dweight = _gradients(grad, grad.stride()[:3], stream(x_BNC), weight, dense(cos), dense(sin), eps, grad.shape[2])
    return dx, dweight, None, None, None


def _tile(heads: int, channels: int) -> tuple[int, int]:
    return triton.next_power_of_2(heads), triton.next_power_of_2(channels // heads)


def _stride(angles_NP: Tensor | None) -> int:
    return 0 if angles_NP is None else angles_NP.stride(0)


def _launch_forward(x_BNC: Tensor, weight: Tensor, cos: Any, sin: Any, out: Tensor, eps: float, head_dim: int) -> None:
    """Heads of `head_dim` channels, of which the last may have fewer where nothing is turned."""
    samples, tokens, channels = x_BNC.shape
    chunk, _ = chunks(channels)
    width = triton.next_power_of_2(head_dim)
    height = max(1, chunk // width)
    _normalize[(samples * tokens,)](
        *(x_BNC, dense(weight), cos, sin, out, tokens, channels, head_dim),
        *(*x_BNC.stride()[:2], _stride(cos), _stride(sin), eps),
        HEADS=height,
        DIM=width,
        CHUNKS=triton.cdiv(channels, height * head_dim),
        num_warps=warps(height * width, 256),
    )


def _gradients(grad, grad_strides, x_BNC, weight, cos, sin, eps, heads):
    """(dx, dweight)."""
    samples, tokens, channels = x_BNC.shape
    dx, sums = new(x_BNC), partial_sums(x_BNC)
    if x_BNC.numel():
        height, width = _tile(heads, channels)
        _differentiate[(samples * sums.shape[1],)](
            *(grad, x_BNC, dense(weight), cos, sin, dx, sums, tokens, heads, channels // heads, sums.shape[1]),
            *(*grad_strides, *x_BNC.stride()[:2], _stride(cos), _stride(sin), eps),
            ROWS=ROWS,
            HEADS=height,
            DIM=width,
            num_warps=warps(height * width),
        )
    return dx, sums.flatten(0, 1).sum(0).to(weight.dtype)


@triton.jit
def _normalize(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    tokens,
    channels,
    head_dim,
    sample_stride,
    token_stride,
    cos_stride,
    sin_stride,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    row = tl.program_id(0)
    sample, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    start = row_of(x_ptr, sample, token, sample_stride, token_stride)
    total = tl.zeros([HEADS, DIM], tl.float32)
    kept = ()  # as it was read: half the registers of fp32
    for i in tl.static_range(CHUNKS):
        at = (i * HEADS + head) * head_dim + channel
        x = tl.load(start + at, mask=(channel < head_dim) & (at < channels), other=0.0)
        kept += (x,)
        total += widened(x) * widened(x)
    inverse = inverse_root(mean_of(tl.sum(total), channels) + eps)
    if cos_ptr is not None:
        cos, sin = angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, head_dim // 2, False, DIM // 2)
    for i in tl.static_range(CHUNKS):
        at = (i * HEADS + head) * head_dim + channel
        inside = (channel < head_dim) & (at < channels)
        y = widened(kept[i]) * inverse * widened(tl.load(weight_ptr + at, mask=inside, other=0.0))
        if cos_ptr is not None:
            y = turn(y, cos, sin, HEADS, DIM)
        tl.store(row_of(out_ptr, 0, row, 0, channels) + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _differentiate(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    sums_ptr,
    tokens,
    heads,
    head_dim,
    chunks,
    grad_sample_stride,
    grad_token_stride,
    grad_head_stride,
    sample_stride,
    token_stride,
    cos_stride,
    sin_stride,
    eps,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = program // chunks, (program % chunks).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (channel < head_dim)
    at = head * head_dim + channel
    grad_at = head.to(tl.int64) * grad_head_stride + channel
    channels = heads * head_dim
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([HEADS, DIM], tl.float32)
    grad_start = row_of(grad_ptr, sample, first, grad_sample_stride, grad_token_stride)
    x_start = row_of(x_ptr, sample, first, sample_stride, token_stride)
    next_grad = tl.load(grad_start + grad_at, mask=inside, other=0.0)
    next_x = tl.load(x_start + at, mask=inside, other=0.0)
    token = first
    while token < last:
        grad, x = next_grad.to(tl.float32), next_x.to(tl.float32)
        # One row ahead, so that loads do not wait for the sums of this one.
        ahead = tl.minimum(token + 1, last - 1)
        grad_start = row_of(grad_ptr, sample, ahead, grad_sample_stride, grad_token_stride)
        next_grad = tl.load(grad_start + grad_at, mask=inside, other=0.0)
        next_x = tl.load(row_of(x_ptr, sample, ahead, sample_stride, token_stride) + at, mask=inside, other=0.0)
        if cos_ptr is not None:
            cos, sin = angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, head_dim // 2, True, DIM // 2)
            grad = turn(grad, cos, sin, HEADS, DIM)
        inverse = inverse_root(mean_of(tl.sum(x * x), channels) + eps)
        normed, scaled = x * inverse, grad * weight
        dx = inverse * (scaled - normed * mean_of(tl.sum(scaled * normed), channels))
        dweight += grad * normed
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(row_of(dx_ptr, 0, sample * tokens + token, 0, channels) + at, dx, mask=inside)
        token += 1
    tl.store(row_of(sums_ptr, 0, program, 0, channels) + at, dweight, mask=inside)
