"""What fused kernels ask of their operands and say of a query without keys, where the contract says otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Bytes; kernels load that much at once.
ALIGNMENT = 16


def aligned(t: Tensor) -> Tensor:
    """t, detached, with the last dimension dense and every row on a boundary of 16 bytes: a copy where it is not.

    PyTorch's FlashAttention reads astray otherwise and loses the device."""
    t = t.detach()
    rows = (stride * t.element_size() for stride, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    fits = t.stride(-1) == 1 and t.data_ptr() % ALIGNMENT == 0 and all(row % ALIGNMENT == 0 for row in rows)
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def lse_from_flash(lse: Tensor) -> Tensor:
    """FlashAttention-2 says +inf of a query without keys, which no other logsumexp can be; the contract says -inf."""
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def lse_for_flash(lse: Tensor) -> Tensor:
    """The inverse, contiguous: exp(logit - inf) is the 0 that the backward pass of FlashAttention-2 counts on."""
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()


def pack_arguments(cu_q: Tensor | None, cu_kv: Tensor | None, longest: tuple[int, int]) -> dict[str, Any]:
    """What the functions of flash-attention are told of a pack, and nothing of a dense call."""
    if cu_q is None or cu_kv is None:
        return {}
    ends = {"cu_seqlens_q": cu_q.contiguous(), "cu_seqlens_k": cu_kv.contiguous()}
    return ends | {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1]}
