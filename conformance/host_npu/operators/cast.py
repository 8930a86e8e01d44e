"""npu_dtype_cast to and from HiFloat8, without a scale, and the casts between torch's dtypes that autograd calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import FLOATS, HIFLOAT8, decoded, encoded, require_codes, require_hifloat8, torch_dtype
from .rules import require, require_dtype


def npu_dtype_cast(input: Tensor, dtype: int, input_dtype: int | None = None) -> Tensor:
    """HiFloat8 codes of input if `dtype` is 290, values of codes if `input_dtype` is; else input in another dtype."""
    return _cast("npu_dtype_cast", input, dtype, input_dtype)


def npu_dtype_cast_backward(
    grad: Tensor, dtype: torch.dtype, grad_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The gradient in the dtype that the input of the cast had."""
    op = "npu_dtype_cast_backward"
    require(
        op, HIFLOAT8 not in (grad_dtype, input_dtype), "a cast of HiFloat8 has no gradient", (grad_dtype, input_dtype)
    )
    return _cast(op, grad, dtype, None)


def _npu_dtype_cast(input: Tensor, dtype: torch.dtype) -> Tensor:
    return _cast("_npu_dtype_cast", input, dtype, None)


def _npu_dtype_cast_backward(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return _cast("_npu_dtype_cast_backward", grad, dtype, None)


def _cast(op: str, x: Tensor, dtype: int | torch.dtype, input_dtype: int | None) -> Tensor:
    if HIFLOAT8 in (dtype, input_dtype):
        require_hifloat8(op, "HiFloat8", HIFLOAT8)
    if input_dtype == HIFLOAT8:
        require_codes(op, "input", x)
        to = torch_dtype(op, "dtype", dtype)
        require(op, to in FLOATS, "HiFloat8 becomes float16, bfloat16 or float32", to)
        return decoded(x).to(to)
    require(op, input_dtype is None, "only HiFloat8 is emulated as input_dtype", input_dtype)
    if dtype == HIFLOAT8:
        require_dtype(op, "input", x, FLOATS)
        return encoded(x)
    to = torch_dtype(op, "dtype", dtype)
    require(op, torch.float64 not in (x.dtype, to), "the device has no float64", (x.dtype, to))
    return x.to(to)


KERNELS: dict[str, Callable] = {
    "npu_dtype_cast": npu_dtype_cast,
    "npu_dtype_cast_backward": npu_dtype_cast_backward,
    "_npu_dtype_cast": _npu_dtype_cast,
    "_npu_dtype_cast_backward": _npu_dtype_cast_backward,
}
