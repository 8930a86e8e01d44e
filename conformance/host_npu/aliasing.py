"""Tensors of the host NPU as CPU tensors over the same memory, and back. Its memory is host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
DEVICE_TYPE = "npu"

_storage_at = torch._C._construct_storage_from_data_pointer
_is_dense = torch.ops.aten.is_non_overlapping_and_dense.default


def on_cpu(tensor: Tensor) -> Tensor:
    """A CPU tensor of the same values in the same memory. It owns nothing: it must not outlive `tensor`."""
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if not size:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)
    alias = torch.empty(0, dtype=tensor.dtype, device=CPU)
    memory: Any = _storage_at(storage.data_ptr(), CPU, size)
    alias.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())
    if tensor.is_conj():
        torch._C._set_conj(alias, True)
    if tensor.is_neg():
        torch._C._set_neg(alias, True)
    return alias


def on_host(tensor: Tensor) -> Tensor:
    """`on_cpu` of a tensor of the device; one that is on the host already, as it is."""
    return on_cpu(tensor) if tensor.device.type == DEVICE_TYPE else tensor


def on_device(result: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor in memory of the device, with its strides where they describe dense memory."""
    if not _is_dense(result):
        result = result.contiguous()
    copy = torch.empty_strided(result.size(), result.stride(), dtype=result.dtype, device=device)
    on_cpu(copy).copy_(result)
    return copy
