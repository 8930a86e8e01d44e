"""Attention on 8-bit operands: what `quantized_attention` calls where a recipe asks for "native", and the torch.library
op behind it. The meaning is in contracts/native_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ospnext.numerics.scaling import ScaleMode
from ospnext.ops.attention import check_operands
from ospnext.ops.contracts.native_attention import CONTRACT, NativeAttentionRequest
from ospnext.ops.library import Decided, define
from ospnext.ops.quantize import amax_op, remember_group
from ospnext.ops.recipe import HiF8Recipe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NativeAttentionKernel(Protocol):
    """What an implementation's `target` provides. `scale` is resolved; `amax` is that of q and k, each as
    hif8_quantize takes it, or None; arguments of the other form (dense, packed) are None.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        scale: float,
        scale_max: float,
        scale_mode: ScaleMode,
        amax: tuple[Tensor, Tensor] | None,
    ) -> Tensor: ...


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    recipe: HiF8Recipe,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_kv: int = 0,
    scale: float | None = None,
    amax_group: ProcessGroup | None = None,
) -> Tensor:
    """As `quantized_attention`, which calls this; without a mask, and without gradients.

    Raises:
        ValueError: a mask is given, a gradient is asked for, or operands do not fit together.
        UnsupportedRequestError: no implementation that the policy allows takes the call; the message says why for each.
    """
    if key_mask is not None:
        raise ValueError(f"native attention takes no key_mask; got {tuple(key_mask.shape)}. {_INSTEAD}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError(f"native attention is for inference: it has no gradient. {_INSTEAD}, or torch.no_grad()")
    group = remember_group(amax_group)
    # v has another scale once its mean is gone, and ranks do not share that. Where they hold other heads of it, nothing
    # changes but a scale; where they hold other tokens, the result differs from that of one process by about as much as
    # quantization itself does.
    amax = [amax_op(t, "tensor", group) for t in (q, k)] if group else []
    pack = (cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
    return _op(q, k, v, *pack, scale, recipe.scale_max, recipe.scale_mode, amax)


# ---- behind the function

_INSTEAD = "Use a recipe with attention='qdq' (quant_attn=hif8)"
_decided = Decided(CONTRACT)


def _kernel_for(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_kv: Tensor | None,
    max_q: int,
    max_kv: int,
    custom_scale: bool,
    scale_max: float,
    scale_mode: ScaleMode,
    amax: Sequence[Tensor],
) -> NativeAttentionKernel:
    tensors = (q, k, v, cu_q, cu_kv, *amax)
    operands = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)
    signature = (operands, max_q, max_kv, custom_scale, scale_max, scale_mode)
    kernel = _decided.get(signature)
    if kernel is None:
        check_operands(q, k, v, None, cu_q, cu_kv, max_q, max_kv)
        if len(amax) not in (0, 2):
            raise ValueError(f"native_attention: amax is that of q and k, or empty; got {len(amax)} tensors")
        packed = cu_q is not None
        request = NativeAttentionRequest(
            device_type=q.device.type,
            dtype=q.dtype,
            batch=q.shape[0] if cu_q is None else cu_q.shape[0] - 1,
            q_len=max_q if packed else q.shape[1],
            kv_len=max_kv if packed else k.shape[1],
            heads=q.shape[-2],
            head_dim=q.shape[-1],
            packed=packed,
            custom_scale=custom_scale,
            scale_max=scale_max,
            scale_mode=scale_mode,
            given_amax=bool(amax),
        )
        kernel = _decided.decide(signature, request)
    return kernel


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor | None,
    cu_kv: Tensor | None,
    max_q: int,
    max_kv: int,
    scale: float | None,
    scale_max: float,
    scale_mode: ScaleMode,
    amax: Sequence[Tensor],
) -> Tensor:
    kernel = _kernel_for(q, k, v, cu_q, cu_kv, max_q, max_kv, scale is not None, scale_max, scale_mode, amax)
    return kernel.forward(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_kv,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_kv,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        scale_max=scale_max,
        scale_mode=scale_mode,
        amax=(amax[0], amax[1]) if amax else None,
    )


_op = define(
    "native_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, SymInt max_seqlen_q, "
    "SymInt max_seqlen_kv, float? scale, float scale_max, str scale_mode, Tensor[] amax",
    "Tensor",
    kernel=_forward,
    fake=lambda q, *rest: q.new_empty(q.shape),
    may_wait=True,  # for lengths that it has not seen yet
)
