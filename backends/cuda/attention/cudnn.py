"""`cuda.cudnn`: cuDNN's fused attention through PyTorch, forward only.

Its backward pass returns NaN for some lengths where logits are near -120
(https://github.com/pytorch/pytorch/issues/196678), so that no gradient is asked of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .masked import without_zero
from .operands import aligned
from .spans import spans


class Cudnn:
    """Dense calls as they are; of packed ones a call per sequence, which pays where sequences are few and long."""

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        q, scale = without_zero(q, scale)
        q, k, v = (aligned(t) for t in (q, k, v))
        if cu_seqlens_q is None:
            out, lse = _dense(q, k, v, scale, need_lse)
            return out, lse if need_lse else q.new_empty(0, dtype=torch.float32)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32, device=q.device)
        for rows, keys in zip(spans(cu_seqlens_q), spans(cu_seqlens_kv), strict=True):
            if rows.start == rows.stop:
                continue
            if keys.start == keys.stop:
                out[rows] = 0
                continue
            part, lse_part = _dense(q[None, rows], k[None, keys], v[None, keys], scale, need_lse)
            out[rows] = part[0]
            if need_lse:
                lse[:, rows] = lse_part[0]
        return out, lse if need_lse else lse.new_empty(0)


def _dense(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float, need_lse: bool) -> tuple[Tensor, Tensor]:
    heads_first = (t.transpose(1, 2) for t in (q_BSHD, k_BSHD, v_BSHD))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, need_lse, 0.0, False, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.squeeze(-1) if need_lse else lse


cudnn = Cudnn()
