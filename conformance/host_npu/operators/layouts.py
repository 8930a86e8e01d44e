"""Where sequences and heads lie in the tensors of an attention operator, by the name of its `input_layout`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .rules import require

DIMENSIONS = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "TND": 3}
#: Sequences of one packed call.
MOST_SEQUENCES = 2048


def heads_of(op: str, layout: str, tensor: Tensor, head_dim: int) -> int:
    """Heads of a tensor whose head dimension is known."""
    if layout in ("BSH", "SBH"):
        require(op, tensor.shape[2] % head_dim == 0, f"hidden size is a multiple of {head_dim}", tensor.shape[2])
        return tensor.shape[2] // head_dim
    return tensor.shape[1] if layout in ("BNSD", "TND") else tensor.shape[2]


def sequences(layout: str, tensor: Tensor, heads: int, lengths: Sequence[int] | None = None) -> list[Tensor]:
    """Views [N, S, D] of each sequence; `lengths` are those of a packed tensor, which need not use all of it."""
    if layout == "TND":
        assert lengths is not None
        used = tensor[: sum(lengths)]
        return [part.transpose(0, 1) for part in used.split(list(lengths))]
    if layout == "BNSD":
        whole = tensor
    elif layout == "BSND":
        whole = tensor.transpose(1, 2)
    else:
        apart = tensor.unflatten(-1, (heads, tensor.shape[-1] // heads))
        whole = apart.transpose(1, 2) if layout == "BSH" else apart.permute(1, 2, 0, 3)
    return list(whole.unbind(0))


def lengths_of(op: str, name: str, ends: Sequence[int] | None, total: int) -> list[int]:
    """Lengths of packed sequences from where each ends.

    The list has no 0 in front, unlike cu_seqlens, and it may close with zeros for sequences that take no part.
    """
    require(op, ends is not None and len(ends) > 0, f"{name} is given for layout TND")
    assert ends is not None
    taken = list(ends)
    while taken and taken[-1] == 0:
        taken.pop()
    require(op, len(ends) <= MOST_SEQUENCES, f"{name} has at most {MOST_SEQUENCES} entries", len(ends))
    rule = f"{name} says where each sequence ends, cumulated and without a leading 0"
    require(op, bool(taken) and taken[0] != 0, rule, _shortened(ends))
    require(op, all(a <= b for a, b in pairwise(taken)), f"{name} does not decrease", _shortened(ends))
    require(op, taken[-1] <= total, f"{name} ends within the {total} tokens", taken[-1])
    return [b - a for a, b in pairwise([0, *taken])] + [0] * (len(ends) - len(taken))


def _shortened(ends: Sequence[int]) -> str:
    return str(list(ends)) if len(ends) <= 8 else f"[{', '.join(map(str, ends[:8]))}, ...]"


def wide(x: Tensor, groups: int = 1) -> Tensor:
    """fp32 and contiguous, each head `groups` times in a row."""
    x = x.float().contiguous()
    return x if groups == 1 else x.repeat_interleave(groups, 0)


def narrow(gradient: Tensor, groups: int) -> Tensor:
    """Sum over the query heads that shared a head; undoes `wide`."""
    return gradient if groups == 1 else gradient.unflatten(0, (-1, groups)).sum(1)


def statistics_views(statistics: Tensor, lengths: Sequence[int] | None, layout: str) -> list[Tensor]:
    """Views [N, S, 8] of softmax_max or softmax_sum, of each sequence.

    Dense: [B, N, S, 8]. Packed: the shape is [T, N, 8] whatever the layout. With softmax_layout "TND" it means what it
    says. Without, each sequence is a block [N, S, 8] of its own, one after the other: the documents call it NTD, and
    for a single sequence it is. Reading that as [T, N, 8] mixes up heads and tokens.
    """
    if lengths is None:
        return list(statistics.unbind(0))
    if layout == "TND":
        return [part.transpose(0, 1) for part in statistics[: sum(lengths)].split(list(lengths))]
    heads = statistics.shape[1]
    flat = statistics.reshape(-1, 8) if not statistics.is_contiguous() else statistics.view(-1, 8)
    parts = flat[: sum(lengths) * heads].split([length * heads for length in lengths])
    return [part.view(heads, length, 8) for part, length in zip(parts, lengths, strict=True)]


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What an operator leaves where it does not write."""
    return torch.full(list(shape), torch.nan, dtype=dtype)
