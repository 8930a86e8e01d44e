"""`reference.math`: attention as its formula, in fp32 (fp64 for fp64 inputs), a block of query rows at a time."""

from __future__ import annotations

import itertools
import math as _math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements of one block of logits: 2^24 fp32 values are 64 MiB, so that video-length sequences fit in memory.
BLOCK_ELEMENTS = 1 << 24


class MathAttention:
    """Readable first: every line is a term of the formula. Masked keys are taken out, so what they hold cannot
    matter.
    """

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, need_lse):
        accumulate, longest = _accumulate(q), (max_seqlen_q, max_seqlen_kv)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=accumulate, device=q.device)
        for rows, keys, lse_at in _sequences(q, k, key_mask, cu_seqlens_q, cu_seqlens_kv, longest):
            q_HSD, k_HSD, v_HSD = (_heads_first(t, accumulate) for t in (q[rows], k[keys], v[keys]))
            for block in _row_blocks(q_HSD, k_HSD):
                weights_HQK, sum_HQ1, max_HQ1 = _unnormalised_softmax(q_HSD[:, block] @ k_HSD.mT * scale)
                out[rows][block] = (weights_HQK @ v_HSD / sum_HQ1).transpose(0, 1).to(q.dtype)
                lse[lse_at][:, block] = (max_HQ1 + sum_HQ1.log()).squeeze(-1)
        return out, lse if need_lse else lse.new_empty(0)

    def backward(
        self, grad_out, q, k, v, out, lse, *, key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale
    ):
        accumulate, longest = _accumulate(q), (max_seqlen_q, max_seqlen_kv)
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        for rows, keys, lse_at in _sequences(q, k, key_mask, cu_seqlens_q, cu_seqlens_kv, longest):
            q_HSD, k_HSD, v_HSD = (_heads_first(t, accumulate) for t in (q[rows], k[keys], v[keys]))
            do_HSD, out_HSD, lse_HS = (
                _heads_first(grad_out[rows], accumulate),
                _heads_first(out[rows], accumulate),
                lse[lse_at],
            )
            dk_HSD, dv_HSD = torch.zeros_like(k_HSD), torch.zeros_like(v_HSD)
            for block in _row_blocks(q_HSD, k_HSD):
                q_HQD, do_HQD = q_HSD[:, block], do_HSD[:, block]
                weights_HQK = _softmax(q_HQD @ k_HSD.mT * scale, lse_HS[:, block])
                dv_HSD += weights_HQK.mT @ do_HQD
                delta_HQ1 = (do_HQD * out_HSD[:, block]).sum(-1, keepdim=True)
                dlogits_HQK = weights_HQK * (do_HQD @ v_HSD.mT - delta_HQ1) * scale
                dk_HSD += dlogits_HQK.mT @ q_HQD
                dq[rows][block] = (dlogits_HQK @ k_HSD).transpose(0, 1).to(q.dtype)
            dk[keys], dv[keys] = dk_HSD.transpose(0, 1).to(k.dtype), dv_HSD.transpose(0, 1).to(v.dtype)
        return dq, dk, dv


def _accumulate(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _sequences(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    cu_q: Tensor | None,
    cu_kv: Tensor | None,
    longest: tuple[int, int],
) -> Iterator[tuple]:
    """(index of the query rows, index of the keys, index into lse) of each sequence."""
    if cu_q is None or cu_kv is None:
        for b in range(q.shape[0]):
            yield b, (b if key_mask is None else (b, key_mask[b])), b
        return
    for rows, keys in packed_sequences(q, k, cu_q, cu_kv, longest):
        yield rows, keys, (slice(None), rows)


def packed_sequences(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_kv: Tensor, longest: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """(query rows, keys) of each packed sequence."""
    q_ends, kv_ends = _ends(cu_q, q.shape[0], longest[0], "q"), _ends(cu_kv, k.shape[0], longest[1], "kv")
    for rows, keys in zip(itertools.pairwise(q_ends), itertools.pairwise(kv_ends), strict=True):
        yield slice(*rows), slice(*keys)


def _ends(cu_seqlens: Tensor, tokens: int, longest: int, name: str) -> list[int]:
    """cu_seqlens as a list, checked: fast kernels trust it, and max_seqlen, and read or write astray if they are
    wrong.
    """
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != tokens or min(lengths) < 0:
        raise ValueError(
            f"attention: cu_seqlens_{name} must start at 0, not decrease and end at the number of tokens, {tokens}; "
            f"got {ends}"
        )
    if max(lengths) > longest:
        raise ValueError(f"attention: max_seqlen_{name} is {longest}, but a sequence has {max(lengths)} tokens")
    return ends


def _heads_first(t_SHD: Tensor, dtype: torch.dtype) -> Tensor:
    return t_SHD.transpose(0, 1).to(dtype)


def _row_blocks(q_HSD: Tensor, k_HSD: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, q_HSD.shape[0] * k_HSD.shape[1]))
    for start in range(0, q_HSD.shape[1], rows):
        yield slice(start, start + rows)


def _unnormalised_softmax(logits_HQK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - max), its sum and the max, the latter two [H, Q, 1].

    Dividing by the sum at the end loses less than exp(logits - logsumexp), whose subtrahend is itself rounded. Without
    keys the sum is 1, so that the row is zero, and the max is -inf, as is then the logsumexp.
    """
    if logits_HQK.shape[-1] == 0:
        empty = logits_HQK.new_full((*logits_HQK.shape[:-1], 1), -_math.inf)
        return logits_HQK, torch.ones_like(empty), empty
    max_HQ1 = logits_HQK.amax(-1, keepdim=True)
    weights_HQK = (logits_HQK - max_HQ1).exp()
    return weights_HQK, weights_HQK.sum(-1, keepdim=True), max_HQ1


def _softmax(logits_HQK: Tensor, lse_HQ: Tensor) -> Tensor:
    return (logits_HQK - lse_HQ[..., None]).exp()


math = MathAttention()
