"""`cuda.fa3`: FlashAttention-3, the Hopper kernels that flash-attention builds from its folder hopper/ as the module
flash_attn_interface.

Written against its signatures of April 2025 to March 2026; it has not run on hardware yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flash_attn_interface as library
import torch
from torch import Tensor

from .masked import Packs
from .operands import aligned, lse_from_flash, pack_arguments


def _blanks(function: Callable[..., Any]) -> dict[str, Any]:
    """What a build from before its functions became torch.library ops insists on being told: there, every feature that
    we do not use is a parameter without a default.
    """
    parameters = inspect.signature(function).parameters.values()
    required = (p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD)
    return {name: False if name == "causal" else None for name in required}


_FORWARD, _BACKWARD = _blanks(library._flash_attn_forward), _blanks(library._flash_attn_backward)


class Flash3(Packs):
    """Its functions below autograd. Unlike flash_attn_func, which returns the logsumexp or does not, as the build goes,
    they have always returned it.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q, cu_kv, longest, scale, need_lse) -> tuple[Tensor, Tensor]:
        operands = dict(zip("qkv", (aligned(t) for t in (q, k, v)), strict=True))
        given = operands | pack_arguments(cu_q, cu_kv, longest) | {"softmax_scale": scale}
        out, lse, *_ = library._flash_attn_forward(**_FORWARD | given)
        # Of a query without keys it says -inf as the contract does; +inf where a whole call has no keys.
        return out.contiguous(), lse_from_flash(lse) if need_lse else lse.new_empty(0)

    def gradients(self, grad_out, q, k, v, out, lse, cu_q, cu_kv, longest, scale) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        operands = dict(zip(("dout", "q", "k", "v", "out"), map(aligned, (grad_out, q, k, v, out)), strict=True))
        given = operands | pack_arguments(cu_q, cu_kv, longest) | {"softmax_lse": lse.contiguous()}
        given |= {"softmax_scale": scale, "deterministic": torch.are_deterministic_algorithms_enabled()}
        library._flash_attn_backward(**_BACKWARD | given | {"dq": dq, "dk": dk, "dv": dv})  # writes into these three
        return dq, dk, dv


flash3 = Flash3()
