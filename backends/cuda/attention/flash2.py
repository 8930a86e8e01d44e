"""`cuda.fa2`: FlashAttention-2 of the package flash-attn, from 2.7 on, whose inner functions are torch.library ops.

Written against their signatures in 2.7.0 to 2.8.4; it has not run on hardware yet."""

from __future__ import annotations

from typing import Any

import flash_attn
import torch
from flash_attn import flash_attn_interface as library
from torch import Tensor

from .masked import Packs
from .operands import aligned, lse_for_flash, lse_from_flash, pack_arguments

OLDEST = (2, 7)

if tuple(int(part) for part in flash_attn.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"flash-attn {flash_attn.__version__} is installed; cuda.fa2 calls functions of 2.7 or newer: "
        "pip install -U flash-attn --no-build-isolation"
    )

#: Every query sees every key: no dropout, no window, no cap on logits, no bias.
_PLAIN: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


class Flash2(Packs):
    """Its functions below autograd, dense and packed."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q, cu_kv, longest, scale, need_lse) -> tuple[Tensor, Tensor]:
        forward = library._flash_attn_forward if cu_q is None else library._flash_attn_varlen_forward
        out, lse, *_ = forward(
            *(aligned(t) for t in (q, k, v)),
            **pack_arguments(cu_q, cu_kv, longest),
            softmax_scale=scale,
            return_softmax=False,
            **_PLAIN,
        )
        return out.contiguous(), lse_from_flash(lse) if need_lse else lse.new_empty(0)

    def gradients(self, grad_out, q, k, v, out, lse, cu_q, cu_kv, longest, scale) -> tuple[Tensor, Tensor, Tensor]:
        backward = library._flash_attn_backward if cu_q is None else library._flash_attn_varlen_backward
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        backward(  # writes into dq, dk and dv
            *(aligned(t) for t in (grad_out, q, k, v, out)),
            lse_for_flash(lse),
            dq=dq,
            dk=dk,
            dv=dv,
            **pack_arguments(cu_q, cu_kv, longest),
            softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_PLAIN,
        )
        return dq, dk, dv


flash2 = Flash2()
