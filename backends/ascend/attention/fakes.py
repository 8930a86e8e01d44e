"""Fake kernels that the wheel lacks: its own for npu_quant_fusion_attention raises NameError. They say shapes and
dtypes as the operator's C++ allocates them.
"""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401  (defines torch.ops.npu)
from torch import Tensor

#: Keeps the registration alive.
_LIBRARY = torch.library.Library("npu", "IMPL")


def quant_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **scales: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """(out bf16 as query, two statistics fp32 [B, H, S, 1], an empty tensor, and three numbers for dropout)."""
    if input_layout != "BSND":
        raise ValueError(f"npu_quant_fusion_attention takes BSND; got {input_layout}")
    statistics = query.new_empty((query.shape[0], head_num, query.shape[1], 1), dtype=torch.float32)
    out = torch.empty(query.shape, dtype=torch.bfloat16, device=query.device)
    return out, statistics, torch.empty_like(statistics), out.new_empty(0), 0, 0, 0


_LIBRARY.impl("npu_quant_fusion_attention", quant_fusion_attention, "Meta", allow_override=True)
