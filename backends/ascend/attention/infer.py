"""`ascend.infer`: npu_fused_infer_attention_score_v2, which has no gradient and no use for a key mask here.

It gives the logsumexp of the contract on request; that of a row without keys, +inf, does not occur: such rows are not
handed to it."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu  # noqa: F401  (defines torch.ops.npu)
from torch import Tensor

from . import packs
from .operands import dense, without_zero


class Infer:
    """Dense calls as [B, S, H, D], packed ones as [T, H, D]."""

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        q, scale = without_zero(q, scale)
        q, k, v = (dense(t) for t in (q, k, v))
        if cu_seqlens_q is None:
            out, lse = self.call(q, k, v, "BSND", scale, need_lse)
            return out, lse.squeeze(-1) if need_lse else lse
        pack = packs.pack(q, k, cu_seqlens_q, cu_seqlens_kv)
        if len(pack):
            operands = (pack.q.take(q), pack.kv.take(k), pack.kv.take(v))
            ends = {"actual_seq_qlen": pack.q.ends, "actual_seq_kvlen": pack.kv.ends}
            out, lse_TH1 = self.call(*operands, "TND", scale, need_lse, **ends)
        else:
            out, lse_TH1 = q[:0], q.new_empty((0, q.shape[1], 1), dtype=torch.float32)
        out = pack.q.put(out)
        return out, pack.q.put(lse_TH1.squeeze(-1).T.contiguous(), -torch.inf, dim=1) if need_lse else lse_TH1

    def call(
        self, q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, need_lse: bool, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """(out, logsumexp, or an empty tensor)."""
        heads = q.shape[-2]
        out, lse = torch.ops.npu.npu_fused_infer_attention_score_v2(
            q, k, v, num_query_heads=heads, num_key_value_heads=heads, input_layout=layout, softmax_scale=scale,
            return_softmax_lse=need_lse, **more,
        )  # fmt: skip
        return out, lse if need_lse else q.new_empty(0, dtype=torch.float32)


infer = Infer()
