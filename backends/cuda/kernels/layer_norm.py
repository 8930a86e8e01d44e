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
    sum_three,
    within,
    write,
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
    if weight is not None and bias is not None:
        if scale is not None:
            grad_sum, normed_sum = (total * (1 + scale.float()) for total in (grad_sum, normed_sum))
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
    chunk, count, num_warps = chunks(channels)
    _normalize[(samples * tokens,)](
        *(x_BNC, dense(weight), dense(bias), shift, scale, out),
        *((end.scale, end.table, end.scale_max, end.unit) if end else (None, None, 1.0, 1.0)),
        *(tokens, channels, *x_BNC.stride()[:2], _stride(shift), _stride(scale), eps),
        **(end.constants() if end else VALUES),
        CHUNK=chunk,
        CHUNKS=count,
        FULL=channels // chunk,
        ONE_SAMPLE=samples == 1,
        num_warps=num_warps,
    )


def _gradients(grad: Tensor, x: Tensor, weight: Operand, scale: Operand, eps: float) -> tuple[Tensor, Any, Any]:
    """dx; and with parameters, the sums over the tokens of each sample, fp32 [B, C], of the gradient and of the
    gradient times the normed row, from which those of all parameters follow.
    """
    grad_BNC, x_BNC, scale = stream(grad), stream(x), dense(scale)
    samples, tokens, channels = x_BNC.shape
    dx = new(x)
    sums = None if weight is None and scale is None else partial_sums(x_BNC, 2)
    if x.numel():
        programs = triton.cdiv(tokens, ROWS)
        chunk, stages, options = of_gradient(x_BNC)
        _differentiate[(samples * programs,)](
            *(grad_BNC, x_BNC, dense(weight), scale, dx, *((None, None) if sums is None else sums)),
            *(tokens, channels, programs, *grad_BNC.stride()[:2], *x_BNC.stride()[:2], _stride(scale), eps),
            ROWS=ROWS,
            CHUNK=chunk,
            CHUNKS=triton.cdiv(channels, chunk),
            FULL=channels // chunk,
            STAGES=stages,
            **options,
        )
    return dx, *((None, None) if sums is None else sums.sum(2))


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
    ONE_SAMPLE: tl.constexpr,
):
    row = tl.program_id(0)
    sample, token = place(row, tokens, ONE_SAMPLE)
    column = tl.arange(0, CHUNK)
    start = row_of(x_ptr, sample, token, sample_stride, token_stride)
    total = tl.zeros([CHUNK], tl.float32)
    rows = ()
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + column
        rows += (widened(read(start + at, at < channels, i < FULL)),)
        total += rows[i]
    mean = mean_of(tl.sum(total), channels)
    total = tl.zeros([CHUNK], tl.float32)
    centred = ()
    for i in tl.static_range(CHUNKS):
        centred += (within(rows[i] - mean, i * CHUNK + column, channels, i < FULL),)
        total += centred[i] * centred[i]
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
        y = _affine(centred[i], inverse, at, at < channels, i < FULL, weight_ptr, bias_ptr, shift_row, scale_row)
        out = y.to(x_ptr.dtype.element_ty)
        if FORM == "values":
            write(out_row + at, out, at < channels, i < FULL)
        elif FORM == "shared":
            codes = codes_of(out, shared, table_ptr, SHIFT, BELOW_16)
            write(out_row + at, codes, at < channels, i < FULL)
        else:
            results += (out,)
            largest = larger_magnitude(largest, within(out, at, channels, i < FULL))
    if FORM == "amax":
        tl.store(row_scale_ptr + row, amax_in(largest))
    elif FORM == "row":
        of_row = own_scale(largest, row, row_scale_ptr, scale_max, unit, POWER_OF_TWO)
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            codes = codes_of(results[i], of_row, table_ptr, SHIFT, BELOW_16)
            write(out_row + at, codes, at < channels, i < FULL)


@triton.jit
def _affine(x, inverse, at, inside, FULL: tl.constexpr, weight_ptr, bias_ptr, shift_row, scale_row):
    """A centred chunk times the inverse deviation, with weight and bias, and modulated, in fp32. Factors first: that
    is an instruction less for each number.
    """
    if weight_ptr is not None:
        bias = widened(read(bias_ptr + at, inside, FULL))
        y = tl.fma(x, inverse * widened(read(weight_ptr + at, inside, FULL)), bias)
        if scale_row is not None:
            scale, shift = widened(read(scale_row + at, inside, FULL)), widened(read(shift_row + at, inside, FULL))
            y = tl.fma(y, 1 + scale, shift)
    elif scale_row is not None:
        scale, shift = widened(read(scale_row + at, inside, FULL)), widened(read(shift_row + at, inside, FULL))
        y = tl.fma(x, tl.fma(inverse, scale, inverse), shift)
    else:
        y = x * inverse
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
    programs,
    grad_sample_stride,
    grad_token_stride,
    sample_stride,
    token_stride,
    scale_stride,
    eps,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    sample, first = program // programs, (program % programs).to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, tokens)
    column = tl.arange(0, CHUNK)
    factors, grad_sums, normed_sums = (), (), ()
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + column
        factor = tl.full([CHUNK], 1.0, tl.float32)
        if weight_ptr is not None:
            factor = read(weight_ptr + at, at < channels, i < FULL).to(tl.float32)
        if scale_ptr is not None:
            scale_row = row_of(scale_ptr, sample, 0, scale_stride, 0)
            factor *= 1 + read(scale_row + at, at < channels, i < FULL).to(tl.float32)
        factors += (factor,)
        grad_sums += (tl.zeros([CHUNK], tl.float32),)
        normed_sums += (tl.zeros([CHUNK], tl.float32),)
    for token in tl.range(first, last, num_stages=STAGES):
        grad_row = row_of(grad_ptr, sample, token, grad_sample_stride, grad_token_stride)
        x_row = row_of(x_ptr, sample, token, sample_stride, token_stride)
        total = tl.zeros([CHUNK], tl.float32)
        rows, grads = (), ()
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            rows += (read(x_row + at, at < channels, i < FULL).to(tl.float32),)
            grads += (read(grad_row + at, at < channels, i < FULL).to(tl.float32),)
            total += rows[i]
        mean = mean_of(tl.sum(total), channels)
        squares = tl.zeros([CHUNK], tl.float32)
        scaled_total = tl.zeros([CHUNK], tl.float32)
        along = tl.zeros([CHUNK], tl.float32)
        centred = ()
        for i in tl.static_range(CHUNKS):
            centred += (within(rows[i] - mean, i * CHUNK + column, channels, i < FULL),)
            squares += centred[i] * centred[i]
            # Not of grad * factor, which dx computes anew: kept from here to there, it takes registers that sums need.
            scaled_total = tl.fma(grads[i], factors[i], scaled_total)
            along += grads[i] * centred[i] * factors[i]
        squares, scaled_total, along = sum_three(squares, scaled_total, along)
        inverse = inverse_root(mean_of(squares, channels) + eps)
        shift, slope = mean_of(scaled_total, channels), mean_of(along, channels) * inverse
        dx_row = row_of(dx_ptr, 0, sample * tokens + token, 0, channels)
        more_grad, more_normed = (), ()
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            normed = centred[i] * inverse
            more_grad += (grad_sums[i] + grads[i],)
            more_normed += (normed_sums[i] + grads[i] * normed,)
            dx = inverse * (grads[i] * factors[i] - (normed * slope + shift))
            write(dx_row + at, dx, at < channels, i < FULL)
        grad_sums, normed_sums = more_grad, more_normed
    if grad_sum_ptr is not None:
        for i in tl.static_range(CHUNKS):
            at = i * CHUNK + column
            write(row_of(grad_sum_ptr, 0, program, 0, channels) + at, grad_sums[i], at < channels, i < FULL)
            write(row_of(normed_sum_ptr, 0, program, 0, channels) + at, normed_sums[i], at < channels, i < FULL)
