"""Attention on HiFloat8 values: q, k and v make the round trip, the attention of the backend does the rest. The meaning
is in contracts/quantized_attention.py. Or, where a recipe asks for it, a kernel on 8-bit operands: native_attention.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ospnext.ops.attention import attention, attention_packed
from ospnext.ops.native_attention import native_attention
from ospnext.ops.quantize import hif8_fake_quantize
from ospnext.ops.recipe import HiF8Recipe
from ospnext.ops.replicated import replicated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    recipe: HiF8Recipe | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_kv: int = 0,
    scale: float | None = None,
    amax_group: ProcessGroup | None = None,
    kv_group: ProcessGroup | None = None,
) -> Tensor:
    """`attention`, or with cu_seqlens `attention_packed`, of q, k and v that went through HiFloat8 and back; their
    gradients do the same.

    Args:
        q, k, v: [B, S, H, D], or packed [T, H, D].
        recipe: scales; each of q, k, v and their gradients has one for the whole tensor. None = `HiF8Recipe()`. With
            attention="native" more is rounded and there is no gradient and no mask: contracts/native_attention.py.
        amax_group: ranks that each hold some heads or tokens of one tensor: they share the scales.
        kv_group: ranks that attend to the same k and v from different q. Gradients of k and v are averaged over them
            before they are quantized.
        key_mask, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale: as in the two functions.

    Returns, raises: as the two functions.
    """
    recipe = recipe or HiF8Recipe()
    if recipe.attention == "native":
        return native_attention(
            q,
            k,
            v,
            recipe=recipe,
            key_mask=key_mask,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_kv=max_seqlen_kv,
            scale=scale,
            amax_group=amax_group,
        )
    q, k, v = (
        hif8_fake_quantize(
            t,
            scale_max=recipe.scale_max,
            grad_scale_max=recipe.grad_scale_max,
            scale_mode=recipe.scale_mode,
            amax_group=amax_group,
        )
        for t in (q, k, v)
    )
    if kv_group is not None:
        k, v = replicated(k, kv_group), replicated(v, kv_group)
    if cu_seqlens_q is None or cu_seqlens_kv is None:
        return attention(q, k, v, key_mask=key_mask, scale=scale)
    return attention_packed(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        scale=scale,
    )
