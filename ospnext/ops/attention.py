"""Attention: the two functions that models call, and the torch.library ops behind them. The meaning is in
contracts/attention.py.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ospnext.ops.contracts.attention import CONTRACT, AttentionRequest
from ospnext.ops.library import Decided, define


class AttentionKernel(Protocol):
    """What an implementation's `target` provides. `scale` is resolved; arguments of the other form (dense, packed) are
    None.

    `lse` is the logsumexp, or an empty fp32 tensor when `need_lse` is false.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        scale: float,
        need_lse: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        key_mask: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_kv: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def attention(
    q_BSHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention over a batch of dense sequences.

    Args:
        q_BSHD: queries [B, Sq, H, D]; k_BSHD, v_BSHD: keys and values [B, Sk, H, D]. One floating dtype, one device,
            any strides.
        key_mask: bool [B, Sk], True = the key takes part; None = all do.
        scale: factor on the logits; None = 1 / sqrt(D).
        return_lse: also return the natural logsumexp of the scaled logits, fp32 [B, H, Sq] (not differentiable).

    Returns:
        out [B, Sq, H, D], or (out, lse). Rows without a single key are zero, their lse is -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        UnsupportedRequestError: no implementation that the policy allows takes the call; the message says why for each.
    """
    op = _op_for(q_BSHD, k_BSHD, v_BSHD)
    out, lse = op(q_BSHD, k_BSHD, v_BSHD, key_mask, None, None, 0, 0, scale, return_lse)
    return (out, lse) if return_lse else out


def attention_packed(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention inside each of several sequences packed one after the other.

    Args:
        q_THD: queries [Tq, H, D]; k_THD, v_THD: keys and values [Tk, H, D].
        cu_seqlens_q, cu_seqlens_kv: int32 [sequences + 1], start of each sequence and, last, the end. On the
            device of q.
        max_seqlen_q, max_seqlen_kv: length of the longest sequence; at least 1.
        scale, return_lse: as in `attention`; lse is [H, Tq].

    Returns, raises: as `attention`.
    """
    op = _op_for(q_THD, k_THD, v_THD)
    out, lse = op(
        q_THD, k_THD, v_THD, None, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, scale, return_lse
    )
    return (out, lse) if return_lse else out


# ---- behind the functions
# ------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, "
    "SymInt max_seqlen_q, SymInt max_seqlen_kv, float? scale"
)
_decided = Decided(CONTRACT)


def _needs_grad(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _op_for(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Two ops, because an op with a gradient costs 10 us more per call even where no gradient is wanted."""
    return _differentiable_op if _needs_grad(q, k, v) else _attention_op


def _kernel_for(q, k, v, key_mask, cu_q, cu_kv, max_q, max_kv, custom_scale, return_lse, backward):
    """One dictionary lookup on the signature of the call; only a signature not seen before is checked and decided."""
    signature = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        k.dtype,
        v.dtype,
        q.device,
        k.device,
        v.device,
        None if key_mask is None else (key_mask.shape, key_mask.dtype, key_mask.device),
        None if cu_q is None else (cu_q.shape, cu_q.dtype, cu_q.device),
        None if cu_kv is None else (cu_kv.shape, cu_kv.dtype, cu_kv.device),
        max_q,
        max_kv,
        custom_scale,
        return_lse,
        backward,
        torch.are_deterministic_algorithms_enabled(),
    )
    kernel = _decided.get(signature)
    if kernel is None:
        check_operands(q, k, v, key_mask, cu_q, cu_kv, max_q, max_kv)
        kernel = _decided.decide(
            signature, _request(q, k, key_mask, cu_q, max_q, max_kv, custom_scale, return_lse, backward)
        )
    return kernel


def _request(q, k, key_mask, cu_q, max_q, max_kv, custom_scale, return_lse, backward) -> AttentionRequest:
    packed = cu_q is not None
    return AttentionRequest(
        device_type=q.device.type,
        dtype=q.dtype,
        heads=q.shape[-2],
        head_dim=q.shape[-1],
        batch=cu_q.shape[0] - 1 if packed else q.shape[0],
        q_len=max_q if packed else q.shape[1],
        kv_len=max_kv if packed else k.shape[1],
        packed=packed,
        key_mask=key_mask is not None,
        custom_scale=custom_scale,
        logsumexp=return_lse,
        backward=backward,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def check_operands(q, k, v, key_mask, cu_q, cu_kv, max_q, max_kv) -> None:
    packed = cu_q is not None or cu_kv is not None
    form = "packed [T, H, D]" if packed else "[B, S, H, D]"
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    rank = 3 if packed else 4
    if not q.ndim == k.ndim == v.ndim == rank:
        raise ValueError(f"attention: q, k and v must be {form}; got {shapes}")
    if k.shape != v.shape or q.shape[-2:] != k.shape[-2:] or (not packed and q.shape[0] != k.shape[0]):
        raise ValueError(
            f"attention: q, k and v must agree in batch, heads and head_dim, and k with v in length; got {shapes}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not q.dtype.is_floating_point:
        raise ValueError(f"attention: q, k and v must share one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    others = [t for t in (k, v, key_mask, cu_q, cu_kv) if t is not None]
    if any(t.device != q.device for t in others):
        raise ValueError(
            f"attention: all tensors must be on the device of q, {q.device}; got {[str(t.device) for t in others]}"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2] or packed):
        raise ValueError(
            f"attention: key_mask must be bool [B, Sk] = {tuple(k.shape[:2])} with dense tensors, "
            f"True where the key takes part; "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}{' with packed tensors' if packed else ''}"
        )
    if packed:
        for name, cu, longest in (("q", cu_q, max_q), ("kv", cu_kv, max_kv)):
            if (
                cu is None
                or cu.dtype != torch.int32
                or cu.ndim != 1
                or cu.shape != cu_q.shape
                or cu.shape[0] < 2
                or longest < 1
            ):
                found = "None" if cu is None else f"{cu.dtype} {tuple(cu.shape)}"
                raise ValueError(
                    f"attention: cu_seqlens_{name} must be int32 [sequences + 1] with max_seqlen_{name} >= 1; "
                    f"got {found} and {longest}"
                )


def _scale(scale: float | None, q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _run(for_backward, q, k, v, key_mask, cu_q, cu_kv, max_q, max_kv, scale, return_lse):
    kernel = _kernel_for(q, k, v, key_mask, cu_q, cu_kv, max_q, max_kv, scale is not None, return_lse, for_backward)
    return kernel.forward(
        q,
        k,
        v,
        key_mask=key_mask,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_kv,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_kv,
        scale=_scale(scale, q),
        need_lse=return_lse or for_backward,
    )


def _forward(q, k, v, *rest):
    if _needs_grad(q, k, v):
        raise RuntimeError(
            "ospnext::attention has no gradient; ospnext.ops.attention calls ospnext::attention_differentiable for one"
        )
    return _run(False, q, k, v, *rest)


def _differentiable(*args):
    return _run(True, *args)


def _empty(q: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3]) if with_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=lse_dtype)


def _forward_fake(q, *rest):
    return _empty(q, with_lse=rest[-1])


def _differentiable_fake(q, *rest):
    return _empty(q, with_lse=True)


def _backward(grad_out, q, k, v, out, lse, key_mask, cu_q, cu_kv, max_q, max_kv, scale):
    kernel = _kernel_for(q, k, v, key_mask, cu_q, cu_kv, max_q, max_kv, scale is not None, False, True)
    return kernel.backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        key_mask=key_mask,
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_kv,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_kv,
        scale=_scale(scale, q),
    )


def _backward_fake(grad_out, q, k, v, out, lse, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, key_mask, cu_q, cu_kv, max_q, max_kv, scale, _ = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, key_mask, cu_q, cu_kv)
    ctx.rest = (max_q, max_kv, scale)


def _autograd(ctx, grad_out, _grad_lse):
    # saved_tensors is read once: activation checkpointing and offloading unpack on each read, and refuse a second one.
    return (*_attention_backward_op(grad_out, *ctx.saved_tensors, *ctx.rest), *(None,) * 7)


_attention_backward_op = define(
    "attention_backward",
    "Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_mask, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_kv, SymInt max_seqlen_q, SymInt max_seqlen_kv, float? scale",
    "(Tensor, Tensor, Tensor)",
    kernel=_backward,
    fake=_backward_fake,
    may_wait=True,  # for how many keys a mask leaves, or lengths
)
_attention_op = define(
    "attention",
    f"{_ARGUMENTS}, bool return_lse",
    "(Tensor, Tensor)",
    kernel=_forward,
    fake=_forward_fake,
    may_wait=True,
)
_differentiable_op = define(
    "attention_differentiable",
    f"{_ARGUMENTS}, bool return_lse",
    "(Tensor, Tensor)",
    kernel=_differentiable,
    fake=_differentiable_fake,
    backward=_autograd,
    setup_context=_setup_context,
    may_wait=True,
)
