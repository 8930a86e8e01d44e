"""How an emulated operator says no: every refusal names the operator, the rule of the vendor's documents and what was
found. Only what the documents refuse, and what is not emulated, is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor


class Refused(RuntimeError):
    """The operator does not take this call; the text says which rule forbids it."""


def require(op: str, allowed: bool, rule: str, got: object = None) -> None:
    """Raise `Refused` unless `allowed`."""
    if not allowed:
        raise Refused(f"npu::{op}: {rule}" + ("" if got is None else f"; got {got}"))


def is_950() -> bool:
    """Whether the NPU that is played is an Ascend 950; else it is one of the generations before, 910B and 910C."""
    return (os.environ.get("HOST_NPU_SOC") or "Ascend950").startswith("Ascend950")


def require_absent(op: str, **arguments: object) -> None:
    """Refuse arguments that are not emulated, so that none is ignored."""
    given = [name for name, value in arguments.items() if value is not None]
    require(op, not given, "these arguments are not emulated", ", ".join(given))


def require_dtype(op: str, name: str, tensor: Tensor, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse a tensor of another dtype. The device has no fp64 at all."""
    allowed = tuple(dtypes)
    words = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    require(op, tensor.dtype in allowed, f"{name} is {words}", tensor.dtype)


def require_shape(op: str, name: str, tensor: Tensor, *shapes: Iterable[int]) -> None:
    """Refuse a tensor whose shape is none of `shapes`."""
    allowed = [list(shape) for shape in shapes]
    words = " or ".join(map(str, allowed))
    require(op, list(tensor.shape) in allowed, f"{name} has shape {words}", list(tensor.shape))
