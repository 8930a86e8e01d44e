"""Every legal layout of a number of devices for one model and video: tokens, memory, bytes, predicted time, best first.

All of it is arithmetic on the config, the grid and the figures of a device. Nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ospnext.errors import ConfigError
from ospnext.models.config import TransformerConfig
from ospnext.models.layout import block_orders
from ospnext.models.parallelize import divisible
from ospnext.models.traffic import (
    forward_traffic,
    gradient_scales,
    placements,
    shared_scales,
    training_traffic,
    without_sparsity,
)
from ospnext.models.weights.quantized import Quantization
from ospnext.parallel.config import ParallelConfig, legal
from ospnext.parallel.exchange import Payload
from ospnext.parallel.wire import Transfer, gathered, total_sent
from ospnext.planning.devices import Device
from ospnext.planning.rank_memory import sampling_memory, training_memory
from ospnext.planning.step_time import Seconds, block_work, computing, exchanging, weights_moving
from ospnext.sparse import Grid


@dataclass(frozen=True)
class Question:
    """What is asked. A step is one of denoising, with all `branches` of guidance, or one of training on a sample."""

    config: TransformerConfig
    grid: Grid
    gpus: int
    device: Device
    branches: int = 2
    dtype: torch.dtype = torch.bfloat16
    quantization: Quantization = field(default_factory=Quantization)
    payload: Payload = "plain"
    training: bool = False
    #: Videos that are made, or samples that are trained on, at a time: those of the layouts, or this number only.
    dp: int | None = None

    @property
    def forwards(self) -> int:
        """Of one sample in a step."""
        return 1 if self.training else self.branches


@dataclass(frozen=True)
class Row:
    """One layout. Bytes and exchanges are those of a rank in a step; `tokens` those of each rank that shares a sample,
    in the order where one has most.
    """

    layout: ParallelConfig
    tokens: tuple[int, ...]
    memory: dict[str, int]
    fits: bool
    sent: tuple[int, ...]
    exchanges: int
    seconds: Seconds
    #: Of weights, in training: bytes that a rank sends, and seconds that they take longer than everything else.
    weights_sent: int = 0
    weights_waiting: float = 0.0

    @property
    def step(self) -> float:
        """Predicted seconds."""
        return self.seconds.total + self.weights_waiting

    @property
    def rate(self) -> float:
        """Steps a second, of all samples together."""
        return self.layout.dp / self.step

    @property
    def needed(self) -> int:
        """Bytes on the fullest rank."""
        return sum(self.memory.values())

    @property
    def imbalance(self) -> float:
        """Tokens of the fullest rank over those of the mean one, less one."""
        return max(self.tokens) * len(self.tokens) / sum(self.tokens) - 1


def rows(question: Question) -> list[Row]:
    """Best first: what fits, then the least time of a step, in training for each sample; then the least memory.

    Raises:
        ConfigError: no layout of so many devices is legal; the message lists the numbers that are.
    """
    layouts = list(_legal(question, question.gpus)) if question.gpus > 0 else []
    if not layouts:
        raise ConfigError(_no_layout(question))
    shared: dict[tuple[int, int], _Shared] = {}
    found, refused = [], []
    for layout in layouts:
        shape = layout.ssp, layout.ulysses
        try:
            if shape not in shared:
                shared[shape] = _share(question, *shape)
            found.append(_row(question, layout, shared[shape]))
        except ConfigError as error:
            refused.append(str(error))
    if not found:
        raise ConfigError(f"no layout of {question.gpus} devices fits this video: {refused[0]}")
    return sorted(found, key=lambda row: (not row.fits, 1 / row.rate if question.training else row.step, row.needed))


def of_dense(question: Question) -> Question:
    """The same of Wan2.1, the dense model on the same weights."""
    return replace(question, config=without_sparsity(question.config), payload="plain")


# ---- which layouts


def _legal(question: Question, gpus: int) -> Iterator[ParallelConfig]:
    for layout in legal(divisible(question.config, question.forwards), gpus):
        if question.dp in (None, layout.dp):
            yield layout


def _no_layout(question: Question) -> str:
    most = question.forwards * question.config.num_heads * (question.dp or 1)
    known = [n for n in range(1, most + 1) if any(_legal(question, n))]
    at_a_time = "" if question.dp is None else f" with --dp {question.dp}"
    more = " and any more" if question.dp is None else ""
    return f"--gpus {question.gpus}: no layout{at_a_time} is legal; legal numbers: {_ranges(known)}{more}"


def _ranges(numbers: list[int]) -> str:
    """ "1-4, 6" of 1, 2, 3, 4, 6."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


# ---- one layout


@dataclass(frozen=True)
class _Shared:
    """What layouts with the same ranks to a sample have in common, of one forward or training step of it."""

    tokens: tuple[int, ...]
    computing: Seconds
    transfers: tuple[Transfer, ...]
    sent: tuple[int, ...]


def _share(question: Question, ssp: int, ulysses: int) -> _Shared:
    config, quantization = question.config, question.quantization
    held = placements(config, question.grid, ssp, ulysses)
    traffic = forward_traffic(
        config,
        question.grid,
        ssp,
        ulysses,
        dtype=question.dtype,
        payload=question.payload,
        shared_scales=shared_scales(config, quantization, training=question.training),
    )
    transfers = traffic.transfers
    if question.training:
        of_gradients = gradient_scales(config, quantization)
        transfers = training_traffic(
            traffic, config, dtype=question.dtype, checkpointed=True, gradient_scales=of_gradients
        )
    blocks = list(zip(config.block_kinds, block_orders(config.block_kinds), strict=True))
    works = {pair: block_work(config, pair[0], held[pair[1]], ulysses) for pair in dict.fromkeys(blocks)}
    spent = computing(
        [works[pair] for pair in blocks],
        question.device,
        linear8=bool(quantization.linears),
        attention8=any(recipe.attention == "native" for recipe in quantization.attention.values()),
        training=question.training,
    )
    tokens = max((placement.tokens for placement in held.values()), key=max)
    return _Shared(tokens, spent, transfers, total_sent(transfers, ssp * ulysses))


def _row(question: Question, layout: ParallelConfig, shared: _Shared) -> Row:
    config, device = question.config, question.device
    forwards = question.forwards // layout.cfg
    seconds = (shared.computing + _slowest(question, layout, shared.transfers)).times(forwards)
    sent, exchanges = tuple(forwards * b for b in shared.sent), forwards * len(shared.transfers)
    if layout.cfg > 1:
        velocity = 4 * config.out_dim * math.prod(config.patch_size) * math.prod(question.grid)
        swap = gathered("velocity of a branch", layout.cfg, velocity)
        seconds += exchanging(swap, [branch * layout.sequence for branch in range(layout.cfg)], device)
        sent, exchanges = tuple(b + swap.sent[0] for b in sent), exchanges + 1
    moved, waiting = 0, 0.0
    if question.training:
        memory = training_memory(config, max(shared.tokens), layout.world, question.dtype)
        moved, spent = weights_moving(config.parameter_count(), question.dtype.itemsize, layout.world, device)
        waiting = max(0.0, spent - seconds.total)
    else:
        memory = sampling_memory(
            config,
            question.grid,
            max(shared.tokens),
            ssp=layout.ssp,
            ulysses=layout.ulysses,
            dtype=question.dtype,
            quantization=question.quantization,
            branches=question.branches,
            texts=forwards,
        )
    fits = sum(memory.values()) <= device.memory
    return Row(layout, shared.tokens, memory, fits, sent, exchanges, seconds, moved, waiting)


def _slowest(question: Question, layout: ParallelConfig, transfers: tuple[Transfer, ...]) -> Seconds:
    """Of the groups of ranks that share a sample, that whose place in the nodes is worst."""
    starts = {first % int(question.device.per_node.value): first for first in range(0, layout.world, layout.sequence)}
    times: dict[Transfer, int] = {}
    for transfer in transfers:
        times[transfer] = times.get(transfer, 0) + 1
    found = []
    for first in starts.values():
        ranks = range(first, first + layout.sequence)
        each = (exchanging(transfer, ranks, question.device).times(n) for transfer, n in times.items())
        found.append(sum(each, Seconds()))
    return max(found, key=lambda seconds: seconds.total)
