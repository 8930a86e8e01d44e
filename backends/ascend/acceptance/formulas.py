"""Attention in fp64 on the CPU, for the few shapes that items ask about."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    left_out: Tensor | None = None,
    rounded: Callable[[Tensor], Tensor] = lambda p: p,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, S, H, D], largest logits and sums of exponentials [B, H, S]) of q, k, v [B, S, H, D].

    `left_out` broadcasts to [B, H, Sq, Sk]. A row of which all is left out gives 0. `rounded` is what becomes of
    exp(logit - largest) before it multiplies v.
    """
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) * scale
    if left_out is not None:
        logits = logits.masked_fill(left_out, -torch.inf)
    largest = logits.amax(-1)
    p = (logits - largest.nan_to_num(neginf=0.0)[..., None]).exp()
    total = p.sum(-1)
    out = rounded(p) @ v / total.clamp(min=1e-300)[..., None]
    return out.transpose(1, 2), largest, total


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, left_out: Tensor | None = None
) -> tuple[Tensor, ...]:
    """dq, dk and dv of `attention`."""
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    out, _, _ = attention(*leaves, scale, left_out)
    return torch.autograd.grad(out, leaves, grad.double())
