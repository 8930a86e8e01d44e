"""HiFloat8 operands of attention: codes, a scale for each block as the vendor's kernels take them, and the mean of v
that stays outside. What is common to the implementations of native_attention is here, and no kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quantize import decode, quantize
from . import packs
from .operands import dense, without_zero


class NativeAttention:
    """Dense calls as they are; of packed ones a call per sequence, since these kernels take no packs.

    v loses the mean of each channel and the result gets it back, as the contract says: probabilities and the result
    have few bits."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q,
        max_seqlen_kv,
        scale,
        scale_max,
        scale_mode,
        amax,
    ) -> Tensor:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        if not v.numel():
            return out
        q, scale = without_zero(q, scale)
        settings: dict[str, Any] = {"scale_max": scale_max, "scale_mode": scale_mode, "granularity": "tensor"}
        given = amax or (None, None)
        mean = v.detach().float().flatten(0, -3).mean(0)
        operands = [quantize(dense(t), a, **settings) for t, a in zip((q, k), given, strict=True)]
        operands.append(quantize(dense(v).float() - mean, None, **settings))
        (q8, k8, v8), scales = zip(*operands, strict=True)
        # The mean of v less that of what rounding left. A scale that is NaN makes the result NaN, whatever a kernel
        # makes of it.
        centre = mean - decode(v8, torch.float32).flatten(0, -3).mean(0) * scales[2].reshape(())
        centre = centre + 0.0 * sum(s.reshape(()) for s in scales)
        if cu_seqlens_q is None:
            return (self.call(q8, k8, v8, scales, scale).float() + centre).to(q.dtype)
        for rows, keys in packs.pack(q, k, cu_seqlens_q, cu_seqlens_kv):
            part = self.call(q8[None, rows], k8[None, keys], v8[None, keys], scales, scale)[0]
            out[rows] = (part.float() + centre).to(q.dtype)
        return out

    def call(self, q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, ...], scale: float) -> Tensor:
        """bf16 [B, S, H, D] from codes [B, S, H, D] and the scale of each tensor."""
        raise NotImplementedError


def of_blocks(scale: Tensor, codes_BSHD: Tensor, block: int) -> Tensor:
    """fp32 [B, H, ceil(S / block), 1] for a tensor with one scale."""
    batch, length, heads, _ = codes_BSHD.shape
    return scale.reshape(1, 1, 1, 1).expand(batch, heads, -(-length // block), 1).contiguous()
