"""HiFloat8 by en_dtypes, which nobody here wrote: codes and values of tensors, for tests."""

from __future__ import annotations

import en_dtypes
import numpy as np
import torch
from torch import Tensor


def _hif8(x: Tensor) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN is cast, with a warning
        return x.detach().float().numpy().astype(en_dtypes.hifloat8)


def codes_of(x: Tensor) -> Tensor:
    """uint8 codes of x, by way of fp32."""
    return torch.from_numpy(_hif8(x).view(np.uint8).copy())


def rounded(x: Tensor) -> Tensor:
    """x on the grid, in fp64."""
    return torch.from_numpy(_hif8(x).astype(np.float64))


def values_of(codes: Tensor) -> Tensor:
    """fp64 values of codes."""
    return torch.from_numpy(codes.numpy().view(en_dtypes.hifloat8).astype(np.float64))
