"""The logsumexp of the contract from the vendor's statistics of a softmax, and back: the largest logit of each row and
the sum of exponentials relative to it, each eight times in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: How often each number is repeated, to fill a block of 32 bytes.
REPEATED = 8


def logsumexp(largest: Tensor, total: Tensor) -> Tensor:
    """fp32 [B, H, S] of a dense call's [B, H, S, 8]."""
    return largest[..., 0] + total[..., 0].log()


def statistics(lse: Tensor) -> tuple[Tensor, Tensor]:
    """(largest, total) for which exp(logit - largest) / total is exp(logit - lse): the logsumexp itself, and 1.

    The forward pass has two of these tensors; keeping lse instead takes a sixteenth of their memory. Rows without keys
    get a number so large that their probabilities are 0, whatever their logits are.
    """
    bounded = lse.masked_fill(lse == -torch.inf, torch.finfo(lse.dtype).max)
    largest = bounded[..., None].expand(*lse.shape, REPEATED).contiguous()
    return largest, torch.ones_like(largest)


def logsumexp_of_pack(largest: Tensor, total: Tensor, lengths: Sequence[int]) -> Tensor:
    """fp32 [H, T] of a packed call's [T, H, 8]: that is its shape, while in memory the statistics of one sequence
    follow those of another, each [H, S, 8].

    The argument softmax_layout="TND" is to change that, but does so with recent versions of CANN only."""
    tokens, heads, _ = largest.shape
    in_order = logsumexp(largest, total).reshape(tokens * heads)
    blocks = in_order.split([heads * length for length in lengths])
    return torch.cat([block.view(heads, -1) for block in blocks], dim=1)


def statistics_of_pack(lse_HT: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The inverse, as `statistics`."""
    in_order = torch.cat([block.flatten() for block in lse_HT.split(list(lengths), dim=1)])
    return statistics(in_order.view(lse_HT.shape[1], lse_HT.shape[0]))
