"""Small models for HiF8, and a record of the codes that a run makes. No oracle lives here."""

from __future__ import annotations

import torch
from small_models import SMALL, random_model, sparse
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext.models import OSPNextTransformer
from ospnext.models.quantization import QuantPolicy

ALL = QuantPolicy("hif8", "hif8")
#: Of a result: one rounding of it, or those of an fp32 or fp64 sum.
BOUNDS = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6, torch.float64: 1e-13}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small(dtype: torch.dtype = torch.float32, layers: int = 2, k: int = 1) -> OSPNextTransformer:
    """Two blocks, dense or one of each sparse kind."""
    config = SMALL.replace(num_layers=layers)
    return random_model(sparse(config, k=k, num_full_blocks=0) if k > 1 else config, dtype=dtype)


class Calls(TorchDispatchMode):
    """Results of every hif8_quantize: (codes, scale_max)."""

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[tuple[Tensor, float]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.ospnext.hif8_quantize.default:
            self.codes.append((out[0], args[2]))
        return out
