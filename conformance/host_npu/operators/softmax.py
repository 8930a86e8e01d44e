"""Arithmetic of attention, forward and backward, on one sequence of heads: fp32 throughout, in blocks of rows that stay
in cache. What an operator documents, its layouts and refusals, is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .masks import Mask

#: What takes the place of a masked logit; also the largest of a row that is masked out entirely.
LOWEST = torch.finfo(torch.float32).min
#: Sum of such a row, where the operator is asked to look for them. Its probabilities so become 0 in the backward pass.
HIGHEST = torch.finfo(torch.float32).max

#: Logits at a time.
_BLOCK = 1 << 20


def blocks(heads: int, rows: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Heads and rows whose logits are computed together."""
    some_heads = min(heads, max(1, _BLOCK // max(1, rows * keys)))
    some_rows = rows if some_heads > 1 else max(64, _BLOCK // max(1, keys))
    for head in range(0, heads, some_heads):
        for row in range(0, rows, some_rows):
            yield slice(head, min(head + some_heads, heads)), slice(row, min(row + some_rows, rows))


def logits(q: Tensor, k: Tensor, scale: float, mask: Mask | None, heads: slice, rows: slice) -> Tensor:
    """fp32 [heads, rows, keys] of q and k [N, S, D] in fp32."""
    s = torch.bmm(q[heads, rows], k[heads].transpose(1, 2)).mul_(scale)
    return s if mask is None else s.masked_fill_(mask.block(heads, rows), LOWEST)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Mask | None = None,
    *,
    empty_rows: bool = False,
    rounded: Callable[[Tensor], Tensor] = lambda p: p,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [N, Sq, Dv], largest logit and sum of exponentials [N, Sq, 1] of q, k, v [N, S, D], all fp32.

    A row that is masked out entirely averages all values, unless `empty_rows`: then it is zero, and its statistics are
    LOWEST and HIGHEST. `rounded` is what becomes of exp(logit - largest) before it multiplies values.
    """
    heads, rows = q.shape[:2]
    out = q.new_empty(heads, rows, v.shape[-1])
    largest, total = q.new_empty(heads, rows, 1), q.new_empty(heads, rows, 1)
    for block in blocks(heads, rows, k.shape[1]):
        s = logits(q, k, scale, mask, *block)
        most = s.amax(-1, keepdim=True)
        p = s.sub_(most).exp_()
        count = p.sum(-1, keepdim=True)
        if empty_rows:
            empty = most == LOWEST
            p.masked_fill_(empty, 0.0)
            count.masked_fill_(empty, HIGHEST)
        out[block] = torch.bmm(rounded(p), v[block[0]]).div_(count)
        largest[block], total[block] = most, count
    return out, largest, total


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    largest: Tensor,
    total: Tensor,
    scale: float,
    mask: Mask | None = None,
    *,
    rounded: Callable[[Tensor], Tensor] = lambda p: p,
    rounded_grad: Callable[[Tensor], Tensor] = lambda ds: ds,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attend`, from the statistics that are given: probabilities are exp(logit - largest) / total.

    `rounded` and `rounded_grad` are what becomes of the probabilities and of the gradient of the logits before they
    are multiplied again.
    """
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    row_sums = (grad * out).sum(-1, keepdim=True)
    for block in blocks(*q.shape[:2], k.shape[1]):
        heads, _ = block
        p = logits(q, k, scale, mask, *block).sub_(largest[block]).exp_().div_(total[block])
        dv[heads].baddbmm_(rounded(p).transpose(1, 2), grad[block])
        ds = torch.bmm(grad[block], v[heads].transpose(1, 2)).sub_(row_sums[block]).mul_(p)
        ds = rounded_grad(ds)
        dq[block] = torch.bmm(ds, k[heads]).mul_(scale)
        dk[heads].baddbmm_(ds.transpose(1, 2), q[block], alpha=scale)
    return dq, dk, dv
