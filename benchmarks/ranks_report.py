"""What ranks_measured.py has measured: milliseconds of ranks and repeats, what counts of them, and the tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ospnext.bench.report import table
from ospnext.bench.variants import dense
from ospnext.bench.versions import versions
from ospnext.bench.workload import Workload
from ospnext.models.config import TransformerConfig
from ospnext.models.traffic import forward_traffic
from ospnext.parallel.config import ALONE, ParallelConfig
from ospnext.parallel.exchange import Payload
from ospnext.parallel.wire import Transfer
from ospnext.planning.devices import Device


@dataclass(frozen=True)
class Case:
    work: Workload
    variant: str
    layout: ParallelConfig
    payload: Payload = "plain"

    @property
    def config(self) -> TransformerConfig:
        return self.work.config if self.variant == "osp" else dense(self.work.config)

    @property
    def transfers(self) -> tuple[Transfer, ...]:
        """Those of the blocks of one forward."""
        ssp, group = self.layout.ssp, self.layout.ulysses
        traffic = forward_traffic(self.config, self.work.grid, ssp, group, payload=self.payload)
        return tuple(itertools.chain(*traffic.blocks))

    @property
    def name(self) -> str:
        payload = "" if self.payload == "plain" else f", payload {self.payload}"
        return f"{self.variant}, {self.layout.ssp} x {self.layout.ulysses}{payload}"


@dataclass(frozen=True)
class Times:
    """Of one kind of block, `count` of which a forward has: milliseconds by rank and repeat. `exchanges` has those of
    each exchange of the block in addition, in order; `takes_part`, by rank, whether it sends or receives any of it."""

    count: int
    alone: Sequence[Sequence[float]]
    whole: Sequence[Sequence[float]]
    exchanges: Sequence[Sequence[Sequence[float]]]
    takes_part: Sequence[Sequence[bool]]


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a forward. The slowest rank counts for `alone` and `whole`, block by block. An exchange lasts on
    a rank from when it is ready to send, and so the shortest time of all that take part is that of moving bytes
    (`moving`): it is of the rank that waits for no other. `exchanging` is what the mean rank spends in exchanges,
    waiting included. `in_order` is a forward of all blocks in their order, 0 where none was run."""

    case: Case
    alone: float
    whole: float
    exchanging: float
    moving: float
    in_order: float
    predicted: float

    @property
    def hidden(self) -> float:
        """The most that computing meanwhile could save, as a part of the whole."""
        return (self.whole - self.alone) / self.whole


@dataclass(frozen=True)
class Moved:
    """An exchange alone: milliseconds, and bytes that the busiest rank sends or receives."""

    name: str
    busiest: int
    milliseconds: float
    predicted: float


def summed(times: Sequence[Times]) -> tuple[float, float, float, float]:
    """`alone`, `whole`, `exchanging` and `moving` of all blocks."""
    total = [0.0] * 4
    for kind in times:
        exchanges = [[list(of_repeat) for of_repeat in zip(*of_rank, strict=True)] for of_rank in kind.exchanges]
        of_block = (
            slowest(kind.alone),
            slowest(kind.whole),
            sum(over_ranks(statistics.fmean, by_rank) for by_rank in zip(*exchanges, strict=True)),
            sum(
                over_ranks(min, [times for times, takes in zip(by_rank, taking, strict=True) if takes])
                for by_rank, taking in zip(
                    zip(*exchanges, strict=True), zip(*kind.takes_part, strict=True), strict=True
                )
                if any(taking)
            ),
        )
        total = [t + kind.count * ms for t, ms in zip(total, of_block, strict=True)]
    return total[0], total[1], total[2], total[3]


def slowest(by_rank: Sequence[Sequence[float]]) -> float:
    return over_ranks(max, by_rank)


def over_ranks(join: Callable[[Sequence[float]], float], by_rank: Sequence[Sequence[float]]) -> float:
    """The median over repeats of what is joined over ranks."""
    return statistics.median(join(of_repeat) for of_repeat in zip(*by_rank, strict=True))


def busiest(transfer: Transfer) -> int:
    return max(*transfer.sent, *transfer.received)


def report(
    found: Sequence[Measured], moved: Sequence[Moved], link: Device, world: int, where: torch.device
) -> Iterator[str]:
    said = versions(where)
    yield from ("# Ranks that share a video, measured", "")
    yield f"{found[0].case.work.preset}, bf16, one forward of one sample, without embeddings and head; {world} ranks."
    yield f"{said.get('device_name', where)}, backend {said['backend']}, torch {torch.__version__}. Milliseconds."
    yield "The slowest rank of each block counts: `alone` with exchanges that hand back memory, `whole` with real ones;"
    yield "`in order` is one run of all blocks. `in exchanges` is the mean rank, which also waits there, and `moving`"
    yield "the rank that waits for no other."
    yield f"Predicted: {link.link_gbs.value:g} GB/s each way ({link.link_gbs.how}), of which"
    yield f"{link.link_reached.value:.0%} ({link.link_reached.how}), and {link.link_latency_us.value:g} us an exchange"
    yield f"({link.link_latency_us.how})."
    head = ["video", "model, ssp x ulysses", "ranks", "alone", "whole", "in order", "in exchanges", "moving"]
    head += ["predicted", "GB", "GB/s", "times one rank", "times dense", "overlap saves at most"]
    for work in dict.fromkeys(m.case.work for m in found):
        of_work = [m for m in found if m.case.work == work]
        yield from ("", *table(head, [row(m, of_work) for m in of_work]))
    shared = [m for m in found if m.case.layout != ALONE]
    if not shared:
        return
    yield from ("", *overlap(shared))
    yield from ("", "Exchanges alone, as many bytes as the model sends; the busiest rank counts.", "")
    body = [
        [
            m.name,
            *numbers(m.busiest / 1e6),
            *numbers(m.milliseconds, m.predicted, form=".3f"),
            rate(m.busiest, m.milliseconds),
        ]
        for m in moved
    ]
    yield from table(["exchange", "MB", "ms", "predicted ms", "GB/s"], body)


def row(m: Measured, of_work: Sequence[Measured]) -> list[str]:
    case = m.case
    size = [case.work.resolution, case.name, str(case.layout.world)]
    one = next((o for o in of_work if o.case.variant == case.variant and o.case.layout == ALONE), None)
    # Of several layouts of the dense model the best.
    same = [o.whole for o in of_work if o.case.variant == "dense" and o.case.layout.world == case.layout.world]
    gains = ["" if one is None else f"{one.whole / m.whole:.2f}", f"{min(same) / m.whole:.2f}" if same else ""]
    if case.layout == ALONE:
        return [*size, *numbers(m.alone, m.whole), *[""] * 6, *gains, ""]
    times = numbers(m.alone, m.whole, m.in_order, m.exchanging, m.moving, m.predicted, form=",.2f")
    sent = sum(map(busiest, case.transfers))
    return [*size, *times, *numbers(sent / 1e9), rate(sent, m.moving), *gains, f"{m.hidden:.1%}"]


def overlap(shared: Sequence[Measured]) -> Iterator[str]:
    plain = [m for m in shared if m.case.payload == "plain"]
    most, moving = max(plain, key=lambda m: m.hidden), max(plain, key=lambda m: m.moving / m.whole)
    yield "Computing while exchanges are on their way could save (whole - alone) / whole at most, the last column:"
    yield f"{most.hidden:.1%} in {most.case.name} at {most.case.work.resolution}, and less in the others with a plain"
    yield "payload. That is a difference of two measurements. Bytes themselves move for at most"
    yield f"{moving.moving / moving.whole:.1%} of the whole ({moving.case.name} at {moving.case.work.resolution})."


def numbers(*values: float, form: str = ",.2f") -> list[str]:
    return [format(value, form) for value in values]


def rate(moved: int, milliseconds: float) -> str:
    return f"{moved / milliseconds / 1e6:.3g}" if milliseconds else ""
