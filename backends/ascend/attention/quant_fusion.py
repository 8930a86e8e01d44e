"""`ascend.quant_fusion`: npu_quant_fusion_attention, the vendor's HiFloat8 attention for training. Forward only here.

It is made for two shapes, those of one video model on eight NPUs, and takes no other; see predicates.py."""

from __future__ import annotations

import functools

import torch
import torch_npu
from torch import Tensor

from ospnext.numerics.hif8 import INFO

from . import fakes  # noqa: F401  (replaces the vendor's, which raises NameError)
from .hif8 import NativeAttention, of_blocks

#: Tokens that share a scale of q, of k and of v.
BLOCKS = (128, 256, 512)
#: Probabilities relative to the largest of their row, times this, become HiFloat8: the largest that has three bits of
#: mantissa. So have all down to 2^-7 of it.
P_SCALE = INFO.max_of_3_bits


class QuantFusion(NativeAttention):
    def call(self, q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, ...], scale: float) -> Tensor:
        codes = (q, k, v)
        of_q, of_k, of_v = (of_blocks(s, c, block) for s, c, block in zip(scales, codes, BLOCKS, strict=True))
        out, *_ = torch.ops.npu.npu_quant_fusion_attention(
            q, k, v, q.shape[2], "BSND", d_scale_q=of_q, d_scale_k=of_k, d_scale_v=of_v, p_scale=_p_scale(q.device),
            scale=scale, query_dtype=torch_npu.hifloat8,
        )  # fmt: skip
        return out


@functools.cache
def _p_scale(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for callers of every mode
        return torch.full((1,), P_SCALE, dtype=torch.float32, device=device)


quant_fusion = QuantFusion()
