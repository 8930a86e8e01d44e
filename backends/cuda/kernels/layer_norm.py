"""Layer norm of rows, with weight and bias, a modulation for each sample, or both; as values or as
HiFloat8 codes.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics.scaling import Granularity, ScaleMode

from .ptx import larger_magnitude, widened
from .row_quantize import VALUES, End, amax_in, codes_of, own_scale, quantized
from .rows import (
    ROW_REGISTERS,
    ROWS,
    chunks,
    dense,
    inverse_root,
    mean_of,
    new,
    partial_sums,
    row_of,
    stream,
    warps,
    within,
)

Operand = Tensor | None


def layer_norm_modulate(
    x: Tensor, weight: Operand, bias: Operand, shift: Operand, scale: Operand, eps: float
) -> Tensor:
    out = new(x)
    _launch_forward(x, weight, bias, shift, scale, eps, out, None)
    return out


def layer_norm_modulate_quantize(
    x: Tensor,
    weight: Operand,
    bias: Operand,
    shift: Operand,
    scale: Operand,
    eps: float,
    scale_max: float,
    scale_mode: ScaleMode,
    granularity: Granularity,
    carried: bool,
) -> tuple[Tensor, Tensor]:
    """(codes, scale) of what `layer_norm_modulate` gives in the dtype of x."""

    def run(end: End) -> None:
        _launch_forward(x, weight, bias, shift, scale, eps, end.codes, end)

    return quantized(x, run, scale_max=scale_max, scale_mode=scale_mode, granularity=granularity, carried=carried)


def layer_norm_modulate_backward(
    grad: Tensor, x: Tensor, weight: Operand, bias: Operand, shift: Operand, scale: Operand, eps: float
) -> tuple[Any, ...]:
    dx, grad_sum, normed_sum = _gradients(grad, x, weight, scale, eps)
    dweight = dbias = dshift = dscale = None
    if scale is not None and shift is not None:
        dshift, dscale = grad_sum, normed_sum
        if weight is not None and bias is not None:
            dscale = normed_sum * weight.float() + grad_sum * bias.float()
        dshift, dscale = dshift.to(shift.dtype), dscale.to(scale.dtype)
        grad_sum, normed_sum = (total * (1 + scale.float()) for total in (grad_sum, normed_sum))
    if weight is not None and bias is not None:
        dweight, dbias = normed_sum.sum(0).to(weight.dtype), grad_sum.sum(0).to(bias.dtype)
    return dx, dweight, dbias, dshift, dscale, None


def _launch_forward(
    x: Tensor,
    weight: Operand,
    bias: Operand,
    shift: Operand,
    scale: Operand,
    eps: float,
    out: Tensor,
    end: End | None,
) -> None:
    if not x.numel():
        return
    x_BNC, shift, scale = stream(x), dense(shift), dense(scale)
    samples, tokens, channels = x_BNC.shape
    chunk, count = chunks(channels)
    _normalize[(samples * tokens,)](
        *(x_BNC, dense(weight), dense(bias), shift, scale, out),
        *((end.scale, end.table, end.scale_max, end.unit) if end else (None, None, 1.0, 1.0)),
        *(tokens, channels, *x_BNC.stride()[:2], _stride(shift), _stride(scale), eps),
        **(end.constants() if end else VALUES),
        CHUNK=chunk,
        CHUNKS=count,
        FULL=count * chunk == channels,
        num_warps=warps(chunk, 256),
        # The compiler would take registers that leave fewer programs on a multiprocessor.
        maxnreg=ROW_REGISTERS if end and end.form == "row" else None,
    )


def _gradients(grad: Tensor, x: Tensor, weight: Operand, scale: Operand, eps: float) -> tuple[Tensor, Any, Any]:
    """dx; and with parameters, the sums over the tokens of each sample, fp32 [B, C], of the gradient and of the
    gradient times the normed row, from which those of all parameters follow.
    """
    grad_BNC, x_BNC, scale = stream(grad), stream(x), dense(scale)
    samples, tokens, channels = x_BNC.shape
    dx = new(x)
    sums = [] if weight is None and scale is None else [partial_sums(x_BNC), partial_sums(x_BNC)]
    if x.numel():
        block, chunks = triton.next_power_of_2(channels), triton.cdiv(tokens, ROWS)
        _differentiate[(samples * chunks,)](
            *(grad_BNC, x_BNC, dense(weight), scale, dx, *(sums or (None, None)), tokens, channels, chunks),
            *(*grad_BNC.stride()[:2], *x_BNC.stride()[:2], _stride(scale), eps),
            ROWS=ROWS,
            BLOCK=block,
            num_warps=warps(block),
        )
    grad_sum, normed_sum = (total.sum(1) for total in sums) if sums else (None, None)
    return dx, grad_sum, normed_sum


def _stride(of_samples: Operand) -> int:
    return 0 if of_samples is None else of_samples.stride(0)


@triton.jit
def _normalize(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    row_scale_ptr,
    table_ptr,
    scale_max,
    unit,
    tokens,
    channels,
    sample_stride,
    token_stride,
    shift_stride,
    scale_stride,
    eps,
    FORM: tl.constexpr,
    SHIFT: tl.constexpr,
    BELOW_16: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
):
    row = tl.program_id(0)
    sample, token = row // tokens, row % tokens
    column = tl.arange(0, CHUNK)
    start = row_of(x_ptr, sample, token, sample_stride, token_stride)
    total = tl.zeros([CHUNK], tl.float32)
    kept = ()  # as it was read: half the registers of fp32
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + column
        x = tl.load(start + at, mask=at < channels, other=0.0)
        kept += (x,)
        total += widened(x)
    mean = mean_of(tl.sum(total), channels)
    total = tl.zeros([CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        centred = within(widened(kept[i]) - mean, i * CHUNK + column, channels, FULL)
        total += centred * centred
    inverse = inverse_root(mean_of(tl.sum(total), channels) + eps)
    shift_row = shift_ptr if shift_ptr is None else row_of(shift_ptr, sample, 0, shift_stride, 0)
    scale_row = scale_ptr if scale_ptr is None else row_of(scale_ptr, sample, 0, scale_stride, 0)
    out_row = row_of(out_ptr, 0, row, 0, channels)
    if FORM == "shared":
        shared = tl.load(row_scale_ptr)
    largest = tl.zeros([CHUNK], x_ptr.dtype.element_ty)
    results = ()  # in place of what was read
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + column
        y = (widened(kept[i]) - mean) * inverse
        out = _affine(y, at, at < channels, weight_ptr, bias_ptr, shift_row, scale_row).to(x_ptr.dtype.element_ty)
        if FORM == "values":
            tl.store(out_row + at, out, mask=at < channels)
        elif FORM == "shared":
            codes = codes_of(widened(out), shared, table_ptr, SHIFT, BELOW_16)
            tl.store(out_row + at, codes, mask=at < channels)
        else:
            results += (out,)
            largest = larger_magnitude(largest, within(out, at, channels, FULL))
    if FORM == "amax":
        tl.store(row_scale_ptr + row, amax_in(largest))
    elif FORM == "row":
        of_row = own_scale(largest, row, row_scale_ptr, scale_max, unit, POWER_OF_TWO)
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            codes = codes_of(widened(results[i]), of_row, table_ptr, SHIFT, BELOW_16)
            tl.store(out_row + at, codes, mask=at < channels)


@triton.jit
def _affine(y, at, inside, weight_ptr, bias_ptr, shift_row, scale_row):
    """A chunk of a normalized row with weight and bias, and modulated, in fp32."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = y * weight + tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if scale_row is not None:
        scale = tl.load(scale_row + at, mask=inside, other=0.0).to(tl.float32)
        y = y * (1 + scale) + tl.load(shift_row + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _differentiate(
    grad_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    dx_ptr,
    grad_sum_ptr,
    normed_sum_ptr,
    tokens,
    channels,
    chunks,
    grad_sample_stride,
    grad_token_stride,
    sample_stride,
    token_stride,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = program // chunks, (program % chunks).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if weight_ptr is not None:
        factor = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(row_of(scale_ptr, sample, 0, scale_stride, 0) + column, mask=inside, other=0.0)
        factor *= 1 + scale.to(tl.float32)
    grad_sum = tl.zeros([BLOCK], tl.float32)
    normed_sum = tl.zeros([BLOCK], tl.float32)
    grad_start = row_of(grad_ptr, sample, first, grad_sample_stride, grad_token_stride)
    x_start = row_of(x_ptr, sample, first, sample_stride, token_stride)
    next_grad = tl.load(grad_start + column, mask=inside, other=0.0)
    next_x = tl.load(x_start + column, mask=inside, other=0.0)
    token = first
    while token < last:
        grad, x = next_grad.to(tl.float32), next_x.to(tl.float32)
        # One row ahead, so that loads do not wait for the sums of this one.
        ahead = tl.minimum(token + 1, last - 1)
        grad_start = row_of(grad_ptr, sample, ahead, grad_sample_stride, grad_token_stride)
        x_start = row_of(x_ptr, sample, ahead, sample_stride, token_stride)
        next_grad = tl.load(grad_start + column, mask=inside, other=0.0)
        next_x = tl.load(x_start + column, mask=inside, other=0.0)
        centred = tl.where(inside, x - mean_of(tl.sum(x), channels), 0.0)
        inverse = inverse_root(mean_of(tl.sum(centred * centred), channels) + eps)
        normed = centred * inverse
        grad_sum += grad
        normed_sum += grad * normed
        scaled = grad * factor
        along = mean_of(tl.sum(scaled * normed), channels)
        dx = inverse * (scaled - mean_of(tl.sum(scaled), channels) - normed * along)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(row_of(dx_ptr, 0, sample * tokens + token, 0, channels) + column, dx, mask=inside)
        token += 1
    if grad_sum_ptr is not None:
        tl.store(row_of(grad_sum_ptr, 0, program, 0, channels) + column, grad_sum, mask=inside)
        tl.store(row_of(normed_sum_ptr, 0, program, 0, channels) + column, normed_sum, mask=inside)
