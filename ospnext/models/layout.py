"""How the token stream [B, N, C] is laid out for one grid: orders, subsequences, rotary tables, switches. Tensors on
the model's device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ospnext.models.config import BlockKind
from ospnext.models.rope import rope_tables
from ospnext.parallel import Exchange, Gather, Ulysses
from ospnext.sparse import Grid, OrderKind, skiparse_plan


@dataclass(frozen=True, eq=False)
class Subsequences:
    """Contiguous, non-empty pieces of each sample's stream that attend only within themselves."""

    lengths: tuple[int, ...]
    #: int32 [B * pieces + 1], or None when all pieces are equally long and a plain batch serves.
    cu_seqlens: Tensor | None


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What one block needs to know: its pieces, its rotary tables [N, D/2], and the switch [N] to the next block's
    order (or None).
    """

    subsequences: Subsequences
    cos: Tensor
    sin: Tensor
    switch: Tensor | None
    #: Where ranks share a sample: how those of a block exchange heads for tokens, and where tokens go after it.
    ulysses: Ulysses | None = None
    exchange: Exchange | None = None


@dataclass(frozen=True, eq=False)
class StreamLayout:
    """Plan of a forward: `enter` [N] takes raster tokens into the first block's order, `leave` [N] the last block's
    order to raster; where ranks share a sample, `gather` does, and `enter` takes this rank's tokens.
    """

    enter: Tensor | None
    blocks: tuple[BlockPlan, ...]
    leave: Tensor | None
    gather: Gather | None = None


def block_orders(kinds: Sequence[BlockKind]) -> tuple[OrderKind, ...]:
    """The order in which each block sees the stream.

    A sparse block needs its own order. A full block computes the same in any order, so it keeps the one that is there,
    and the leading ones take that of the first sparse block: no block moves the stream only to be able to run.
    """
    orders: list[OrderKind] = []
    current: OrderKind = "token"
    for kind in kinds:
        current = kind if kind != "full" else current
        orders.append(current)
    return tuple(orders)


def stream_layout(
    kinds: Sequence[BlockKind],
    k: int,
    grid: Grid,
    batch: int,
    head_pairs: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> StreamLayout:
    """Build the layout; `dtype` is that of the rotary tables. With k = 1 every order is the raster order."""
    plan = skiparse_plan(grid, k)
    orders = block_orders(kinds)
    whole = subsequences((plan.tokens,), batch, device)
    sparse = {kind: subsequences(plan.order(kind).lengths, batch, device) for kind in set(orders)}
    tables = {
        kind: [t.to(device) for t in rope_tables(grid, plan.order(kind).raster, head_pairs, dtype)]
        for kind in set(orders)
    }
    switches = {(a, b): plan.switch(a, b).to(device) for a, b in itertools.pairwise(orders) if a != b}

    blocks = []
    for i, (kind, order) in enumerate(zip(kinds, orders, strict=True)):
        following = orders[i + 1] if i + 1 < len(orders) else order
        cos, sin = tables[order]
        blocks.append(BlockPlan(whole if kind == "full" else sparse[order], cos, sin, switches.get((order, following))))
    if k == 1:
        return StreamLayout(None, tuple(blocks), None)
    enter, leave = plan.order(orders[0]).raster, plan.order(orders[-1]).position
    return StreamLayout(enter.to(device), tuple(blocks), leave.to(device))


def subsequences(lengths: Sequence[int], batch: int, device: torch.device) -> Subsequences:
    lengths = tuple(n for n in lengths if n)
    if len(set(lengths)) == 1:
        return Subsequences(lengths, None)
    ends = torch.tensor((0, *lengths * batch), device="cpu").cumsum(0)
    return Subsequences(lengths, ends.to(device, torch.int32))
