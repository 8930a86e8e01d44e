"""Predicted seconds of a forward or a training step: operations over rates, bytes over bandwidths, a latency for each
exchange. No more is in it: nothing overlaps, copies around an exchange and gaps between kernels cost nothing.

    block = max over ranks (linear FLOPs / linear rate + attention FLOPs / attention rate)
    exchange = latency + max over ranks (bytes sent or received, whichever are more) / bandwidth
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ospnext.models.config import BlockKind, TransformerConfig
from ospnext.parallel import Placement, Ulysses
from ospnext.parallel.wire import Transfer
from ospnext.planning.devices import Device

#: Forwards that a training step of a checkpointed block is worth: two, and a backward pass of two products for each of
#: a linear and five for the two of attention.
TRAINED_LINEAR, TRAINED_ATTENTION = 4.0, 4.5


@dataclass(frozen=True)
class BlockWork:
    """Operations of one block on each rank."""

    linear: tuple[int, ...]
    attention: tuple[int, ...]


@dataclass(frozen=True)
class Seconds:
    """`linear` and `attention` of the mean rank, `waiting` of it for the slowest in each block."""

    linear: float = 0.0
    attention: float = 0.0
    waiting: float = 0.0
    exchanging: float = 0.0
    latency: float = 0.0

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.waiting + self.exchanging + self.latency

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(self.parts.values(), other.parts.values(), strict=True)))

    def times(self, factor: float) -> Seconds:
        return Seconds(*(factor * part for part in self.parts.values()))

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("linear", "attention", "waiting", "exchanging", "latency")}


def block_work(config: TransformerConfig, kind: BlockKind, held: Placement, ulysses: int) -> BlockWork:
    """Of one sample. `held` is where tokens are during the block, `ulysses` the ranks that share a subsequence."""
    C, F, D, ranks = config.dim, config.ffn_dim, config.head_dim, len(held.raster)
    group = ranks if kind == "full" else ulysses
    linear, attention = [], []
    for rank, tokens in enumerate(held.tokens):
        first = rank - rank % group
        of_group = held.lengths[first : first + group]
        together = (
            [sum(sum(own) for own in of_group)] if kind == "full" else [sum(p) for p in zip(*of_group, strict=True)]
        )
        heads = Ulysses(held.tokens[first : first + group], 0, None).heads(config.num_heads)[rank - first]
        linear.append(2 * tokens * (6 * C * C + 2 * C * F))
        attention.append(4 * D * heads * sum(n * n for n in together) + 4 * tokens * config.text_len * C)
    return BlockWork(tuple(linear), tuple(attention))


def computing(
    works: Iterable[BlockWork], device: Device, *, linear8: bool, attention8: bool, training: bool
) -> Seconds:
    """Of all blocks, one after the other."""
    by_linear, by_attention = device.linear_rate(linear8), device.attention_rate(attention8)
    if training:
        by_linear, by_attention = by_linear / TRAINED_LINEAR, by_attention / TRAINED_ATTENTION
    linear = attention = slowest = 0.0
    for work in works:
        spent = [(a / by_linear, b / by_attention) for a, b in zip(work.linear, work.attention, strict=True)]
        linear += sum(a for a, _ in spent) / len(spent)
        attention += sum(b for _, b in spent) / len(spent)
        slowest += max(a + b for a, b in spent)
    return Seconds(linear, attention, max(0.0, slowest - linear - attention))


def exchanging(transfer: Transfer, ranks: Sequence[int], device: Device) -> Seconds:
    """`ranks[i]` is rank i of the transfer among all of the job, which fill one node after the other. What stays in a
    node and what leaves it travel at the same time.
    """
    node = [rank // int(device.per_node.value) for rank in ranks]
    span = range(len(ranks))
    inside = [[transfer.matrix[i][j] if node[i] == node[j] else 0 for j in span] for i in span]
    outside = [[transfer.matrix[i][j] if node[i] != node[j] else 0 for j in span] for i in span]
    near = _busiest(inside) / (1e9 * device.link_gbs.value * device.link_reached.value)
    far = _busiest(outside) / (1e9 * device.network_gbs.value * device.network_reached.value)
    latency = device.network_latency_us if len(set(node)) > 1 else device.link_latency_us
    return Seconds(exchanging=max(near, far), latency=1e-6 * latency.value)


def _busiest(matrix: list[list[int]]) -> int:
    """Bytes that the busiest rank sends, or receives."""
    return max(max(map(sum, matrix)), max(map(sum, zip(*matrix, strict=True))))


def weights_moving(parameters: int, itemsize: int, world: int, device: Device) -> tuple[int, float]:
    """(bytes that each rank sends, seconds) of fully sharded training: weights are gathered for the forward and for the
    backward pass in `itemsize` bytes, and gradients reduced in fp32. Nodes exchange a part once.
    """
    moved = parameters * (2 * itemsize + 4)
    per_node = min(int(device.per_node.value), world)
    nodes = -(-world // per_node)
    near = moved * (per_node - 1) / per_node / (1e9 * device.link_gbs.value * device.link_reached.value)
    far = moved * (nodes - 1) / nodes / per_node / (1e9 * device.network_gbs.value * device.network_reached.value)
    return moved * (world - 1) // world, max(near, far)
