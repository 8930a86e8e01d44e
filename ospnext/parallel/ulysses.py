"""Ulysses: ranks that hold different tokens exchange them for heads, attend, and exchange back. Uneven tokens and
uneven heads travel as they are, without padding. Source: arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ospnext.ops.collective import all_to_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Ulysses:
    """`tokens[r]` is what rank r of the group holds of each sample. `arrange` int64 [sum(tokens)], or None, takes the
    tokens of all ranks, one after the other, to subsequences in one piece each.
    """

    tokens: tuple[int, ...]
    rank: int
    group: ProcessGroup | None
    arrange: Tensor | None = None
    #: Its inverse.
    restore: Tensor | None = None

    def heads(self, heads: int) -> list[int]:
        """How many heads each rank computes: as even as can be."""
        ranks = len(self.tokens)
        return [heads * (r + 1) // ranks - heads * r // ranks for r in range(ranks)]

    def to_heads(self, *tensors_BnHD: Tensor) -> tuple[Tensor, ...]:
        """[B, n, H, D] each of this rank's tokens -> [B, N, h, D] each, of all tokens and this rank's heads, in one
        exchange.
        """
        together = torch.stack(tensors_BnHD, dim=3)  # [B, n, H, T, D]: what belongs to a head is in one piece
        B, _, H, T, D = together.shape
        heads, mine = self.heads(H), self.heads(H)[self.rank]
        sent = torch.cat([part.reshape(-1, D) for part in together.transpose(0, 1).split(heads, dim=2)])
        rows = [B * T * h * self.tokens[self.rank] for h in heads]
        arrived = all_to_all(sent, rows, [B * T * mine * n for n in self.tokens], self.group)
        arrived = _taken(arrived.view(-1, B, mine, T, D), self.arrange)
        return arrived.transpose(0, 1).unbind(dim=3)

    def to_tokens(self, out_BNhD: Tensor, heads: int) -> Tensor:
        """The way back: [B, N, h, D] -> [B, n, H, D]."""
        B, _, mine, D = out_BNhD.shape
        sent = _taken(out_BNhD.transpose(0, 1), self.restore)  # [N, B, h, D]
        rows = [B * mine * n for n in self.tokens]
        own, each = self.tokens[self.rank], self.heads(heads)
        arrived = all_to_all(sent.reshape(-1, D), rows, [B * h * own for h in each], self.group)
        parts = arrived.split([B * h * own for h in each])
        return torch.cat([p.view(own, B, h, D) for p, h in zip(parts, each, strict=True)], dim=2).transpose(0, 1)


def arranged(lengths: Sequence[Sequence[int]]) -> Tensor | None:
    """int64: from the tokens of all ranks, of which each holds `lengths[r][g]` of subsequence g, to whole subsequences;
    None where they are that already.
    """
    piece = torch.cat([torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own)) for own in lengths])
    index = torch.argsort(piece, stable=True)
    return None if torch.equal(index, torch.arange(len(index))) else index


def _taken(t: Tensor, index: Tensor | None) -> Tensor:
    return t if index is None else t[index]
