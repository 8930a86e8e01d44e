"""`ascend.sdpa`: PyTorch's scaled_dot_product_attention, which torch_npu maps to its own kernels. Forward only.

It gives no logsumexp, so that a gradient from (out, logsumexp) would have to run the forward pass again."""

from __future__ import annotations

import torch
import torch_npu  # noqa: F401  (puts its kernels behind PyTorch's function)
from torch import Tensor

from .. import masks
from . import packs
from .operands import dense, without_zero


class Sdpa:
    """Dense calls as they are; of packed ones a call per sequence, which pays where sequences are few and long."""

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        q, scale = without_zero(q, scale)
        q, k, v = (dense(t) for t in (q, k, v))
        if cu_seqlens_q is not None:
            out = torch.zeros_like(q)
            for rows, keys in packs.pack(q, k, cu_seqlens_q, cu_seqlens_kv):
                out[rows] = self.call(q[None, rows], k[None, keys], v[None, keys], None, scale)[0]
        elif key_mask is None:
            out = self.call(q, k, v, None, scale)
        else:
            k, v = (masks.blanked(t, key_mask) for t in (k, v))
            out = self.call(q, k, v, masks.kept(key_mask, q.shape[1]), scale)
            out.masked_fill_(masks.keyless(key_mask)[:, None, None, None], 0)
        return out, q.new_empty(0, dtype=torch.float32)

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        heads_second = (t.transpose(1, 2) for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_second, attn_mask=mask, scale=scale)
        return out.transpose(1, 2).contiguous()


sdpa = Sdpa()
