"""Attention by its formula: the fp64 oracle, and the yardstick that rounds where a kernel may. CPU only, no kernel
lives here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def oracle(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """fp64 on the CPU; gradients by autograd of the formula itself."""
    return _evaluate(inputs, torch.float64, _one_sequence)


def yardstick(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same in the dtype of the inputs, naive: logits and sums in fp32 or better, all else rounded.

    Gradients follow the formula all flash kernels use, dlogits = p * (dp - dout . out): it subtracts two rounded sums,
    which is what the contract's backward inputs imply, and autograd of the softmax does not.
    """
    return _evaluate(inputs, inputs["q"].dtype, lambda *sequence: _FlashBackward.apply(*sequence))


def _evaluate(inputs: Mapping[str, Any], dtype: torch.dtype, attend: Callable[..., Any]) -> dict[str, Tensor]:
    named = {name: inputs[name].detach() for name in ("q", "k", "v")}
    if inputs.get("rows") is not None:
        named["q"] = named["q"][:, inputs["rows"]]
    leaves = [t.to(dtype).requires_grad_("grad_out" in inputs) for t in named.values()]
    scale = inputs.get("scale")
    scale = 1.0 / math.sqrt(leaves[0].shape[-1]) if scale is None else scale
    outs, lses = [], []
    for q_SHD, k_SHD, v_SHD, mask_S in sequences(inputs, *leaves):
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


def sequences(
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
    logits_HQK = _logits(q_SHD, k_SHD, scale)
    if not k_SHD.shape[0]:
        # Filled and not multiplied by 0: a NaN in q is in no part of the result.
        nothing = q_SHD.masked_fill(torch.ones((), dtype=torch.bool), 0)
        return nothing, logits_HQK.new_full(logits_HQK.shape[:2], -math.inf)
    max_HQ1 = logits_HQK.detach().amax(dim=-1, keepdim=True)
    sums_HQ = (logits_HQK - max_HQ1).exp().to(q_SHD.dtype).to(logits_HQK.dtype).sum(dim=-1)
    lse_HQ = max_HQ1.squeeze(-1) + sums_HQ.log()
    return _product("hqk,khd->qhd", logits_HQK.softmax(dim=-1).to(q_SHD.dtype), v_SHD), lse_HQ


def _logits(q_SHD: Tensor, k_SHD: Tensor, scale: float) -> Tensor:
    """[H, Q, K] in fp32 or better; products of bf16 and fp16 numbers are exact there."""
    wide = torch.float64 if q_SHD.dtype == torch.float64 else torch.float32
    return _product("qhd,khd->hqk", q_SHD.to(wide), k_SHD.to(wide) * scale)


def _product(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """einsum over one summed letter. In fp32 it adds one term after the other, the plainest order there is: the order
    of a CPU library is an accident of that library, and a kernel may keep to any.
    """
    if a.dtype != torch.float32:
        return torch.einsum(equation, a, b)
    left, right, out = equation.replace("->", ",").split(",")
    (letter,) = {x for x in left if x in right} - set(out)
    pairs = list(zip(_spread(a, left, letter + out), _spread(b, right, letter + out), strict=True))
    if not pairs:
        return torch.einsum(equation, a, b)
    first = (x.select(letters.index(letter), 0) for x, letters in ((a, left), (b, right)))
    total = torch.einsum(equation.replace(letter, ""), *first)
    term = torch.empty_like(total)  # fresh memory for each would take most of the time
    for pair in pairs[1:]:
        total += torch.mul(*pair, out=term)
    return total


def _spread(x: Tensor, letters: str, order: str) -> Tensor:
    """x [*letters] with its dimensions in another order, which has more: those are of size 1."""
    x = x.permute([letters.index(letter) for letter in order if letter in letters]).contiguous()
    return x[tuple(slice(None) if letter in letters else None for letter in order)]


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
        kept = slice(None) if mask is None else mask
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        k, v = k[kept], v[kept]
        p_HQK = (_logits(q, k, ctx.scale) - lse[..., None]).exp()
        delta_HQ1 = (dout * out).to(lse.dtype).sum(-1).mT[..., None]
        dp_HQK = _logits(dout, v, 1.0)
        dlogits_HQK = (p_HQK * (dp_HQK - delta_HQ1) * ctx.scale).to(q.dtype)
        dq = _product("hqk,khd->qhd", dlogits_HQK, k)
        dk[kept] = _product("hqk,qhd->khd", dlogits_HQK, q)
        dv[kept] = _product("hqk,qhd->khd", p_HQK.to(q.dtype), dout)
        return dq, dk, dv, None, None
