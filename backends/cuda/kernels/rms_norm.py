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
from .rows import (
    ROWS,
    chunks,
    dense,
    inverse_root,
    mean_of,
    new,
    of_gradient,
    partial_sums,
    place,
    read,
    row_of,
    stream,
    streams,
    sum_two,
    write,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = new(x)
    if x.numel():
        (x_BNC,) = streams(x)
        _launch_forward(x_BNC, weight, None, None, out, eps, chunks(x_BNC.shape[-1])[0])
    return out


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Any, ...]:
    grad_BNC, x_BNC = streams(grad, x)
    dx, dweight = _gradients(grad_BNC, x_BNC, weight, None, None, eps)
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
    dx, dweight = _gradients(dense(grad_BNHD), stream(x_BNC), weight, dense(cos), dense(sin), eps)
    return dx, dweight, None, None, None


def _stride(angles_NP: Tensor | None) -> int:
    return 0 if angles_NP is None else angles_NP.stride(0)


def _launch_forward(x_BNC: Tensor, weight: Tensor, cos: Any, sin: Any, out: Tensor, eps: float, head_dim: int) -> None:
    """Heads of `head_dim` channels, of which the last may have fewer where nothing is turned."""
    samples, tokens, channels = x_BNC.shape
    chunk, _, num_warps = chunks(channels)
    width = triton.next_power_of_2(head_dim)
    height = max(1, chunk // width)
    _normalize[(samples * tokens,)](
        *(x_BNC, dense(weight), cos, sin, out, tokens, channels, head_dim),
        *(*x_BNC.stride()[:2], _stride(cos), _stride(sin), eps),
        HEADS=height,
        DIM=width,
        CHUNKS=triton.cdiv(channels, height * head_dim),
        FULL=_full(channels, height, head_dim, width),
        ONE_SAMPLE=samples == 1,
        num_warps=num_warps,
    )


def _full(channels: int, heads: int, head_dim: int, width: int) -> int:
    """Chunks of `heads` heads in which nothing is masked."""
    return channels // (heads * head_dim) if width == head_dim else 0


def _gradients(grad, x_BNC, weight, cos, sin, eps):
    """(dx, dweight) for grad [B, N, H, D], or [B, N, C] whose chunks take the place of heads."""
    samples, tokens, channels = x_BNC.shape
    dx, sums = new(x_BNC), partial_sums(x_BNC)
    if x_BNC.numel():
        chunk, stages, options = of_gradient(x_BNC)
        head_dim = grad.shape[-1] if grad.ndim == 4 else chunk
        width = triton.next_power_of_2(head_dim)
        height = max(1, chunk // width)
        _differentiate[(samples * sums.shape[1],)](
            *(grad, x_BNC, dense(weight), cos, sin, dx, sums, tokens, channels, head_dim, sums.shape[1]),
            *(*(*grad.stride()[:-1], head_dim)[:3], *x_BNC.stride()[:2], _stride(cos), _stride(sin), eps),
            ROWS=ROWS,
            HEADS=height,
            DIM=width,
            CHUNKS=triton.cdiv(channels, height * head_dim),
            FULL=_full(channels, height, head_dim, width),
            STAGES=stages,
            **options,
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
    FULL: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
):
    row = tl.program_id(0)
    sample, token = place(row, tokens, ONE_SAMPLE)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    start = row_of(x_ptr, sample, token, sample_stride, token_stride)
    total = tl.zeros([HEADS, DIM], tl.float32)
    kept = ()  # as it was read: half the registers of fp32
    for i in tl.static_range(CHUNKS):
        at = (i * HEADS + head) * head_dim + channel
        x = read(start + at, (channel < head_dim) & (at < channels), i < FULL)
        kept += (x,)
        total += widened(x) * widened(x)
    inverse = inverse_root(mean_of(tl.sum(total), channels) + eps)
    if cos_ptr is not None:
        cos, sin = angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, head_dim // 2, False, DIM // 2)
    for i in tl.static_range(CHUNKS):
        at = (i * HEADS + head) * head_dim + channel
        inside = (channel < head_dim) & (at < channels)
        y = widened(kept[i]) * inverse * widened(read(weight_ptr + at, inside, i < FULL))
        if cos_ptr is not None:
            y = turn(y, cos, sin, HEADS, DIM)
        write(row_of(out_ptr, 0, row, 0, channels) + at, y, inside, i < FULL)


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
    channels,
    head_dim,
    programs,
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
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = program // programs, (program % programs).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    weights, dweights = (), ()
    for i in tl.static_range(CHUNKS):
        at = (i * HEADS + head) * head_dim + channel
        weights += (read(weight_ptr + at, (channel < head_dim) & (at < channels), i < FULL).to(tl.float32),)
        dweights += (tl.zeros([HEADS, DIM], tl.float32),)
    for token in tl.range(first, last, num_stages=STAGES):
        grad_row = row_of(grad_ptr, sample, token, grad_sample_stride, grad_token_stride)
        x_row = row_of(x_ptr, sample, token, sample_stride, token_stride)
        if cos_ptr is not None:
            cos, sin = angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, head_dim // 2, True, DIM // 2)
        squares = tl.zeros([HEADS, DIM], tl.float32)
        along = tl.zeros([HEADS, DIM], tl.float32)
        rows, grads = (), ()
        for i in tl.static_range(CHUNKS):
            at = (i * HEADS + head) * head_dim + channel
            inside = (channel < head_dim) & (at < channels)
            grad_at = row_of(grad_row, i * HEADS, 0, grad_head_stride, 0) + head.to(tl.int64) * grad_head_stride
            grad = read(grad_at + channel, inside, i < FULL).to(tl.float32)
            if cos_ptr is not None:
                grad = turn(grad, cos, sin, HEADS, DIM)
            rows += (read(x_row + at, inside, i < FULL).to(tl.float32),)
            grads += (grad,)
            squares += rows[i] * rows[i]
            # Not of grad * weight, which dx computes anew: kept from here to there, it takes registers that sums need.
            along += grads[i] * rows[i] * weights[i]
        squares, along = sum_two(squares, along)
        inverse = inverse_root(mean_of(squares, channels) + eps)
        slope = mean_of(along, channels) * inverse
        dx_row = row_of(dx_ptr, 0, sample * tokens + token, 0, channels)
        more = ()
        for i in tl.static_range(CHUNKS):
            at = (i * HEADS + head) * head_dim + channel
            normed = rows[i] * inverse
            more += (dweights[i] + grads[i] * normed,)
            dx = inverse * (grads[i] * weights[i] - normed * slope)
            write(dx_row + at, dx, (channel < head_dim) & (at < channels), i < FULL)
        dweights = more
    sums_row = row_of(sums_ptr, 0, program, 0, channels)
    for i in tl.static_range(CHUNKS):
        at = (i * HEADS + head) * head_dim + channel
        write(sums_row + at, dweights[i], (channel < head_dim) & (at < channels), i < FULL)
