"""`reference.sdpa`: PyTorch's own flash attention for CPU, which nobody here wrote; packed input is a loop over its
sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import packed_sequences

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class SdpaAttention:
    """The aten pair takes [B, H, S, D]; its logsumexp is the contract's (natural, of scaled logits)."""

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        if cu_seqlens_q is None:
            out, lse = _dense(q, k, v, scale)
        else:
            out = torch.empty(q.shape, dtype=q.dtype)
            lse = torch.empty(
                q.shape[1], q.shape[0], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32
            )
            longest = (max_seqlen_q, max_seqlen_kv)
            for rows, keys in packed_sequences(q, k, cu_seqlens_q, cu_seqlens_kv, longest):
                if rows.stop == rows.start:
                    continue
                if keys.stop == keys.start:
                    out[rows], lse[:, rows] = 0.0, float("-inf")
                    continue
                found = _dense(q[None, rows], k[None, keys], v[None, keys], scale)
                out[rows], lse[:, rows] = found[0][0], found[1][0]
        return out, lse if need_lse else lse.new_empty(0)

    def backward(
        self, grad_out, q, k, v, out, lse, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale
    ):
        if cu_seqlens_q is None:
            return _dense_backward(grad_out, q, k, v, out, lse, scale)
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
        longest = (max_seqlen_q, max_seqlen_kv)
        for rows, keys in packed_sequences(q, k, cu_seqlens_q, cu_seqlens_kv, longest):
            if rows.stop > rows.start and keys.stop > keys.start:
                grads = _dense_backward(
                    *(t[None, s] for t, s in ((grad_out, rows), (q, rows), (k, keys), (v, keys), (out, rows))),
                    lse[None, :, rows],
                    scale,
                )
                dq[rows], dk[keys], dv[keys] = (g[0] for g in grads)
        return dq, dk, dv


def _dense(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out_BHSD, lse_BHS = _forward(*map(_heads_second, (q_BSHD, k_BSHD, v_BSHD)), scale=scale)
    return out_BHSD.transpose(1, 2).contiguous(), lse_BHS.contiguous()


def _dense_backward(grad_out, q, k, v, out, lse, scale):
    swapped = map(_heads_second, (grad_out, q, k, v, out))
    return tuple(g.transpose(1, 2).contiguous() for g in _backward(*swapped, lse, 0.0, False, scale=scale))


def _heads_second(t_BSHD: Tensor) -> Tensor:
    # The kernels read every head as if its channels lay side by side, and give wrong numbers without a word otherwise.
    return (t_BSHD if t_BSHD.stride(-1) == 1 else t_BSHD.contiguous()).transpose(1, 2)


sdpa = SdpaAttention()
