"""HiFloat8 codes of rows of a tensor that is there already, each with a scale of its own, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics.scaling import ScaleMode

from .ptx import larger_magnitude
from .row_quantize import End, codes_of, own_scale, quantized
from .rows import chunks, place, read, row_of, stream, write


def quantize_by_row(x: Tensor, scale_max: float, scale_mode: ScaleMode, carried: bool) -> tuple[Tensor, Tensor]:
    """(codes, scale [..., 1])."""

    def run(end: End) -> None:
        x_BNC = stream(x)
        samples, tokens, channels = x_BNC.shape
        chunk, count, num_warps = chunks(channels)
        _quantize[(samples * tokens,)](
            *(x_BNC, end.codes, end.scale, end.table, end.scale_max, end.unit),
            *(tokens, channels, *x_BNC.stride()[:2]),
            **end.constants(),
            CHUNK=chunk,
            CHUNKS=count,
            FULL=channels // chunk,
            ONE_SAMPLE=samples == 1,
            num_warps=num_warps,
        )

    return quantized(x, run, scale_max=scale_max, scale_mode=scale_mode, granularity="row", carried=carried)


@triton.jit
def _quantize(
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
    kept = ()  # as it was read: half the registers of fp32
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + column
        x = read(start + at, at < channels, i < FULL)
        kept += (x,)
        largest = larger_magnitude(largest, x)
    scale = own_scale(largest, row, scale_ptr, scale_max, unit, POWER_OF_TWO)
    for i in tl.static_range(CHUNKS):
        at = i * CHUNK + column
        codes = codes_of(kept[i], scale, table_ptr, SHIFT, BELOW_16)
        write(row_of(codes_ptr, 0, row, 0, channels) + at, codes, at < channels, i < FULL)
