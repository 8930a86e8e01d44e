"""`cuda.fa4`: FlashAttention-4 (`flash_attn.cute`, CuTe DSL kernels compiled on first use for each head size)."""

from __future__ import annotations

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from .masked import Packs
from .operands import aligned, pack_arguments


class Flash4(Packs):
    """Its functions below autograd: the library's own autograd keeps tensors that we do not need."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_kv: Tensor | None, longest, scale, need_lse
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _flash_attn_fwd(
            *(aligned(t) for t in (q, k, v)),
            **pack_arguments(cu_q, cu_kv, longest),
            softmax_scale=scale,
            return_lse=need_lse,
        )
        return out, lse if need_lse else q.new_empty(0, dtype=torch.float32)

    def gradients(self, grad_out, q, k, v, out, lse, cu_q, cu_kv, longest, scale) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, *_ = _flash_attn_bwd(
            *(aligned(t) for t in (q, k, v)),
            out,
            aligned(grad_out),
            lse,
            softmax_scale=scale,
            **pack_arguments(cu_q, cu_kv, longest),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


flash4 = Flash4()
