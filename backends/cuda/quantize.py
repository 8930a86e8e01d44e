"""`cuda.triton`: scaled quantization to HiFloat8 in two passes, one for the scale and one for the codes; in one where
each row has its scale.
"""

from __future__ import annotations

from torch import Tensor

from ospnext.numerics.carrier import carried_scale, shift_for
from ospnext.numerics.scaling import Granularity, ScaleMode, amax_of, scale_of

from .kernels.amax import amax_of_all
from .kernels.hif8 import fake_quantize_rows, quantize_rows
from .kernels.quantize_rows import quantize_by_row
from .predicates import LONGEST_ROW


def quantize(
    x: Tensor,
    amax: Tensor | None,
    *,
    scale_max: float,
    scale_mode: ScaleMode,
    granularity: Granularity,
    carried: bool = False,
) -> tuple[Tensor, Tensor]:
    """(codes, scale)."""
    if granularity == "row" and amax is None and x.shape[-1] <= LONGEST_ROW:
        return quantize_by_row(x, scale_max, scale_mode, carried)
    scale = _scale(x, amax, scale_max, scale_mode, granularity)
    if not carried:
        return quantize_rows(x, scale), scale
    shift = shift_for(scale_max)
    below_16 = amax is None and shift == shift_for(15.0) and scale_max < 15.99
    return quantize_rows(x, scale, shift, below_16), carried_scale(scale, shift)


def fake_quantize(
    x: Tensor, amax: Tensor | None, *, scale_max: float, scale_mode: ScaleMode, granularity: Granularity
) -> Tensor:
    """The values that `quantize` stands for, in the dtype of x."""
    scale = _scale(x, amax, scale_max, scale_mode, granularity)
    return fake_quantize_rows(x, scale)


def _scale(x: Tensor, amax: Tensor | None, scale_max: float, scale_mode: ScaleMode, granularity: Granularity) -> Tensor:
    if amax is None:
        amax = amax_of_all(x) if granularity == "tensor" else amax_of(x, granularity)
    return scale_of(amax, scale_max, scale_mode)
