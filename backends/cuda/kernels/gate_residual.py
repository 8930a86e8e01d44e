"""x + gate * y, written in another order of tokens: a program takes a piece of an output row and reads the row that
belongs there. The gradient goes the other way.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .rows import PIECE, ROWS, dense, new, partial_sums, row_of, stream, warps


def gate_residual(x: Tensor, y: Tensor, gate: Tensor | None, permutation: Tensor | None) -> Tensor:
    out = new(x)
    if x.numel():
        x_BNC, y_BNC, gate = stream(x), stream(y), dense(gate)
        samples, tokens, channels = x_BNC.shape
        block, pieces = _pieces(channels)
        _gather[(samples * tokens * pieces,)](
            *(x_BNC, y_BNC, gate, dense(permutation), out, tokens, channels, pieces),
            *(*x_BNC.stride()[:2], *y_BNC.stride()[:2], _stride(gate)),
            BLOCK=block,
            num_warps=warps(block, 256),
        )
    return out


def gate_residual_backward(
    grad: Tensor, x: Tensor, y: Tensor, gate: Tensor | None, permutation: Tensor | None
) -> tuple[Any, ...]:
    dx, dy = new(x), new(y)
    if gate is None and permutation is None:
        return dx.copy_(grad), dy.copy_(grad), None, None
    grad_BNC, y_BNC, gate = stream(grad), stream(y), dense(gate)
    samples, tokens, channels = grad_BNC.shape
    sums = None if gate is None else partial_sums(grad_BNC)
    if grad.numel():
        (block, pieces), chunks = _pieces(channels), triton.cdiv(tokens, ROWS)
        _scatter[(samples * chunks * pieces,)](
            *(grad_BNC, y_BNC, gate, dense(permutation), dx, dy, sums, tokens, channels, pieces, chunks),
            *(*grad_BNC.stride()[:2], *y_BNC.stride()[:2], _stride(gate)),
            ROWS=ROWS,
            BLOCK=block,
            num_warps=warps(block, 256),
        )
    dgate = None if gate is None or sums is None else sums.sum(1).to(gate.dtype)
    return dx, dy, dgate, None


def _pieces(channels: int) -> tuple[int, int]:
    """Channels of a program, and how many programs a row takes."""
    block = min(PIECE, triton.next_power_of_2(channels))
    return block, triton.cdiv(channels, block)


def _stride(gate_BC: Tensor | None) -> int:
    return 0 if gate_BC is None else gate_BC.stride(0)


@triton.jit
def _gather(
    x_ptr,
    y_ptr,
    gate_ptr,
    permutation_ptr,
    out_ptr,
    tokens,
    channels,
    pieces,
    x_sample_stride,
    x_token_stride,
    y_sample_stride,
    y_token_stride,
    gate_stride,
    BLOCK: tl.constexpr,
):
    row, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    sample, token = row // tokens, row % tokens
    if permutation_ptr is not None:
        token = tl.load(permutation_ptr + token)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    x = tl.load(row_of(x_ptr, sample, token, x_sample_stride, x_token_stride) + column, mask=inside, other=0.0)
    y = tl.load(row_of(y_ptr, sample, token, y_sample_stride, y_token_stride) + column, mask=inside, other=0.0)
    out = y.to(tl.float32)
    if gate_ptr is not None:
        gate = tl.load(row_of(gate_ptr, sample, 0, gate_stride, 0) + column, mask=inside, other=0.0)
        out *= gate.to(tl.float32)
    out = (x.to(tl.float32) + out).to(out_ptr.dtype.element_ty)
    tl.store(row_of(out_ptr, 0, row, 0, channels) + column, out, mask=inside)


@triton.jit
def _scatter(
    grad_ptr,
    y_ptr,
    gate_ptr,
    permutation_ptr,
    dx_ptr,
    dy_ptr,
    sums_ptr,
    tokens,
    channels,
    pieces,
    chunks,
    grad_sample_stride,
    grad_token_stride,
    y_sample_stride,
    y_token_stride,
    gate_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    sample, first = program // chunks, (program % chunks).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    gate = tl.full([BLOCK], 1.0, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(row_of(gate_ptr, sample, 0, gate_stride, 0) + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    token = first
    while token < last:
        target = token
        if permutation_ptr is not None:
            target = tl.load(permutation_ptr + token)
        start = row_of(grad_ptr, sample, token, grad_sample_stride, grad_token_stride)
        grad = tl.load(start + column, mask=inside, other=0.0)
        wide = grad.to(tl.float32)
        if gate_ptr is not None:
            start = row_of(y_ptr, sample, target, y_sample_stride, y_token_stride)
            total += wide * tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
        row = sample * tokens + target
        dx, dy = grad.to(dx_ptr.dtype.element_ty), (wide * gate).to(dy_ptr.dtype.element_ty)
        tl.store(row_of(dx_ptr, 0, row, 0, channels) + column, dx, mask=inside)
        tl.store(row_of(dy_ptr, 0, row, 0, channels) + column, dy, mask=inside)
        token += 1
    if sums_ptr is not None:
        tl.store(row_of(sums_ptr, 0, program, 0, channels) + column, total, mask=inside)
