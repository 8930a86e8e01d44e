"""The layout of one rank, where several share each sample: which tokens it embeds, how its blocks attend, and where
their tokens go.

Full blocks run on the tokens that sparse ones want next, so that going from one kind to the other moves nothing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ospnext.errors import ConfigError
from ospnext.models.config import BlockKind
from ospnext.models.layout import BlockPlan, StreamLayout, block_orders, subsequences
from ospnext.models.rope import rope_tables
from ospnext.parallel import (
    Exchange,
    Gather,
    Placement,
    SequenceParallel,
    Switch,
    Ulysses,
    arranged,
    first_placement,
    switch,
)
from ospnext.sparse import Grid, OrderKind, skiparse_plan


def rank_layout(
    kinds: Sequence[BlockKind],
    k: int,
    grid: Grid,
    batch: int,
    head_pairs: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    sequence: SequenceParallel,
) -> StreamLayout:
    """As `stream_layout`, for the rank that `sequence` is.

    Raises:
        ConfigError: the grid is so small that a rank would hold no token.
    """
    placements, switches = _walk(block_orders(kinds), k, grid, sequence)
    tables: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = []
    for i, (kind, held) in enumerate(zip(kinds, placements, strict=True)):
        if id(held) not in tables:
            own = held.raster[sequence.rank]
            cos, sin = rope_tables(grid, own, head_pairs, dtype)
            tables[id(held)] = cos.to(device), sin.to(device)
        ulysses = _of_full(held, sequence) if kind == "full" else _of_sparse(held, sequence, device)
        pieces = (sum(held.tokens),) if kind == "full" else _joined(held, sequence)
        step = switches[i]
        blocks.append(
            BlockPlan(
                subsequences(pieces, batch, device),
                *tables[id(held)],
                None if step is None or step.send is None else step.send.to(device),
                ulysses,
                None if step is None else _exchange(step, sequence, device),
            )
        )
    first, last = placements[0], placements[-1]
    return StreamLayout(first.raster[sequence.rank].to(device), tuple(blocks), None, _gather(last, sequence, device))


def _walk(
    orders: Sequence[OrderKind], k: int, grid: Grid, sequence: SequenceParallel
) -> tuple[list[Placement], list[Switch | None]]:
    """The placement of each block, and what this rank does after it. Blocks alike share one."""
    plan, shape = skiparse_plan(grid, k), (sequence.ssp, sequence.ulysses)
    held = first_placement(plan, orders[0], *shape)
    known: dict[tuple[int, OrderKind], tuple[Placement, list[Switch]]] = {}
    placements = [held]
    steps: list[Switch | None] = []
    for order, following in itertools.pairwise(orders):
        if order == following:
            placements.append(held)
            steps.append(None)
            continue
        if (id(held), following) not in known:
            known[id(held), following] = _settled(*switch(plan, held, following, *shape), placements)
        held, of_ranks = known[id(held), following]
        placements.append(held)
        steps.append(of_ranks[sequence.rank])
    for held in placements:  # on every rank, so that all of them raise
        if 0 in held.tokens:
            raise ConfigError(
                f"a grid of {grid} tokens leaves rank {held.tokens.index(0)} of {sequence.ranks} without any "
                f"(ssp {sequence.ssp}, ulysses {sequence.ulysses}): take fewer ranks or a larger video"
            )
    return placements, [*steps, None]


def _settled(after: Placement, steps: list[Switch], before: list[Placement]) -> tuple[Placement, list[Switch]]:
    """With the placement itself, where one before is the same: its tables serve again."""
    for known in before:
        if known.kind == after.kind and all(map(torch.equal, known.raster, after.raster)):
            return known, steps
    return after, steps


def _of_full(held: Placement, sequence: SequenceParallel) -> Ulysses | None:
    """All ranks, and tokens in whatever order: one sequence."""
    return None if sequence.ranks == 1 else Ulysses(held.tokens, sequence.rank, sequence.group)


def _of_sparse(held: Placement, sequence: SequenceParallel, device: torch.device) -> Ulysses | None:
    if sequence.ulysses == 1:
        return None
    peers = sequence.peers
    arrange = arranged([held.lengths[r] for r in peers])
    return Ulysses(
        tuple(held.tokens[r] for r in peers),
        sequence.rank - peers.start,
        sequence.ulysses_group,
        None if arrange is None else arrange.to(device),
        None if arrange is None else torch.argsort(arrange).to(device),
    )


def _joined(held: Placement, sequence: SequenceParallel) -> list[int]:
    """Tokens of each subsequence of this rank, those of its peers included."""
    return [sum(parts) for parts in zip(*(held.lengths[r] for r in sequence.peers), strict=True)]


def _exchange(step: Switch, sequence: SequenceParallel, device: torch.device) -> Exchange:
    arrange = None if step.arrange is None else step.arrange.to(device)
    return Exchange(step.send_splits, step.receive_splits, arrange, sequence.group, sequence.payload)


def _gather(held: Placement, sequence: SequenceParallel, device: torch.device) -> Gather:
    longest = max(held.tokens)
    leave = torch.empty(sum(held.tokens), dtype=torch.int64)
    for rank, raster in enumerate(held.raster):
        leave[raster] = rank * longest + torch.arange(len(raster))
    return Gather(longest, leave.to(device), sequence.group)
