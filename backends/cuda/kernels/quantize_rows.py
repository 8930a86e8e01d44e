"""HiFloat8 codes of rows of a tensor that is there already, each with a scale of its own, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ospnext.numerics.scaling import ScaleMode

from .row_quantize import End, end_codes, quantized
from .rows import row_of, stream, warps


def quantize_by_row(x: Tensor, scale_max: float, scale_mode: ScaleMode, carried: bool) -> tuple[Tensor, Tensor]:
    """(codes, scale [..., 1])."""

    def run(end: End) -> None:
        x_BNC = stream(x)
        samples, tokens, channels = x_BNC.shape
        block = triton.next_power_of_2(channels)
        _quantize[(samples * tokens,)](
            *(x_BNC, end.codes, end.scale, end.table, end.scale_max, end.unit),
            *(tokens, channels, *x_BNC.stride()[:2]),
            **end.constants(),
            BLOCK=block,
            num_warps=warps(block),
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
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    start = row_of(x_ptr, row // tokens, row % tokens, sample_stride, token_stride)
    x = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    codes = end_codes(x, row, scale_ptr, table_ptr, scale_max, unit, SHIFT, BELOW_16, POWER_OF_TWO)
    tl.store(row_of(codes_ptr, 0, row, 0, channels) + column, codes, mask=inside)
