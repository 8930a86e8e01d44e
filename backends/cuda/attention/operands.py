"""What fused kernels ask of the memory of their operands, beyond what the contract asks of callers."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes; kernels load that much at once.
ALIGNMENT = 16


def aligned(t: Tensor) -> Tensor:
    """t, detached, with the last dimension dense and every row on a boundary of 16 bytes: a copy where it is not.

    PyTorch's FlashAttention reads astray otherwise and loses the device."""
    t = t.detach()
    rows = (stride * t.element_size() for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    fits = t.stride(-1) == 1 and t.data_ptr() % ALIGNMENT == 0 and all(row % ALIGNMENT == 0 for row in rows)
    return t if fits else t.clone(memory_format=torch.contiguous_format)
