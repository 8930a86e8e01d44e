"""`ascend.fusion`: npu_fusion_attention and its gradient, one kernel for training and inference.

Dense calls go as [B, S, H, D], packed ones as [T, H, D] with the ends of sequences as Python integers. Key masks become
a mask of queries and keys while that is small; beyond, the keys that take part are packed."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch_npu  # noqa: F401  (defines torch.ops.npu)
from torch import Tensor

from .. import masks
from ..predicates import MOST_TOKENS
from . import packs
from .operands import dense, without_zero
from .packs import Pack
from .statistics import logsumexp, logsumexp_of_pack, statistics, statistics_of_pack


class Fusion:
    """The vendor's operators below autograd.

    The forward pass is deterministic. So is the gradient where torch.use_deterministic_algorithms asks for it:
    torch_npu tells the operator before every call."""

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        q, scale = without_zero(q, scale)
        q, k, v = (dense(t) for t in (q, k, v))
        if cu_seqlens_q is not None:
            return self.packed(q, k, v, packs.pack(q, k, cu_seqlens_q, cu_seqlens_kv), scale, need_lse)
        if key_mask is None:
            out, *found = self.call(q, k, v, "BSND", scale)
            return out, logsumexp(*found) if need_lse else _no_lse(q)
        if masks.is_small(*key_mask.shape, q.shape[1]):
            return self.masked(q, k, v, key_mask, scale, need_lse)
        tokens = q.flatten(0, 1)
        out, lse = self.packed(tokens, k[key_mask], v[key_mask], _of_mask(q, key_mask), scale, need_lse)
        if need_lse:
            lse = lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
        return out.view(q.shape), lse

    def backward(
        self, grad_out, q, k, v, out, lse, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale
    ):
        logits_vary = scale != 0
        q, scale = without_zero(q, scale)
        arguments = (key_mask, cu_seqlens_q, cu_seqlens_kv, scale)
        dq, dk, dv = self.gradients(*(dense(t) for t in (grad_out, q, k, v, out)), lse, *arguments)
        return (dq, dk, dv) if logits_vary else (dq.zero_(), dk.zero_(), dv)

    def gradients(self, grad_out, q, k, v, out, lse, key_mask, cu_q, cu_kv, scale) -> tuple[Tensor, Tensor, Tensor]:
        if cu_q is not None:
            return self.packed_gradients(grad_out, q, k, v, out, lse, packs.pack(q, k, cu_q, cu_kv), scale)
        if key_mask is None:
            return self.call_grad(grad_out, q, k, v, out, statistics(lse), "BSND", scale)
        if masks.is_small(*key_mask.shape, q.shape[1]):
            blanked = (masks.blanked(t, key_mask) for t in (k, v))
            mask = self.mask_arguments(key_mask, q.shape[1])
            found = self.call_grad(grad_out, q, *blanked, out, statistics(lse), "BSND", scale, **mask)
            return self.without_keyless(found, key_mask)
        lse_HT = lse.transpose(0, 1).flatten(1)
        of_q = (t.flatten(0, 1) for t in (grad_out, q))
        rest = (k[key_mask], v[key_mask], out.flatten(0, 1), lse_HT, _of_mask(q, key_mask), scale)
        dq, dk_kept, dv_kept = self.packed_gradients(*of_q, *rest)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dk[key_mask], dv[key_mask] = dk_kept, dv_kept
        return dq.view(q.shape), dk, dv

    # ---- the forms of a call

    def masked(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float, need_lse: bool
    ) -> tuple[Tensor, Tensor]:
        k, v = (masks.blanked(t, key_mask) for t in (k, v))
        out, *found = self.call(q, k, v, "BSND", scale, **self.mask_arguments(key_mask, q.shape[1]))
        keyless = masks.keyless(key_mask)
        out.masked_fill_(keyless[:, None, None, None], 0)
        return out, logsumexp(*found).masked_fill_(keyless[:, None, None], -torch.inf) if need_lse else _no_lse(q)

    def without_keyless(
        self, gradients: tuple[Tensor, Tensor, Tensor], key_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing comes from a sample without keys: its probabilities of 0 times a NaN in its queries would be NaN."""
        keyless = masks.keyless(key_mask)[:, None, None, None]
        dq, dk, dv = (gradient.masked_fill_(keyless, 0) for gradient in gradients)
        return dq, dk, dv

    def mask_arguments(self, key_mask: Tensor, q_len: int) -> dict[str, Any]:
        modes = {"sparse_mode": masks.SPARSE_MODE, "inner_precise": masks.INNER_PRECISE}
        return {"atten_mask": masks.left_out(key_mask, q_len), **modes}

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, pack: Pack, scale: float, need_lse: bool
    ) -> tuple[Tensor, Tensor]:
        if not len(pack):
            nothing = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32, device=q.device)
            return torch.zeros_like(q), nothing if need_lse else _no_lse(q)
        operands = (pack.q.take(q), pack.kv.take(k), pack.kv.take(v))
        out, *found = self.call(*operands, "TND", scale, **self.pack_arguments(pack))
        if not need_lse:
            return pack.q.put(out), _no_lse(q)
        return pack.q.put(out), pack.q.put(logsumexp_of_pack(*found, pack.q.lengths), -torch.inf, dim=1)

    def packed_gradients(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not len(pack):
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        operands = (pack.q.take(grad_out), pack.q.take(q), pack.kv.take(k), pack.kv.take(v), pack.q.take(out))
        found = statistics_of_pack(pack.q.take(lse, dim=1), pack.q.lengths)
        dq, dk, dv = self.call_grad(*operands, found, "TND", scale, **self.pack_arguments(pack))
        return pack.q.put(dq), pack.kv.put(dk), pack.kv.put(dv)

    def pack_arguments(self, pack: Pack) -> dict[str, Any]:
        ends = {"actual_seq_qlen": pack.q.ends, "actual_seq_kvlen": pack.kv.ends}
        if max(pack.q.tokens, pack.kv.tokens) > MOST_TOKENS:
            raise ValueError(
                f"npu_fusion_attention takes packs of at most {MOST_TOKENS} tokens; got {pack.q.tokens} queries and "
                f"{pack.kv.tokens} keys. Pack fewer sequences in a call"
            )
        return ends

    # ---- the operators

    def call(self, q: Tensor, k: Tensor, v: Tensor, layout: str, scale: float, **more: Any):
        """(out, largest logits, sums of exponentials)."""
        return torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[-2], layout, scale=scale, **more)[:3]

    def call_grad(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, found, layout: str, scale: float, **more
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.npu.npu_fusion_attention_grad(
            q, k, v, grad_out, q.shape[-2], layout,
            softmax_max=found[0], softmax_sum=found[1], attention_in=out, scale_value=scale, **more,
        )[:3]  # fmt: skip


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


def _of_mask(q: Tensor, key_mask: Tensor) -> Pack:
    """Sequences of all queries, and of the keys that take part, of each sample. Waits for the device."""
    kept = key_mask.sum(1).tolist()
    ends = [[q.shape[1]] * q.shape[0], kept]
    return packs.of_ends(*([0, *itertools.accumulate(lengths)] for lengths in ends))


fusion = Fusion()
