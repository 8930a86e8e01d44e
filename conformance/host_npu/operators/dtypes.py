"""Numbers that stand for dtypes in the operators' `int` arguments, and HiFloat8 codes as the operators see them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ospnext.numerics import hif8

from .rules import is_950, require

#: `torch_npu.hifloat8`: a plain int, since torch has no such dtype. Codes are stored as uint8, or int8.
HIFLOAT8 = 290

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)

#: torch's own enumeration, which is what a torch.dtype becomes when it is passed for an int.
_BY_NUMBER = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    11: torch.bool,
    15: torch.bfloat16,
}


def torch_dtype(op: str, name: str, number: int | torch.dtype) -> torch.dtype:
    """The torch.dtype that `number` stands for."""
    if isinstance(number, torch.dtype):
        return number
    require(op, number in _BY_NUMBER, f"{name} is not emulated for this dtype", number)
    return _BY_NUMBER[number]


def require_hifloat8(op: str, rule: str, *numbers: object) -> None:
    """Refuse an operator of HiFloat8 that was asked for something else, and on an NPU that does not have it."""
    require(op, all(number == HIFLOAT8 for number in numbers), rule, ", ".join(map(str, numbers)))
    require(op, is_950(), "HiFloat8 is of Ascend 950 only", os.environ.get("HOST_NPU_SOC"))


def require_codes(op: str, name: str, codes: Tensor) -> None:
    """Refuse what cannot hold HiFloat8 codes."""
    require(op, codes.dtype in (torch.uint8, torch.int8), f"{name} holds codes, one byte each", codes.dtype)


def decoded(codes: Tensor) -> Tensor:
    """Values of HiFloat8 codes in fp32, exact; contiguous."""
    return hif8.decode(codes.view(torch.uint8))


def encoded(x: Tensor) -> Tensor:
    """HiFloat8 codes of x, halves away from zero: the cast that CANN calls CAST_ROUND, without saturation."""
    return hif8.encode(x)


def saturated(x: Tensor) -> Tensor:
    """The same cast with saturation: Inf and all that is too large become 32768, and NaN becomes 0."""
    return hif8.encode(x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), saturate=True)
