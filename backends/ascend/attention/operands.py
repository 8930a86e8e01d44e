"""What the vendor's kernels ask of their operands, where the contract says otherwise."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(t: Tensor) -> Tensor:
    """t without gaps: some of these kernels refuse others, the rest would copy them themselves."""
    return t.detach().contiguous()


def without_zero(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q, scale) with the same logits, and no scale of 0, which is beyond what the vendor documents."""
    return (torch.zeros_like(q), 1.0) if scale == 0 else (q, scale)
