"""Ranks that share one video, measured: blocks with the exchanges that rank_share.py predicts.

    torchrun --nproc-per-node 2 benchmarks/ranks_measured.py --resolution 720p,768p --out FILE
    OSPNEXT_BACKEND=reference torchrun --nproc-per-node 2 benchmarks/ranks_measured.py --tiny     # on a CPU, in seconds

Every legal layout of the ranks that torchrun starts, and the model on one rank, which all of them run at the same time.
Each kind of block is timed from a meeting of the ranks' devices on, by the device's own clock, as it is and with
exchanges that hand back memory which was there before, in turns. Each exchange in it has a time of its own."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from rank_share import blocks_in_order, distinct, fullest, handed_back, known, through
from ranks_report import Case, Measured, Moved, Times, busiest, over_ranks, report, summed

from ospnext.bench.measure import release
from ospnext.bench.variants import dense
from ospnext.bench.weights import random_block
from ospnext.bench.workload import Workload, workload
from ospnext.cli.ranks import Ranks, ranks_of_command
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models.config import TransformerConfig
from ospnext.models.layers import Block
from ospnext.models.layout import BlockPlan
from ospnext.models.parallelize import divisible
from ospnext.models.rank_layout import rank_layout
from ospnext.ops import collective
from ospnext.ops.device import Device as Surface
from ospnext.ops.group_store import meet
from ospnext.parallel.config import ALONE, ParallelConfig, legal
from ospnext.parallel.exchange import Payload
from ospnext.parallel.mesh import Mesh, transports
from ospnext.parallel.wire import Transfer, gathered
from ospnext.planning.devices import Device, device
from ospnext.planning.step_time import exchanging

#: Seconds that a rank may wait for another one.
TIMEOUT = 120.0
#: Timed calls of an exchange alone.
CALLS = 10


@dataclass(frozen=True)
class Here:
    """This rank's device, the group of all ranks in which tensors of devices travel, and the link of predictions."""

    where: torch.device
    everyone: dist.ProcessGroup
    link: Device

    def predicted(self, transfers: Sequence[Transfer], ranks: int) -> float:
        """Milliseconds."""
        return 1e3 * sum(exchanging(transfer, range(ranks), self.link).total for transfer in transfers)


class Stopwatch:
    """Stamps by the device's own clock; their differences can be read once all is done."""

    def __init__(self, where: torch.device) -> None:
        self._surface, self._module = Surface(where), torch.get_device_module(where)

    def stamp(self) -> Any:
        if self._surface.is_cpu:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def done(self) -> None:
        self._surface.synchronize()

    @staticmethod
    def between(start: Any, end: Any) -> float:
        """Milliseconds."""
        return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="14b", help="(default: 14b)")
    parser.add_argument("--resolution", default="720p,768p", help="(default: 720p,768p)")
    parser.add_argument("--link", default="h200", help="a device of ospnext plan, for its links (default: h200)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each block (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--out", type=Path, help="write the result here too, after each case")
    arguments = parser.parse_args()
    works = [workload(arguments.preset, resolution) for resolution in arguments.resolution.split(",")]
    if arguments.tiny:
        works = [workload("tiny", "96x128", 9)]
    with ranks_of_command() as ranks, chosen_backend(None) as kind, torch.no_grad():
        if ranks.world is None:
            parser.error("start this with torchrun --nproc-per-node 2, or more: see the top of the file")
        where = ranks.device(kind)
        with ranks.in_step():
            ranks.agree({}, where)
        with ranks.watched(TIMEOUT):
            text = run(works, arguments, device(arguments.link), ranks, where)
            ranks.wait_for_all()
    ranks.say(text)


def run(
    works: Sequence[Workload], arguments: argparse.Namespace, link: Device, ranks: Ranks, where: torch.device
) -> str:
    """The report of the first rank, which has written it by then."""

    @functools.cache
    def mesh(layout: ParallelConfig, payload: Payload) -> Mesh:
        made = ranks.mesh(layout, where, TIMEOUT, payload)
        assert made is not None
        return made

    assert ranks.world is not None
    # The default group is that in which ranks have found each other, on the host.
    everyone = dist.new_group(timeout=datetime.timedelta(seconds=TIMEOUT), backend=transports(where.type))
    here = Here(where, everyone, link)
    found: list[Measured] = []
    moved: list[Moved] = []
    text = ""
    for work in works:
        block = random_block(work.config, where).eval()
        for case in cases(work, ranks.world):
            shared = None if case.layout == ALONE else mesh(case.layout, case.payload)
            found.append(measured(case, block, shared, arguments.repeats, here))
            release()
            if shared is not None:
                timed = {(m.name, m.busiest) for m in moved}
                few_bytes = gathered("16 bytes", ranks.world, 16)
                new = dict.fromkeys((few_bytes, *case.transfers))
                new = [t for t in new if busiest(t) and (t.name, busiest(t)) not in timed]
                moved += [alone(t, here) for t in new]
            if ranks.first:
                text = "\n".join(report(found, moved, link, ranks.world, where)) + "\n"
                if arguments.out:
                    arguments.out.write_text(text)
    return text


def cases(work: Workload, world: int) -> Iterator[Case]:
    for variant, config in (("osp", work.config), ("dense", dense(work.config))):
        yield Case(work, variant, ALONE)
        for layout in legal(divisible(config), world):
            if layout.sequence == world:
                yield Case(work, variant, layout)
                if layout.ssp > 1:
                    yield Case(work, variant, layout, "hif8")


# ---- a forward


def measured(case: Case, block: Block, mesh: Mesh | None, repeats: int, here: Here) -> Measured:
    config, work, where = case.config, case.work, here.where
    if mesh is None:
        plans, _ = fullest(config, work, 1, 1, where)
    else:
        assert mesh.sequence is not None
        shape = (config.block_kinds, config.sparse_ratio, work.grid, 1, config.rope_pairs, torch.float32)
        plans = rank_layout(*shape, where, mesh.sequence).blocks
    times = [of_kind(block, config, plan, count, repeats, here) for plan, count in distinct(config, plans)]
    in_order = 0.0
    if mesh is not None:
        forward = blocks_in_order(block, config, plans, where)
        in_order = max(of_rank[0][0] for of_rank in told(of_call(forward, 1, here)))
    predicted = here.predicted(case.transfers, case.layout.world)
    return Measured(case, *summed(times), in_order=in_order, predicted=predicted)


def of_kind(block: Block, config: TransformerConfig, plan: BlockPlan, count: int, repeats: int, here: Here) -> Times:
    call = blocks_in_order(block, config, [plan], here.where)

    def without() -> Tensor:
        with through(handed_back):
            return call()

    for warm_up in (without, call):
        warm_up()
    takes_part: list[bool] = []
    rounds = [(of_call(without, 1, here), of_call(call, 1, here, takes_part)) for _ in range(repeats)]
    known.clear()
    by_rank = told(rounds)
    return Times(
        count,
        [[alone[0][0] for alone, _ in of_rank] for of_rank in by_rank],
        [[whole[0][0] for _, whole in of_rank] for of_rank in by_rank],
        [[whole[0][1:] for _, whole in of_rank] for of_rank in by_rank],
        told(takes_part),
    )


def of_call(
    call: Callable[[], object], repeats: int, here: Here, takes_part: list[bool] | None = None
) -> list[list[float]]:
    """Of each repeat the milliseconds of the call, and then those of each exchange in it; `takes_part` is filled with
    whether this rank sends or receives any of the exchange.
    """
    watch, found = Stopwatch(here.where), []
    real = collective.all_to_all

    def clocked(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Any = None) -> Any:
        start = watch.stamp()
        arrived = real(x, send, receive, group)
        spans.append((start, watch.stamp()))
        me = dist.get_rank(group)
        taking.append(sum(send) + sum(receive) > send[me] + receive[me])
        return arrived

    for _ in range(repeats):
        spans: list[tuple[Any, Any]] = []
        taking: list[bool] = []
        # The devices meet, not only the processes.
        collective.all_reduce(torch.zeros(1, device=here.where), group=here.everyone)
        with through(clocked):
            start = watch.stamp()
            call()
            end = watch.stamp()
        watch.done()
        found.append([watch.between(*span) for span in ((start, end), *spans)])
        if takes_part is not None:
            takes_part[:] = taking
    return found


# ---- an exchange


def alone(transfer: Transfer, here: Here) -> Moved:
    """As many bytes as the model sends, and as many again that stay, in rows of one byte."""
    ranks, rank = len(transfer.matrix), dist.get_rank(here.everyone)
    matrix = [list(row) for row in transfer.matrix]
    for i in range(ranks):
        matrix[i][i] = max(matrix[i])
    send, receive = matrix[rank], [row[rank] for row in matrix]
    x = torch.zeros(sum(send), dtype=torch.uint8, device=here.where)
    times = of_call(lambda: collective.all_to_all(x, send, receive, here.everyone), 2 + CALLS, here)[2:]
    moves = [sent + received for sent, received in zip(transfer.sent, transfer.received, strict=True)]
    by_rank = [[repeat[0] for repeat in of_rank] for of_rank, bytes_ in zip(told(times), moves, strict=True) if bytes_]
    return Moved(transfer.name, busiest(transfer), over_ranks(min, by_rank), here.predicted([transfer], ranks))


def told(value: Any) -> list[Any]:
    """What every rank has found, as JSON types."""
    return [json.loads(text) for text in meet("found", json.dumps(value), None, TIMEOUT)]


if __name__ == "__main__":
    main()
