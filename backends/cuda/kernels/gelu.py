"""GELU in its tanh form: x times the sigmoid of 2u, u = sqrt(2 / pi) (x + 0.044715 x^3), which overflows nowhere. Rows
are whole where their result is quantized.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics.scaling import Granularity, ScaleMode

from .ptx import exp2, larger_magnitude, reciprocal, widened
from .row_quantize import End, amax_in, codes_of, own_scale, quantized
from .rows import PIECE, SMALLEST, chunks, new, place, read, row_of, stream, warps, write

#: 2 sqrt(2 / pi), and that times 0.044715.
_LINEAR: tl.constexpr = tl.constexpr(1.5957691216057308)
_CUBIC: tl.constexpr = tl.constexpr(0.07135481627260025)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def gelu_tanh(x: Tensor) -> Tensor:
    out = new(x)
    _launch(None, x, out)
    return out


def gelu_tanh_backward(grad: Tensor, x: Tensor) -> tuple[Tensor]:
    dx = new(x)
    _launch(grad, x, dx)
    return (dx,)


def gelu_tanh_quantize(
    x: Tensor, scale_max: float, scale_mode: ScaleMode, granularity: Granularity, carried: bool
) -> tuple[Tensor, Tensor]:
    """(codes, scale) of what `gelu_tanh` gives in the dtype of x."""

    def run(end: End) -> None:
        if end.form == "shared":  # element by element
            _launch(None, x, end.codes, end)
            return
        x_BNC = stream(x)
        samples, tokens, channels = x_BNC.shape
        chunk, count, num_warps = chunks(channels)
        _rows[(samples * tokens,)](
            *(x_BNC, end.codes, end.scale, end.table, end.scale_max, end.unit),
            *(tokens, channels, *x_BNC.stride()[:2]),
            **end.constants(),
            CHUNK=chunk,
            CHUNKS=count,
            FULL=channels // chunk,
            ONE_SAMPLE=samples == 1,
            num_warps=min(4, num_warps),  # fewer than norms take: more work a number, and one sum
        )

    return quantized(x, run, scale_max=scale_max, scale_mode=scale_mode, granularity=granularity, carried=carried)


def _launch(grad: Tensor | None, x: Tensor, out: Tensor, end: End | None = None) -> None:
    if not x.numel():
        return
    # Elementwise: where all lie side by side, they are one long row.
    flat = x.is_contiguous() and (grad is None or grad.is_contiguous())
    x_BNC = x.view(1, 1, -1) if flat else stream(x)
    grad_BNC = x_BNC if grad is None else grad.view(1, 1, -1) if flat else stream(grad)
    samples, tokens, channels = x_BNC.shape
    block = max(SMALLEST, min(2 * PIECE if flat else PIECE, triton.next_power_of_2(channels)))
    pieces = triton.cdiv(channels, block)
    _pieces[(samples * tokens * pieces,)](
        *(None if grad is None else grad_BNC, x_BNC, out),
        *((end.scale, end.table) if end else (None, None)),
        *(tokens, channels, pieces, *grad_BNC.stride()[:2], *x_BNC.stride()[:2]),
        SHIFT=end.shift if end else None,
        BELOW_16=end is not None and end.below_16,
        FLAT=flat,
        BLOCK=block,
        num_warps=min(4, warps(block, 256)),
    )


@triton.jit
def _gate(x):
    """The sigmoid of 2u."""
    return reciprocal(1.0 + exp2(x * (-_LOG2_E * _LINEAR + (-_LOG2_E * _CUBIC) * (x * x))))


@triton.jit
def _pieces(
    grad_ptr,
    x_ptr,
    out_ptr,
    scale_ptr,
    table_ptr,
    tokens,
    channels,
    pieces,
    grad_sample_stride,
    grad_token_stride,
    sample_stride,
    token_stride,
    SHIFT: tl.constexpr,
    BELOW_16: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, piece = (0, tl.program_id(0)) if FLAT else (tl.program_id(0) // pieces, tl.program_id(0) % pieces)
    sample, token = row // tokens, row % tokens
    column = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    start = row_of(x_ptr, sample, token, sample_stride, token_stride)
    x = widened(tl.load(start + column, mask=inside, other=0.0))
    gate = _gate(x)
    out = x * gate
    if grad_ptr is not None:
        start = row_of(grad_ptr, sample, token, grad_sample_stride, grad_token_stride)
        grad = widened(tl.load(start + column, mask=inside, other=0.0))
        rest = _gate(-x)  # 1 - gate, of which the difference would leave nothing where gate is near 1
        out = grad * (gate + out * rest * (_LINEAR + 3 * _CUBIC * x * x))
    out = out.to(x_ptr.dtype.element_ty)
    if scale_ptr is not None:
        out = codes_of(out, tl.load(scale_ptr), table_ptr, SHIFT, BELOW_16)
    tl.store(row_of(out_ptr, 0, row, 0, channels) + column, out, mask=inside)


@triton.jit
def _rows(
    x_ptr,
    codes_ptr,
    scale_ptr,
    table_ptr,
    scale_max,
    unit,
    tokens,
    channels,
    sample_stride,
    token_stride,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    BELOW_16: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
):
    row = tl.program_id(0)
    sample, token = place(row, tokens, ONE_SAMPLE)
    column = tl.arange(0, CHUNK)
    start = row_of(x_ptr, sample, token, sample_stride, token_stride)
    largest = tl.zeros([CHUNK], x_ptr.dtype.element_ty)
    kept = ()  # rounded: that is what is quantized, and half the registers of fp32
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + column
        x = widened(read(start + at, at < channels, i < FULL))
        y = (x * _gate(x)).to(x_ptr.dtype.element_ty)
        kept += (y,)
        largest = larger_magnitude(largest, y)
    if FORM == "amax":
        tl.store(scale_ptr + row, amax_in(largest))
    else:
        scale = own_scale(largest, row, scale_ptr, scale_max, unit, POWER_OF_TWO)
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            codes = codes_of(kept[i], scale, table_ptr, SHIFT, BELOW_16)
            write(row_of(codes_ptr, 0, row, 0, channels) + at, codes, at < channels, i < FULL)
