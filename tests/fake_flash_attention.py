"""Packages that cannot be installed here, as modules: the inner functions of FlashAttention with the parameters of its
sources (flash_attn/flash_attn_interface.py 2.7.0 to 2.8.4, hopper/flash_attn_interface.py of April 2025 and of March
2026, flash_attn/cute/interface.py 4.0.0b36), which compute by the formula of the reference.

They are torch.library operators where the originals are, hence annotated as those want it."""

import itertools
import types
from typing import Any, Optional, Tuple  # noqa: UP035

import torch
from torch import Tensor

from ospnext.backends.reference.attention import math

OptionalTensor = Optional[Tensor]  # noqa: UP045
Three = Tuple[Tensor, Tensor, Tensor]  # noqa: UP006
Four = Tuple[Tensor, Tensor, Tensor, Tensor]  # noqa: UP006

#: (name, whether deterministic gradients were asked for) of each call; tests clear it.
calls: list[tuple[str, bool | None]] = []


def forward(q, k, v, cu_q, cu_k, longest, scale, *, keyless: float) -> tuple[Tensor, Tensor]:
    """(out, lse), where the logsumexp of a query without keys is `keyless`."""
    check(q, k, v, cu_q, cu_k, longest)
    out, lse = math.forward(q, k, v, **named(cu_q, cu_k, longest), scale=scale, need_lse=True)
    return out, lse.float().masked_fill(lse == -torch.inf, keyless)


def backward(dout, q, k, v, out, lse, cu_q, cu_k, longest, scale, *, keyless: float) -> Three:
    check(q, k, v, cu_q, cu_k, longest)
    assert dout.stride(-1) == out.stride(-1) == 1 and lse.is_contiguous()
    assert not (torch.isinf(lse) & (lse != keyless)).any(), "the logsumexp of a query without keys"
    lse = lse.masked_fill(lse == keyless, -torch.inf)
    return math.backward(dout, q, k, v, out, lse, **named(cu_q, cu_k, longest), scale=scale)


def named(cu_q, cu_k, longest) -> dict[str, Any]:
    most = dict(zip(("max_seqlen_q", "max_seqlen_kv"), longest, strict=True))
    return {"key_mask": None, "cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_k} | most


def check(q, k, v, cu_q, cu_k, longest) -> None:
    assert all(t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and not t.requires_grad for t in (q, k, v))
    if cu_q is None:
        assert q.ndim == 4 and longest == (None, None)
        return
    assert q.ndim == 3 and cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert longest[0] >= cu_q.diff().max() and longest[1] >= cu_k.diff().max()


def write(into: tuple[OptionalTensor, ...], grads: Three) -> None:
    for target, grad in zip(into, grads, strict=True):
        assert target is not None and target.is_contiguous()
        target.copy_(grad)


def empty_lse(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)


# ---- flash-attn 2


def _fa2_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: OptionalTensor,
    return_softmax: bool,
) -> Four:
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0, False, -1, -1, 0)
    assert alibi_slopes is None and not return_softmax
    out, lse = forward(q, k, v, None, None, (None, None), softmax_scale, keyless=torch.inf)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _fa2_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: OptionalTensor = None,
    return_softmax: bool = False,
    block_table: OptionalTensor = None,
    leftpad_k: OptionalTensor = None,
    seqused_k: OptionalTensor = None,
) -> Four:
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0, False, -1, -1, 0)
    assert alibi_slopes is None and not return_softmax
    longest = (max_seqlen_q, max_seqlen_k)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, keyless=torch.inf)
    return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)


def _fa2_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: OptionalTensor,
    dk: OptionalTensor,
    dv: OptionalTensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: OptionalTensor,
    deterministic: bool,
    rng_state: OptionalTensor = None,
) -> Tensor:
    calls.append(("fa2", deterministic))
    dense = (None, None, (None, None), softmax_scale)
    write((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *dense, keyless=torch.inf))
    return empty_lse(q)


def _fa2_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: OptionalTensor,
    dk: OptionalTensor,
    dv: OptionalTensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: OptionalTensor,
    deterministic: bool,
    rng_state: OptionalTensor = None,
) -> Tensor:
    calls.append(("fa2", deterministic))
    pack = (cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale)
    write((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *pack, keyless=torch.inf))
    return empty_lse(q)


def operator(name: str, function, *, fake, mutates_args=()):
    """`function` as the library makes it: opaque to tracing, so that only its fake runs on the meta device."""
    defined = torch.library.custom_op(f"ospnext_tests::{name}", function, mutates_args=mutates_args, device_types="cpu")
    defined.register_fake(fake)
    return defined


def _forward_fake(q, k, v, *rest, **named) -> Four:
    return torch.empty_like(q), empty_lse(q), q.new_empty(0), q.new_empty(2)


def _backward_fake(dout, q, *rest, **named) -> Tensor:
    return empty_lse(q)


GRADS = ("dq", "dk", "dv")
_FA2 = {
    "_flash_attn_forward": operator("fa2_forward", _fa2_forward, fake=_forward_fake),
    "_flash_attn_varlen_forward": operator("fa2_varlen_forward", _fa2_varlen_forward, fake=_forward_fake),
    "_flash_attn_backward": operator("fa2_backward", _fa2_backward, fake=_backward_fake, mutates_args=GRADS),
    "_flash_attn_varlen_backward": operator(
        "fa2_varlen_backward", _fa2_varlen_backward, fake=_backward_fake, mutates_args=GRADS
    ),
}


def flash_attn_2(version: str = "2.8.3") -> dict[str, types.ModuleType]:
    return _modules("flash_attn", "flash_attn_interface", _FA2, __version__=version)


# ---- FlashAttention-3


def _fa3_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: OptionalTensor = None,
    v_new: OptionalTensor = None,
    qv: OptionalTensor = None,
    out_: OptionalTensor = None,
    cu_seqlens_q: OptionalTensor = None,
    cu_seqlens_k: OptionalTensor = None,
    cu_seqlens_k_new: OptionalTensor = None,
    seqused_q: OptionalTensor = None,
    seqused_k: OptionalTensor = None,
    max_seqlen_q: Optional[int] = None,  # noqa: UP045
    max_seqlen_k: Optional[int] = None,  # noqa: UP045
    page_table: OptionalTensor = None,
    kv_batch_idx: OptionalTensor = None,
    leftpad_k: OptionalTensor = None,
    rotary_cos: OptionalTensor = None,
    rotary_sin: OptionalTensor = None,
    seqlens_rotary: OptionalTensor = None,
    q_descale: OptionalTensor = None,
    k_descale: OptionalTensor = None,
    v_descale: OptionalTensor = None,
    softmax_scale: Optional[float] = None,  # noqa: UP045
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: OptionalTensor = None,
    num_splits: int = 1,
    pack_gqa: Optional[bool] = None,  # noqa: UP045
    sm_margin: int = 0,
) -> Four:
    longest = (max_seqlen_q, max_seqlen_k)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, keyless=-torch.inf)
    return out, lse, q.new_empty(0), q.new_empty(0)


def _fa3_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: OptionalTensor = None,
    cu_seqlens_k: OptionalTensor = None,
    sequed_q: OptionalTensor = None,
    sequed_k: OptionalTensor = None,
    max_seqlen_q: Optional[int] = None,  # noqa: UP045
    max_seqlen_k: Optional[int] = None,  # noqa: UP045
    dq: OptionalTensor = None,
    dk: OptionalTensor = None,
    dv: OptionalTensor = None,
    softmax_scale: Optional[float] = None,  # noqa: UP045
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> Tensor:
    calls.append(("fa3", deterministic))
    pack = (cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale)
    write((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *pack, keyless=-torch.inf))
    return empty_lse(q)


_FA3 = {
    "_flash_attn_forward": operator("fa3_forward", _fa3_forward, fake=_forward_fake),
    "_flash_attn_backward": operator("fa3_backward", _fa3_backward, fake=_backward_fake, mutates_args=GRADS),
}


def _earlier_fa3_forward(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    unused = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
    assert unused == (None,) * 10 and causal is False and q_descale is rotary_cos is None
    longest = (max_seqlen_q, max_seqlen_k)
    return (*forward(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, keyless=-torch.inf), None, None)


def _earlier_fa3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk,
    dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert causal is False and sequed_q is sequed_k is None
    calls.append(("fa3", deterministic))
    pack = (cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale)
    write((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, *pack, keyless=-torch.inf))
    return dq, dk, dv, empty_lse(q)


_EARLIER_FA3 = {"_flash_attn_forward": _earlier_fa3_forward, "_flash_attn_backward": _earlier_fa3_backward}


def flash_attn_3(*, earlier: bool = False) -> dict[str, types.ModuleType]:
    return _modules("flash_attn_interface", "", _EARLIER_FA3 if earlier else _FA3)


# ---- FlashAttention-4


def _fa4_forward(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                 max_seqlen_q=None, max_seqlen_k=None, *, softmax_scale=None, return_lse=False):  # fmt: skip
    if q.is_meta:
        return torch.empty_like(q), empty_lse(q) if return_lse else None, None, None, None
    longest = (max_seqlen_q, max_seqlen_k)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, softmax_scale, keyless=-torch.inf)
    return out, lse if return_lse else None, None, None, None


def _fa4_backward(q, k, v, out, dout, lse, softmax_scale=None, *, cu_seqlens_q=None, cu_seqlens_k=None,
                  max_seqlen_q=None, max_seqlen_k=None, deterministic=False):  # fmt: skip
    calls.append(("fa4", deterministic))
    if q.is_meta:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    pack = (cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), softmax_scale)
    return backward(dout, q, k, v, out, lse, *pack, keyless=-torch.inf)


def flash_attn_4() -> dict[str, types.ModuleType]:
    functions = {"_flash_attn_fwd": _fa4_forward, "_flash_attn_bwd": _fa4_backward}
    found = _modules("flash_attn.cute", "interface", functions)
    return {"flash_attn": types.ModuleType("flash_attn"), **found}


def _modules(package: str, inner: str, functions: dict[str, Any], **attributes: Any) -> dict[str, types.ModuleType]:
    """For sys.modules: the package, and the module in it that has the functions."""
    top = types.ModuleType(package)
    module = types.ModuleType(f"{package}.{inner}") if inner else top
    for name, value in functions.items():
        setattr(module, name, value)
    for name, value in attributes.items():
        setattr(top, name, value)
    if not inner:
        return {package: top}
    setattr(top, inner, module)
    return {package: top, f"{package}.{inner}": module}


# ---- PyTorch's memory-efficient attention


def efficient_forward(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                      custom_mask_type, compute_log_sumexp=False, *, scale=None):  # fmt: skip
    """As aten::_efficient_attention_forward: packs as a batch of one, a padded logsumexp per sequence; and garbage
    wherever a sequence has no keys.
    """
    assert (bias, dropout_p, custom_mask_type) == (None, 0.0, 0)
    q, k, v = (query, key, value) if cu_seqlens_q is None else (query[0], key[0], value[0])
    if cu_seqlens_q is None:
        assert (max_seqlen_q, max_seqlen_k) == (q.shape[1], k.shape[1])
        out, lse = forward(q, k, v, None, None, (None, None), scale, keyless=torch.nan)
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        return out, padded if compute_log_sumexp else lse.new_empty(0), None, None, None, None
    assert 0 < max_seqlen_q <= len(q) and 0 < max_seqlen_k <= len(k)
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), scale, keyless=torch.nan)
    padded = lse.new_full((len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q + -max_seqlen_q % 32), torch.nan)
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        padded[i, :, : stop - start] = lse[:, start:stop]
        if cu_seqlens_k[i] == cu_seqlens_k[i + 1]:
            out[start:stop] = torch.nan
    return out[None], padded if compute_log_sumexp else lse.new_empty(0), None, None, None, None


def efficient_backward(grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                       logsumexp, dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *,
                       scale=None, num_splits_key=None):  # fmt: skip
    """As aten::_efficient_attention_backward; gradients of sequences without queries or keys are garbage."""
    calls.append(("efficient", num_splits_key == 1))
    assert bias is None and (dropout_p, custom_mask_type, bias_requires_grad) == (0.0, 0, False)
    assert out.is_contiguous() and logsumexp.shape[-1] % 32 == 0
    if cu_seqlens_q is None:
        assert (logsumexp[..., max_seqlen_q:] == torch.inf).all()
        lse = logsumexp[..., :max_seqlen_q].contiguous()
        dense = (None, None, (None, None), scale)
        return (*backward(grad_out_, query, key, value, out, lse, *dense, keyless=torch.nan), None)
    ends = [c.tolist() for c in (cu_seqlens_q, cu_seqlens_k)]
    lengths = [stop - start for start, stop in itertools.pairwise(ends[0])]
    assert all((logsumexp[i, :, n:] == torch.inf).all() for i, n in enumerate(lengths))
    lse = torch.cat([logsumexp[i, :, :n] for i, n in enumerate(lengths)], 1)
    pack = (cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), scale)
    operands = (t[0] for t in (grad_out_, query, key, value, out))
    dq, dk, dv = backward(*operands, lse.contiguous(), *pack, keyless=-torch.inf)
    for i in range(len(lengths)):
        rows, keys = (slice(e[i], e[i + 1]) for e in ends)
        if rows.start == rows.stop or keys.start == keys.stop:
            dq[rows] = dk[keys] = dv[keys] = torch.nan
    return dq[None], dk[None], dv[None], None
