"""`cuda.efficient`: the memory-efficient attention that PyTorch ships, CUTLASS kernels for bf16 and fp16.

It takes fp32 too, but multiplies it as three TF32 products (OpMultiplyAddFastF32 in gemm_kernel_utils.h), whatever
torch.backends.cuda.matmul.allow_tf32 says: less exact than the contract asks, so that the predicate refuses it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .masked import Packs
from .operands import aligned

_ATEN = torch.ops.aten
#: The kernels read and write the logsumexp of this many queries at once, without a look at where a sequence ends.
LSE_BLOCK = 32
_NO_MASK = 0


class Efficient(Packs):
    """PyTorch's functions below autograd; a pack is a batch of one sample with cu_seqlens. What sequences without
    queries or keys get is not defined by the kernels, and filled in here.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q, cu_kv, longest, scale, need_lse) -> tuple[Tensor, Tensor]:
        if cu_q is None:
            operands = (aligned(t) for t in (q, k, v))
            out, lse = _forward(operands, None, None, (q.shape[1], k.shape[1]), scale, need_lse)
            return out, lse[..., : q.shape[1]].contiguous() if need_lse else lse.new_empty(0)
        if not (len(q) and len(k)):
            nothing = torch.full((q.shape[1], len(q)), -torch.inf, dtype=torch.float32, device=q.device)
            return torch.zeros(q.shape, dtype=q.dtype, device=q.device), nothing if need_lse else nothing.new_empty(0)
        operands = (aligned(t)[None] for t in (q, k, v))
        out, lse = _forward(operands, cu_q, cu_kv, _within(longest, q, k), scale, need_lse)
        sequence_T, place_T = _places(cu_q, q)
        keyless_T = (cu_kv.diff() == 0)[sequence_T]
        out = out[0].masked_fill(keyless_T[:, None, None], 0)
        if not need_lse:
            return out, lse.new_empty(0)
        return out, lse[sequence_T, :, place_T].T.masked_fill(keyless_T, -torch.inf).contiguous()

    def gradients(self, grad_out, q, k, v, out, lse, cu_q, cu_kv, longest, scale) -> tuple[Tensor, Tensor, Tensor]:
        operands = tuple(aligned(t) for t in (grad_out, q, k, v))
        if cu_q is None:
            lse = pad(lse, (0, -lse.shape[-1] % LSE_BLOCK), value=torch.inf)
            return _backward(operands, out, lse, None, None, (q.shape[1], k.shape[1]), scale)
        if not (len(q) and len(k)):
            return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        longest = _within(longest, q, k)
        (sequence_q, place_q), (sequence_k, _) = _places(cu_q, q), _places(cu_kv, k)
        padded_BHS = lse.new_full((len(cu_q) - 1, lse.shape[0], longest[0] + -longest[0] % LSE_BLOCK), torch.inf)
        padded_BHS[sequence_q, :, place_q] = lse.T
        operands = tuple(t[None] for t in operands)
        dq, dk, dv = (t[0] for t in _backward(operands, out[None], padded_BHS, cu_q, cu_kv, longest, scale))
        keyless, queryless = ((cu_kv.diff() == 0)[sequence_q], (cu_q.diff() == 0)[sequence_k])
        dk, dv = (t.masked_fill(queryless[:, None, None], 0) for t in (dk, dv))
        return dq.masked_fill(keyless[:, None, None], 0), dk, dv


def _forward(operands, cu_q, cu_kv, longest, scale, need_lse) -> tuple[Tensor, Tensor]:
    ends = (None, None) if cu_q is None else (cu_q.contiguous(), cu_kv.contiguous())
    out, lse, *_ = _ATEN._efficient_attention_forward(
        *operands, None, *ends, *longest, 0.0, _NO_MASK, need_lse, scale=scale
    )
    return out, lse


def _backward(operands, out, lse, cu_q, cu_kv, longest, scale) -> tuple[Tensor, Tensor, Tensor]:
    ends = (None, None) if cu_q is None else (cu_q.contiguous(), cu_kv.contiguous())
    unused_seed = torch.empty((), dtype=torch.int64, device=lse.device)
    return _ATEN._efficient_attention_backward(
        *operands, None, out.contiguous(), *ends, *longest, lse.contiguous(), 0.0, unused_seed, unused_seed,
        _NO_MASK, False, scale=scale,
        # Blocks of keys that add to one dq at a time, not in any order.
        num_splits_key=1 if torch.are_deterministic_algorithms_enabled() else None,
    )[:3]  # fmt: skip


def _within(longest: tuple[int, int], q: Tensor, k: Tensor) -> tuple[int, int]:
    """The longest sequences, no longer than all of them together: PyTorch refuses other bounds."""
    return min(longest[0], len(q)), min(longest[1], len(k))


def _places(cu_seqlens: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(sequence, place in it) of each token of t, without waiting for the device."""
    token_T = torch.arange(len(t), dtype=torch.int32, device=t.device)
    sequence_T = torch.bucketize(token_T, cu_seqlens.contiguous(), right=True) - 1
    return sequence_T, (token_T - cu_seqlens[sequence_T]).long()


efficient = Efficient()
