"""Bytes that the ranks of a sample send each other, from where its tokens are. Formulas only: nothing is sent.

    B   samples                     N   tokens of a sample, n_r of them on rank r      R   ranks
    C   channels                    A   heads, a_r of them computed by rank r          s   bytes of an element
    D   channels of a head, C / A

What a rank keeps is not sent. The counts are those of `ops.collective_bytes`, which counts what is really asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ospnext.parallel.placement import Placement
from ospnext.parallel.ulysses import Ulysses

#: [from rank][to rank], the diagonal zero.
Matrix = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Transfer:
    """One collective: `matrix[i][j]` bytes from rank i to rank j."""

    name: str
    matrix: Matrix

    @property
    def sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends."""
        return tuple(sum(row) for row in self.matrix)

    @property
    def received(self) -> tuple[int, ...]:
        return tuple(sum(column) for column in zip(*self.matrix, strict=True))

    @property
    def adjoint(self) -> Transfer:
        """Of the backward pass: everything goes back where it came from."""
        return Transfer(f"{self.name}, backward", tuple(zip(*self.matrix, strict=True)))

    def times(self, factor: int) -> Transfer:
        return Transfer(self.name, tuple(tuple(factor * b for b in row) for row in self.matrix))


def total_sent(transfers: Sequence[Transfer], ranks: int) -> tuple[int, ...]:
    """Bytes that each rank sends in all of them."""
    return tuple(map(sum, zip(*(t.sent for t in transfers), strict=True))) if transfers else (0,) * ranks


def ulysses(tokens: Sequence[int], heads: int, head_bytes: int) -> tuple[Transfer, Transfer]:
    """The two exchanges of a block, among ranks that hold `tokens` of each sample; `head_bytes` = B D s.

    q, k and v, from i to j:         3 B D s n_i a_j
    the attention's output, i to j:  B D s a_i n_j

    With even parts each rank sends 3 V and V, where V = s B C (N / R) (1 - 1 / R).
    """
    shares = Ulysses(tuple(tokens), 0, None).heads(heads)
    qkv = _matrix(len(tokens), lambda i, j: 3 * head_bytes * tokens[i] * shares[j])
    out = _matrix(len(tokens), lambda i, j: head_bytes * shares[i] * tokens[j])
    return Transfer("q, k and v", qkv), Transfer("attention output", out)


def side_by_side(name: str, transfers: Sequence[Transfer]) -> Transfer:
    """The same exchange in groups of consecutive ranks, which send each other nothing."""
    of_rank = [(group, i) for group, t in enumerate(transfers) for i in range(len(t.matrix))]

    def sent(i: int, j: int) -> int:
        (group, own), (other, peer) = of_rank[i], of_rank[j]
        return transfers[group].matrix[own][peer] if group == other else 0

    return Transfer(name, _matrix(len(of_rank), sent))


@functools.lru_cache(maxsize=64)
def switch(before: Placement, after: Placement, token_bytes: int) -> Transfer:
    """From the subsequences of one kind to those of the other, from i to j: token_bytes |tokens of i before, j after|.

    `token_bytes` is B C s of a stream as it is, and B (C + 4) of HiFloat8 codes with a scale for each token. With even
    parts each rank sends V: a quarter of what the two exchanges of Ulysses send.
    """
    ranks = len(before.raster)
    pairs = _owner(before) * ranks + _owner(after)
    counts = torch.bincount(pairs, minlength=ranks * ranks).view(ranks, ranks).tolist()
    return Transfer("switch", _matrix(ranks, lambda i, j: token_bytes * counts[i][j]))


def gathered(name: str, ranks: int, part_bytes: int) -> Transfer:
    """An all_gather of as many bytes on each rank, and the reduce_scatter that is its adjoint: part_bytes from i to
    j.
    """
    return Transfer(name, _matrix(ranks, lambda i, j: part_bytes))


def reduced(name: str, ranks: int, held: int) -> Transfer:
    """An all_reduce of `held` bytes: 2 (held - held / R) are sent by each rank."""
    total = 2 * (held - held // ranks)
    others = max(1, ranks - 1)
    share = [total * (i + 1) // others - total * i // others for i in range(others)]
    return Transfer(name, _matrix(ranks, lambda i, j: share[(j - i) % ranks - 1]))


def _owner(placement: Placement) -> torch.Tensor:
    """int64 [N]: the rank of each token, by raster index."""
    owner = torch.empty(sum(placement.tokens), dtype=torch.int64)
    for rank, raster in enumerate(placement.raster):
        owner[raster] = rank
    return owner


def _matrix(ranks: int, sent: Callable[[int, int], int]) -> Matrix:
    return tuple(tuple(0 if i == j else sent(i, j) for j in range(ranks)) for i in range(ranks))
