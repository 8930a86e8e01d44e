"""Which tokens each rank holds, and in which order: integer geometry only, the same on every rank. No communication.

R = ssp x ulysses ranks share one sample. With k^2 subsequences, ssp group i owns the subsequences [i G, (i + 1) G)
whole, G = k^2 / ssp; its ulysses ranks hold even parts of each. Rank r = i x ulysses + j. In a sparse block the ranks
of an ssp group exchange heads for tokens, and those of different groups nothing; going from token to group
subsequences every rank sends each other one what that will own. Inside a subsequence the order does not matter to
attention, because RoPE travels with the token: so tokens stay in the order in which they arrive, and no copy puts
them in another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ospnext.sparse import Order, OrderKind, SkiparsePlan


@dataclass(frozen=True, eq=False)
class Placement:
    """`raster[r]` int64 [n_r]: raster indices of the tokens of rank r, in the order in which it holds them.
    `lengths[r]`: of how many of them each of its G subsequences consists, one after the other.
    """

    kind: OrderKind
    raster: tuple[Tensor, ...]
    lengths: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(len(raster) for raster in self.raster)


@dataclass(frozen=True, eq=False)
class Switch:
    """How one rank's tokens go from a placement to the next: rows `send` of what it holds, to each rank `send_splits`
    of them; what arrives, `receive_splits` from each, is in its order once rows `arrange` are taken.

    `send` and `arrange` are int64 or None, which is as it is."""

    send: Tensor | None
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    arrange: Tensor | None


def first_placement(plan: SkiparsePlan, kind: OrderKind, ssp: int, ulysses: int) -> Placement:
    """Of the subsequences of one kind, each in raster order.

    Raises:
        ValueError: the subsequences cannot be shared evenly by `ssp` groups; the message lists what can.
    """
    order = plan.order(kind)
    owner = _owners(order, ssp, ulysses)
    in_stream = owner[order.raster]
    raster = tuple(order.raster[in_stream == r] for r in range(ssp * ulysses))
    return Placement(kind, raster, _lengths(order, raster, ssp, ulysses))


def switch(
    plan: SkiparsePlan, before: Placement, kind: OrderKind, ssp: int, ulysses: int
) -> tuple[Placement, list[Switch]]:
    """The placement by subsequences of the other `kind` that follows from `before`, and what each rank does for it."""
    order, ranks = plan.order(kind), ssp * ulysses
    owner, piece = _owners(order, ssp, ulysses), _subsequences(order)
    sent, orders = [], []
    for raster in before.raster:
        to = owner[raster]
        by_rank = torch.argsort(to, stable=True)
        orders.append(by_rank)
        sent.append(raster[by_rank].split(torch.bincount(to, minlength=ranks).tolist()))
    held, arranges = [], []
    for r in range(ranks):
        arrived = torch.cat([parts[r] for parts in sent])
        by_piece = torch.argsort(piece[arrived], stable=True)
        arranges.append(_unless_identity(by_piece))
        held.append(arrived[by_piece])
    after = Placement(kind, tuple(held), _lengths(order, held, ssp, ulysses))
    steps = [
        Switch(
            _unless_identity(orders[r]),
            tuple(len(part) for part in sent[r]),
            tuple(len(parts[r]) for parts in sent),
            arranges[r],
        )
        for r in range(ranks)
    ]
    return after, steps


def _owners(order: Order, ssp: int, ulysses: int) -> Tensor:
    """int64 [N]: the rank of each token, by raster index."""
    count = len(order.lengths)
    if ssp < 1 or ulysses < 1 or count % ssp:
        legal = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"{count} subsequences cannot be shared by ssp={ssp} groups of ulysses={ulysses} ranks: ssp must be one of "
            f"{legal}, ulysses at least 1"
        )
    share = count // ssp
    ranks = []
    for i, length in enumerate(order.lengths):
        parts = torch.arange(length) * ulysses // max(length, 1)  # as even as can be, in stream order
        ranks.append(parts + i // share * ulysses)
    owner = torch.empty(len(order.raster), dtype=torch.int64)
    owner[order.raster] = torch.cat(ranks)
    return owner


def _subsequences(order: Order) -> Tensor:
    """int64 [N]: the subsequence of each token, by raster index."""
    piece = torch.empty(len(order.raster), dtype=torch.int64)
    piece[order.raster] = torch.repeat_interleave(torch.arange(len(order.lengths)), torch.tensor(order.lengths))
    return piece


def _lengths(order: Order, raster: Sequence[Tensor], ssp: int, ulysses: int) -> tuple[tuple[int, ...], ...]:
    share, piece = len(order.lengths) // ssp, _subsequences(order)
    found = []
    for r, held in enumerate(raster):
        counts = torch.bincount(piece[held], minlength=len(order.lengths))
        first = r // ulysses * share
        found.append(tuple(counts[first : first + share].tolist()))
    return tuple(found)


def _unless_identity(index: Tensor) -> Tensor | None:
    return None if torch.equal(index, torch.arange(len(index))) else index
