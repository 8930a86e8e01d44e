"""A key mask as packing: keys that take no part are left out before a kernel sees them, whatever they hold."""

from __future__ import annotations

import torch
from torch import Tensor

Longest = tuple[int, int]


class Packs:
    """The calls of the contract in terms of two, without masks: `attend` and `gradients`, dense or packed.

    Leaving keys out moves what is left together, and waits for the device once to know how much that is. The model
    itself masks nothing."""

    def attend(self, q, k, v, cu_q, cu_kv, longest: Longest, scale: float, need_lse: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def gradients(self, grad_out, q, k, v, out, lse, cu_q, cu_kv, longest: Longest, scale: float):
        raise NotImplementedError

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        q, scale = without_zero(q, scale)
        if key_mask is None:
            longest = (max_seqlen_q, max_seqlen_kv)
            return self.attend(q, k, v, cu_seqlens_q, cu_seqlens_kv, longest, scale, need_lse)
        cu_q, cu_kv, longest = _cumulative(q, key_mask)
        out, lse = self.attend(q.flatten(0, 1), k[key_mask], v[key_mask], cu_q, cu_kv, longest, scale, need_lse)
        return out.view(q.shape), _heads_first(lse, q) if need_lse else lse

    def backward(
        self, grad_out, q, k, v, out, lse, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale
    ):
        if scale == 0:  # the logits do not depend on q and k
            rest = {"key_mask": key_mask, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
            rest |= {"max_seqlen_q": max_seqlen_q, "max_seqlen_kv": max_seqlen_kv, "scale": 1.0}
            dv = self.backward(grad_out, torch.zeros_like(q), k, v, out, lse, **rest)[2]
            return torch.zeros_like(q), torch.zeros_like(k), dv
        if key_mask is None:
            longest = (max_seqlen_q, max_seqlen_kv)
            return self.gradients(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_kv, longest, scale)
        cu_q, cu_kv, longest = _cumulative(q, key_mask)
        lse_HT = lse.transpose(0, 1).flatten(1).contiguous()
        tokens = (t.flatten(0, 1) for t in (grad_out, q))
        rest = (out.flatten(0, 1), lse_HT, cu_q, cu_kv, longest, scale)
        dq, dk_packed, dv_packed = self.gradients(*tokens, k[key_mask], v[key_mask], *rest)
        dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
        dk[key_mask], dv[key_mask] = dk_packed, dv_packed
        return dq.view(q.shape), dk, dv


def without_zero(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """(q, scale) with the same logits, and no scale of 0: kernels divide by it or multiply it with infinity."""
    return (torch.zeros_like(q), 1.0) if scale == 0 else (q, scale)


def _cumulative(q: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor, Longest]:
    """(cu_seqlens of queries, of keys that take part, longest of both); the latter may be more than the longest."""
    batch, rows = q.shape[:2]
    cu_q = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=q.device)
    counts = torch.nn.functional.pad(key_mask.sum(1), (1, 0))
    return cu_q, counts.cumsum(0).to(torch.int32), (rows, key_mask.shape[1])


def _heads_first(lse_HT: Tensor, q: Tensor) -> Tensor:
    """[B, H, S] from the [H, B S] of a packed call."""
    return lse_HT.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
