"""`cuda.flash`: FlashAttention-2 as PyTorch ships it."""

from __future__ import annotations

import torch
from torch import Tensor

from .masked import Packs
from .operands import aligned, lse_for_flash, lse_from_flash

_ATEN = torch.ops.aten


class TorchFlash(Packs):
    """PyTorch's functions below autograd, dense and packed. Dropout is off, so that the random state is of no use."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q, cu_kv, longest, scale, need_lse) -> tuple[Tensor, Tensor]:
        longest = longest if cu_q is not None else (q.shape[1], k.shape[1])
        operands = (aligned(t) for t in (q, k, v))
        out, lse, *_ = _ATEN._flash_attention_forward(*operands, cu_q, cu_kv, *longest, 0.0, False, False, scale=scale)
        return out.contiguous(), lse_from_flash(lse) if need_lse else lse.new_empty(0)

    def gradients(self, grad_out, q, k, v, out, lse, cu_q, cu_kv, longest, scale):
        longest = longest if cu_q is not None else (q.shape[1], k.shape[1])
        nothing = torch.empty(2, dtype=torch.uint64, device=q.device)
        operands = (aligned(t) for t in (grad_out, q, k, v))
        return _ATEN._flash_attention_backward(
            *operands, out, lse_for_flash(lse), cu_q, cu_kv, *longest, 0.0, False, nothing, nothing.new_empty(()),
            scale=scale,
        )  # fmt: skip


flash = TorchFlash()
