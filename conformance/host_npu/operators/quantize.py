"""npu_quantize and npu_dynamic_quant: HiFloat8 codes with a given scale, and with the scale of the largest magnitude.

Sources: torch_npu's pages of the operators, CANN's pages of aclnnQuantize, aclnnAscendQuantV3 and aclnnDynamicQuantV4.
The pages do not say how the cast treats what is too large or not finite; the published kernels saturate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import FLOATS, HALVES, require_hifloat8, saturated
from .rules import require, require_absent, require_dtype, require_shape

#: Largest HiFloat8 value; what dst_type_max 0 means.
LARGEST = 32768.0


def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """Codes of input / scales + zero_points, or of input * scales + zero_points if not `div_mode`.

    `scales` has one element, or one for each place along `axis`.
    """
    op = "npu_quantize"
    require_hifloat8(op, "only HiFloat8 is emulated (dtype 290)", dtype)
    require_dtype(op, "input", input, FLOATS)
    require(op, 1 <= input.ndim <= 8, "input has 1 to 8 dimensions", input.ndim)
    require(op, -input.ndim <= axis < input.ndim, f"axis is within {input.ndim} dimensions", axis)
    if div_mode:
        allowed = FLOATS if input.dtype == torch.float32 else (input.dtype,)
        require_dtype(op, f"scales for {input.dtype} input", scales, allowed)
    else:
        require_dtype(op, f"scales for {input.dtype} input", scales, (input.dtype,))
        require(op, axis % input.ndim >= input.ndim - 2, "axis is one of the last two if div_mode is False", axis)
    size = input.shape[axis]
    shapes: list[tuple[int, ...]] = [(1,), (size,)]
    if not div_mode:
        for along in (1, size):
            shapes.append(tuple(along if dim == axis % input.ndim else 1 for dim in range(input.ndim)))
    require_shape(op, "scales", scales, *shapes)
    if zero_points is not None:
        require_shape(op, "zero_points", zero_points, scales.shape)
    along = [1] * input.ndim
    if scales.numel() > 1:
        along[axis] = size
    factor = scales.float().view(along)
    x = input.float()
    y = x / factor if div_mode else x * factor
    if zero_points is not None:
        y = y + zero_points.float().view(along)
    return saturated(y)


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(codes of input / scale, scale = largest magnitude / dst_type_max in fp32).

    The scale is [1] (pertensor), without the last dimension (pertoken) or without the last but one (perchannel). It is
    a product with 1 / dst_type_max, as in the published kernels. Nothing is done about zeros, whose scale is 0.
    """
    op = "npu_dynamic_quant"
    require_hifloat8(op, "only HiFloat8 is emulated (dst_type 290; None is int8)", dst_type)
    require_absent(op, smooth_scales=smooth_scales, group_index=group_index)
    require_dtype(op, "input", input, HALVES)
    require(op, 2 <= input.ndim <= 8, "input has 2 to 8 dimensions", input.ndim)
    require(op, 0 <= dst_type_max <= LARGEST, f"dst_type_max is 0 to {LARGEST:.0f}", dst_type_max)
    require(op, quant_mode in ("pertoken", "pertensor", "perchannel"), "quant_mode", quant_mode)
    require(op, input.numel() > 0, "input is not empty")
    dims = {"pertensor": tuple(range(input.ndim)), "pertoken": (-1,), "perchannel": (-2,)}[quant_mode]
    # NaN wins over any number, as in the device's maximum.
    amax = input.abs().amax(dims, keepdim=True).float()
    scale = amax * (1 / torch.full((), dst_type_max or LARGEST))
    codes = saturated(input.float() / scale)
    return codes, scale.reshape(1) if quant_mode == "pertensor" else scale.squeeze(dims[0])


KERNELS: dict[str, Callable] = {"npu_quantize": npu_quantize, "npu_dynamic_quant": npu_dynamic_quant}
