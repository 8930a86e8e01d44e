"""Arithmetic of operators that the vendor's front end calls for ordinary `aten::` ones, where a CPU build of PyTorch
has no kernel or one that is coarser than a device: on CPU tensors, by the formulas of the operators they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def matmul_backward(grad: Tensor, x: Tensor, y: Tensor, mask: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of torch.matmul, with its rules for vectors and broadcasting; rows of a matrix are summed at once."""
    rows = x if x.dim() > 1 else x.unsqueeze(0)
    columns = y if y.dim() > 1 else y.unsqueeze(-1)
    if y.dim() == 1:
        grad = grad.unsqueeze(-1)
    if x.dim() == 1:
        grad = grad.unsqueeze(-2)
    if y.dim() <= 2:
        rows, grad = rows.flatten(0, -2), grad.flatten(0, -2)
    grad_x = (grad @ columns.mH).sum_to_size(rows.shape).reshape(x.shape) if mask[0] else None
    grad_y = (rows.mH @ grad).sum_to_size(columns.shape).reshape(y.shape) if mask[1] else None
    return grad_x, grad_y


def gather_backward(grad: Tensor, size: Sequence[int], dim: int, index: Tensor, sparse_grad: bool) -> Tensor:
    if sparse_grad:
        raise NotImplementedError("the host NPU does not emulate sparse gradients of gather")
    return grad.new_zeros(size).scatter_add(dim, index, grad)


def binary_cross_entropy_with_logits_backward(
    grad: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: int
) -> Tensor:
    """Of the three reductions, 1 is the mean."""
    slope = torch.sigmoid(logits) - target
    if pos_weight is not None:
        up = pos_weight * target
        slope = (up + 1 - target) * torch.sigmoid(logits) - up
    slope = slope * grad if weight is None else slope * grad * weight
    return slope / logits.numel() if reduction == 1 else slope


def native_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """In fp32 from bf16 and fp16, rounded once: the CPU kernel adds rows up in 16 bits, also for an fp32 weight."""
    precise = torch.promote_types(x.dtype, torch.float32)
    rows = x.dim() - len(normalized_shape)
    over_rows, over_columns = list(range(rows)), list(range(rows, x.dim()))

    def summed(t: Tensor) -> Tensor:
        return t.sum(over_rows) if over_rows else t

    of_y = grad.to(precise)
    normed = (x.to(precise) - mean.to(precise)) * rstd.to(precise)
    of_normed = of_y if weight is None else of_y * weight.to(precise)
    common = of_normed.mean(over_columns, True) + normed * (of_normed * normed).mean(over_columns, True)
    dx = ((of_normed - common) * rstd.to(precise)).to(x.dtype) if mask[0] else None
    dweight = summed(of_y * normed).to(weight.dtype) if mask[1] and weight is not None else None
    dbias = summed(of_y).to(bias.dtype) if mask[2] and bias is not None else None
    return dx, dweight, dbias


#: `aten::` operators without a CPU kernel, or with one that is coarser than a device.
ATEN: dict[str, Callable[..., Any]] = {
    "matmul_backward": matmul_backward,
    "native_layer_norm_backward": native_layer_norm_backward,
    "mm.dtype": lambda x, y, dtype: torch.mm(x.to(dtype), y.to(dtype)),
    "bmm.dtype": lambda x, y, dtype: torch.bmm(x.to(dtype), y.to(dtype)),
}

#: `npu::` operators in the gradients of `aten::` ones.
NPU: dict[str, Callable[..., Any]] = {
    "npu_gather_backward": gather_backward,
    "npu_binary_cross_entropy_with_logits_backward": binary_cross_entropy_with_logits_backward,
}
