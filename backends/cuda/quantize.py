"""`cuda.triton`: scaled quantization to HiFloat8 in two passes, one for the scale and one for the codes."""

from __future__ import annotations

from torch import Tensor

from ospnext.numerics.scaling import Granularity, ScaleMode, amax_of, scale_of

from .kernels.hif8 import fake_quantize_rows, quantize_rows


def quantize(
    x: Tensor, amax: Tensor | None, *, scale_max: float, scale_mode: ScaleMode, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """(codes, scale)."""
    scale = scale_of(amax_of(x, granularity) if amax is None else amax, scale_max, scale_mode)
    return quantize_rows(x, scale), scale


def fake_quantize(
    x: Tensor, amax: Tensor | None, *, scale_max: float, scale_mode: ScaleMode, granularity: Granularity
) -> Tensor:
    """The values that `quantize` stands for, in the dtype of x."""
    scale = scale_of(amax_of(x, granularity) if amax is None else amax, scale_max, scale_mode)
    return fake_quantize_rows(x, scale)
