"""`cuda.triton`: scaled quantization to HiFloat8 in two passes, one for the scale and one for the codes; in one where
each row has its scale.
"""

from __future__ import annotations

from torch import Tensor

from ospnext.numerics.carrier import carried_scale, shift_for
from ospnext.numerics.scaling import Granularity, ScaleMode, amax_of, scale_of

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
    scale = scale_of(amax_of(x, granularity) if amax is None else amax, scale_max, scale_mode)
    if not carried:
        return quantize_rows(x, scale), scale
    shift = shift_for(scale_max)
    return quantize_rows(x, scale, shift), carried_scale(scale, shift)


def fake_quantize(
    x: Tensor, amax: Tensor | None, *, scale_max: float, scale_mode: ScaleMode, granularity: Granularity
) -> Tensor:
    """The values that `quantize` stands for, in the dtype of x."""
    scale = scale_of(amax_of(x, granularity) if amax is None else amax, scale_max, scale_mode)
    return fake_quantize_rows(x, scale)
