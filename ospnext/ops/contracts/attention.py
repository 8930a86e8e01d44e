"""The attention contract: everything that is true about attention, stated once. No kernel lives here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Contract

MEANING = """\
out = softmax(q k^T * scale) v for each head, over dense or packed sequences.

Layout      dense q [B, Sq, H, D], k and v [B, Sk, H, D]; packed q [Tq, H, D], k and v [Tk, H, D] with int32 cu_seqlens
            [sequences + 1] that start at 0, do not decrease and end at T. Empty sequences are legal. Any strides.
Scale       default 1 / sqrt(D).
Key mask    boolean [B, Sk] (dense only), True = the key takes part. A query all of whose keys are masked, and a query
            of a sequence without keys, gives a row of zeros and logsumexp -inf, and receives and sends zero gradient.
            Values of masked keys never reach the result, NaN and Inf included.
Logsumexp   natural, of the scaled logits, fp32 (fp64 for fp64 inputs): dense [B, H, Sq], packed [H, Tq]. It carries no
            gradient.
Dtype       q, k and v agree; products accumulate in fp32 or better; the output has the dtype of q and is contiguous.
Backward    dq, dk and dv from (dout, q, k, v, out, logsumexp): those five say all, so that the backward of one
            implementation may follow the forward of another.
Purity      inputs are not written; outputs alias nothing.
"""


@dataclass(frozen=True)
class AttentionRequest:
    """What selection knows of a call. Fields with a default are features: an implementation that does not list one
    refuses it.
    """

    device_type: str
    dtype: torch.dtype
    #: Sequences: batch size, or number of packed sequences.
    batch: int
    #: Longest query and key sequence.
    q_len: int
    kv_len: int
    heads: int
    head_dim: int
    packed: bool = False
    key_mask: bool = False
    custom_scale: bool = False
    logsumexp: bool = False
    backward: bool = False
    deterministic: bool = False


def oracle(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """fp64 on the CPU; gradients by autograd of the formula itself."""
    return _evaluate(inputs, torch.float64, _one_sequence)


def yardstick(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same in the dtype of the inputs, naive, with the scale moved onto the keys.

    Gradients follow the formula all flash kernels use, dlogits = p * (dp - dout . out): it subtracts two rounded sums,
    which is what the contract's backward inputs imply, and autograd of the softmax does not.
    """
    return _evaluate(inputs, inputs["q"].dtype, lambda *sequence: _FlashBackward.apply(*sequence))


def _evaluate(inputs: Mapping[str, Any], dtype: torch.dtype, attend: Callable[..., Any]) -> dict[str, Tensor]:
    leaves = [inputs[name].detach().to(dtype).requires_grad_() for name in ("q", "k", "v")]
    scale = inputs.get("scale") or 1.0 / math.sqrt(leaves[0].shape[-1])
    outs, lses = [], []
    for q_SHD, k_SHD, v_SHD, mask_S in _sequences(inputs, *leaves):
        out, lse = attend(q_SHD, k_SHD, v_SHD, mask_S, scale)
        outs.append(out)
        lses.append(lse)
    packed = inputs.get("cu_seqlens_q") is not None
    result = {"out": torch.cat(outs) if packed else torch.stack(outs)}
    if "grad_out" in inputs:
        grads = torch.autograd.grad(result["out"], leaves, inputs["grad_out"].to(dtype))
        result |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    if inputs.get("return_lse"):
        lse = torch.cat(lses, dim=-1) if packed else torch.stack(lses)
        result["lse"] = lse.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return {name: value.detach() for name, value in result.items()}


def _sequences(
    inputs: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    mask_BS = inputs.get("key_mask")
    if inputs.get("cu_seqlens_q") is None:
        for b in range(q.shape[0]):
            yield q[b], k[b], v[b], None if mask_BS is None else mask_BS[b]
        return
    q_ends, kv_ends = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_kv"].tolist()
    for i in range(len(q_ends) - 1):
        kv = slice(kv_ends[i], kv_ends[i + 1])
        yield q[q_ends[i] : q_ends[i + 1]], k[kv], v[kv], None


def _one_sequence(
    q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, mask_S: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if mask_S is not None:
        k_SHD, v_SHD = k_SHD[mask_S], v_SHD[mask_S]  # masked keys leave the computation altogether
    logits_HQK = _product("qhd,khd->hqk", q_SHD, k_SHD * scale)
    lse_HQ = (
        torch.logsumexp(logits_HQK, dim=-1) if k_SHD.shape[0] else logits_HQK.new_full(logits_HQK.shape[:2], -math.inf)
    )
    return _product("hqk,khd->qhd", logits_HQK.softmax(dim=-1), v_SHD), lse_HQ


def _product(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """einsum over one summed letter. In fp32 it adds one term after the other, the plainest order there is: the order
    of a CPU library is an accident of that library, and a kernel may keep to any.
    """
    if a.dtype != torch.float32:
        return torch.einsum(equation, a, b)
    left, right, out = equation.replace("->", ",").split(",")
    (letter,) = {x for x in left if x in right} - set(out)
    total: Tensor | None = None
    outer = equation.replace(letter, "")
    for left_term, right_term in zip(a.unbind(left.index(letter)), b.unbind(right.index(letter)), strict=True):
        term = torch.einsum(outer, left_term, right_term)
        total = term if total is None else total.add_(term)
    return torch.einsum(equation, a, b) if total is None else total


class _FlashBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, mask_S: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _one_sequence(q_SHD, k_SHD, v_SHD, mask_S, scale)
        ctx.save_for_backward(q_SHD, k_SHD, v_SHD, mask_S, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, k, v, mask, out, lse = ctx.saved_tensors
        dout = grads[0]
        p_HQK = (_product("qhd,khd->hqk", q, k * ctx.scale) - lse[..., None]).exp()
        if mask is not None:
            p_HQK = p_HQK.where(mask, 0.0)
        delta_HQ1 = (dout * out).sum(-1).mT[..., None]
        dlogits_HQK = p_HQK * (_product("qhd,khd->hqk", dout, v) - delta_HQ1) * ctx.scale
        dq, dk = _product("hqk,khd->qhd", dlogits_HQK, k), _product("hqk,qhd->khd", dlogits_HQK, q)
        return dq, dk, _product("hqk,qhd->khd", p_HQK, dout), None, None


def make_inputs(case: Case) -> dict[str, Any]:
    """CPU inputs of a case, in its dtype; the seed is the case's own id, so that every machine sees the same
    numbers.
    """
    request: AttentionRequest = case.request
    generator = torch.Generator().manual_seed(sum(case.id.encode()) * 7919)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(request.dtype)

    heads = (request.heads, request.head_dim)
    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    if request.packed:
        q_lens, kv_lens = case.options["q_lens"], case.options["kv_lens"]
        q_shape, kv_shape = (sum(q_lens), *heads), (sum(kv_lens), *heads)
    else:
        q_shape, kv_shape = (request.batch, request.q_len, *heads), (request.batch, request.kv_len, *heads)
    inputs: dict[str, Any] = {
        "q": randn(*q_shape),
        "k": randn(*kv_shape),
        "v": randn(*kv_shape),
        "return_lse": request.logsumexp,
    }
    if request.packed:
        inputs["cu_seqlens_q"], inputs["cu_seqlens_kv"] = (cumulative(lens) for lens in (q_lens, kv_lens))
        inputs["max_seqlen_q"], inputs["max_seqlen_kv"] = request.q_len, request.kv_len
    if request.key_mask:
        mask_BS = torch.rand(request.batch, request.kv_len, generator=generator) < 0.5
        mask_BS[-1, 0], mask_BS[-1, -1] = True, False
        mask_BS[0] = False  # a fully masked row belongs to every masked case
        inputs["key_mask"] = mask_BS
    if request.custom_scale:
        inputs["scale"] = 0.3
    if request.backward:
        inputs["grad_out"] = randn(*q_shape)
    return inputs


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    """int32 cu_seqlens [sequences + 1] of sequence lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def call(**inputs: Any) -> dict[str, Tensor]:
    """Run the public functions on the inputs of a case, gradients included."""
    from ospnext import ops

    grad_out = inputs.pop("grad_out", None)
    return_lse = inputs.pop("return_lse", False)
    leaves = [inputs.pop(name).detach().requires_grad_(grad_out is not None) for name in ("q", "k", "v")]
    packed = inputs.get("cu_seqlens_q") is not None
    found = (ops.attention_packed if packed else ops.attention)(*leaves, **inputs, return_lse=return_lse)
    result = dict(zip(("out", "lse"), found, strict=True)) if return_lse else {"out": found}
    if grad_out is not None:
        result |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(result["out"], leaves, grad_out), strict=True))
    return {name: value.detach() for name, value in result.items()}


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SHAPES = (  # batch, q_len, kv_len: one token, odd lengths, 64 mod 128, unequal, and text keys
    (1, 1, 3),
    (2, 113, 113),
    (1, 239, 203),
    (1, 704, 704),
    (2, 128, 512),
    (1, 1023, 1024),
)
_PACKS = {"uneven": ((93, 93, 88, 88), (93, 93, 88, 88)), "empty": ((5, 0, 64, 1), (7, 3, 0, 130))}


def cases() -> Iterator[Case]:
    """Dense shapes x dtypes x features, and packed ones. All are required: a backend without them cannot run the
    model.
    """
    for tag in _DTYPES:
        for batch, q_len, kv_len in _SHAPES:
            for feature in ("plain", "mask", "scale", "lse", "backward", "mask-lse-backward"):
                # The first sample of a masked case has no key at all, so that it takes another one to see the mask.
                samples = max(batch, 2) if "mask" in feature else batch
                yield _case(f"b{samples}-q{q_len}-k{kv_len}", tag, feature, (samples, q_len, kv_len, 2, 64))
        yield _case("b1-q257-k257", tag, "lse-backward", (1, 257, 257, 3, 128))
        for name, (q_lens, kv_lens) in _PACKS.items():
            for feature in ("plain", "lse-backward"):
                sizes = (len(q_lens), max(q_lens), max(kv_lens), 2, 64)
                yield _case(f"packed-{name}", tag, feature, sizes, {"q_lens": q_lens, "kv_lens": kv_lens})


def _case(
    shape: str, tag: str, feature: str, sizes: tuple[int, int, int, int, int], pack: Mapping[str, Any] | None = None
) -> Case:
    """`sizes` are batch, longest query and key sequence, heads and head_dim."""
    words = feature.split("-")
    batch, q_len, kv_len, heads, head_dim = sizes
    request = AttentionRequest(
        "cpu",
        _DTYPES[tag],
        batch,
        q_len,
        kv_len,
        heads,
        head_dim,
        packed=pack is not None,
        key_mask="mask" in words,
        custom_scale="scale" in words,
        logsumexp="lse" in words,
        backward="backward" in words,
    )
    return Case(f"attention/required/{shape}-h{heads}-d{head_dim}-{tag}-{feature}", "required", request, pack or {})


CONTRACT = Contract(
    name="attention",
    family="attention",
    level="required",
    request=AttentionRequest,
    meaning=MEANING,
    inputs=make_inputs,
    oracle=oracle,
    yardstick=yardstick,
    call=call,
    cases=cases,
)
