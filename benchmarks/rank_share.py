"""The work of one of R ranks, on one device, and what R of them would take with the exchanges of a stated link.

    python benchmarks/rank_share.py --resolution 720p,768p --out benchmarks/results/rank_share.md
    python benchmarks/rank_share.py --tiny                                     # on a CPU, in seconds

Each kind of block is timed as the rank with most tokens runs it: the layers, the attention of its heads, the copies
around every exchange. The exchanges themselves hand back memory that was there before. So the share of the compute is
measured, and the rest is a PREDICTION: bytes from the placements, bandwidth and latency from planning/devices.yaml."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ospnext.bench.measure import release, timed
from ospnext.bench.report import table
from ospnext.bench.variants import dense
from ospnext.bench.versions import versions
from ospnext.bench.weights import random_block
from ospnext.bench.workload import Workload, workload
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models.config import TransformerConfig
from ospnext.models.layers import Block
from ospnext.models.layout import BlockPlan
from ospnext.models.rank_layout import rank_layout
from ospnext.models.traffic import forward_traffic
from ospnext.parallel import SequenceParallel, exchange, ulysses
from ospnext.planning.devices import Device, device
from ospnext.planning.step_time import exchanging

#: (ssp, ulysses) of the sparse model; the dense one has Ulysses among all.
LAYOUTS = ((1, 1), (2, 1), (4, 1), (4, 2))
#: Of arXiv 2605.28691, OSP-Next over Wan2.1 on the same number of GPUs.
PUBLISHED = {"720p": 1.42, "768p": 1.52}


@dataclass(frozen=True)
class Share:
    """Milliseconds of a forward on the rank with most tokens, without and with the exchanges."""

    work: Workload
    variant: str
    ssp: int
    ulysses: int
    tokens: int
    alone: float
    exchanging: float

    @property
    def ranks(self) -> int:
        return self.ssp * self.ulysses

    @property
    def predicted(self) -> float:
        return self.alone + self.exchanging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="14b", help="(default: 14b)")
    parser.add_argument("--resolution", default="720p,768p", help="(default: 720p,768p)")
    parser.add_argument("--link", default="h200", help="a device of ospnext plan, for its links (default: h200)")
    parser.add_argument("--repeats", type=int, default=2, help="timed calls of each block (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    works = [workload(arguments.preset, resolution) for resolution in arguments.resolution.split(",")]
    if arguments.tiny:
        works = [workload("tiny", "96x128", 9)]
    link = device(arguments.link)
    with chosen_backend(None) as where, torch.no_grad():
        text = (
            "\n".join(report([s for work in works for s in shares(work, arguments, link, where)], link, where)) + "\n"
        )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def shares(work: Workload, arguments: argparse.Namespace, link: Device, where: torch.device) -> Iterator[Share]:
    block = random_block(work.config, where).eval()
    for ssp, group in LAYOUTS:
        ranks = ssp * group
        if ranks > work.config.num_heads:  # the tiny model has few
            continue
        yield share(block, work, "osp", work.config, (ssp, group), arguments.repeats, link, where)
        yield share(block, work, "dense", dense(work.config), (1, ranks), arguments.repeats, link, where)
        release()


def share(
    block: Block,
    work: Workload,
    variant: str,
    config: TransformerConfig,
    shape: tuple[int, int],
    repeats: int,
    link: Device,
    where: torch.device,
) -> Share:
    ssp, group = shape
    plans, tokens = fullest(config, work, ssp, group, where)
    alone = 0.0
    with through(handed_back):
        for plan, count in distinct(config, plans):
            alone += count * timed(blocks_in_order(block, config, [plan], where), where, repeats=repeats).median
    known.clear()
    traffic = forward_traffic(config, work.grid, ssp, group)
    exchanges = sum(exchanging(transfer, range(ssp * group), link).total for transfer in traffic.transfers)
    return Share(work, variant, ssp, group, tokens, alone, 1e3 * exchanges)


def fullest(
    config: TransformerConfig, work: Workload, ssp: int, group: int, where: torch.device
) -> tuple[tuple[BlockPlan, ...], int]:
    """Plans of the rank that holds most tokens in its first block, and how many these are."""
    shape = (config.block_kinds, config.sparse_ratio, work.grid, 1, config.rope_pairs, torch.float32)
    layouts = [
        rank_layout(*shape, torch.device("cpu"), SequenceParallel(ssp, group, r, None, None))
        for r in range(ssp * group)
    ]
    most = max(layouts, key=lambda layout: len(layout.enter) if layout.enter is not None else 0)
    assert most.enter is not None
    rank = layouts.index(most)
    moved = rank_layout(*shape, where, SequenceParallel(ssp, group, rank, None, None))
    plans = tuple(_alone(plan) for plan in moved.blocks) if ssp * group == 1 else moved.blocks
    return plans, len(most.enter)


def _alone(plan: BlockPlan) -> BlockPlan:
    return replace(plan, ulysses=None, exchange=None)


known: dict[Any, Tensor] = {}


def handed_back(x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: Any = None) -> Tensor:
    """Random numbers in the shape of what would arrive, drawn once."""
    key = (sum(receive_splits), *x.shape[1:]), x.dtype
    x.contiguous()  # what a collective would read
    if key not in known:
        known[key] = torch.randn(key[0], device=x.device).to(x.dtype)
    return known[key]


@contextmanager
def through(all_to_all: Callable[..., Tensor]) -> Iterator[None]:
    """The exchanges of a model are made by this function meanwhile."""
    with patch.object(ulysses, "all_to_all", all_to_all), patch.object(exchange, "all_to_all", all_to_all):
        yield


def distinct(config: TransformerConfig, plans: Sequence[BlockPlan]) -> list[tuple[BlockPlan, int]]:
    """A plan of each kind of block, with how many blocks are of it; what sends its tokens away is a kind of its own."""
    kinds = [(kind, plan.exchange is not None, plan) for kind, plan in zip(config.block_kinds, plans, strict=True)]
    first = {(kind, leaves): plan for kind, leaves, plan in reversed(kinds)}
    return [(first[key], count) for key, count in Counter((kind, leaves) for kind, leaves, _ in kinds).items()]


def blocks_in_order(
    block: Block, config: TransformerConfig, plans: Sequence[BlockPlan], where: torch.device
) -> Callable[[], Tensor]:
    """A call of blocks with these plans, all with the parameters of `block`, and of the exchange after each."""
    x_BNC = torch.randn(1, len(plans[0].cos), config.dim, device=where, dtype=torch.bfloat16)
    time_B6C = torch.randn(1, 6, config.dim, device=where)
    text_shape = (1, config.text_len, config.num_heads, config.head_dim)
    keys_values = tuple(torch.randn(text_shape, device=where, dtype=torch.bfloat16) for _ in range(2))

    def run() -> Tensor:
        out = x_BNC
        for plan in plans:
            out = block(out, time_B6C, keys_values, plan)
            out = out if plan.exchange is None else plan.exchange(out)
        return out

    return run


def report(found: list[Share], link: Device, where: torch.device) -> Iterator[str]:
    said = versions(where)
    yield from ("# The work of one rank", "")
    yield f"{found[0].work.preset}, bf16, one forward of one sample. {said.get('device_name', where)}, backend"
    yield f"{said['backend']}, torch {torch.__version__}. Compute is measured, one rank at a time; exchanges are"
    yield f"predicted: {link.link_gbs.value:g} GB/s each way ({link.link_gbs.how}), of which"
    yield f"{link.link_reached.value:.0%} ({link.link_reached.how}), and {link.link_latency_us.value:g} us for each"
    yield f"({link.link_latency_us.how}). No two"
    yield "devices were used together."
    head = ["video", "model", "ranks", "ssp x ulysses", "tokens", "compute ms", "of 1 / R", "exchanges ms"]
    head += ["predicted ms", "times one rank", "times dense"]
    for work in dict.fromkeys(s.work for s in found):
        of_work = [s for s in found if s.work == work]
        body = []
        for s in of_work:
            single = next(o for o in of_work if o.variant == s.variant and o.ranks == 1)
            baseline = next(o for o in of_work if o.variant == "dense" and o.ranks == s.ranks)
            times = [f"{s.alone:,.1f}", f"{single.alone / s.ranks / s.alone:.0%}", f"{s.exchanging:,.1f}"]
            size = [work.resolution, s.variant, str(s.ranks), f"{s.ssp} x {s.ulysses}", f"{s.tokens:,}"]
            gains = [f"{single.alone / s.predicted:.2f}", f"{baseline.predicted / s.predicted:.2f}"]
            body.append([*size, *times, f"{s.predicted:,.1f}", *gains])
        yield from ("", *table(head, body))
        if work.resolution in PUBLISHED:
            last = next(s for s in reversed(of_work) if s.variant == "osp")
            yield ""
            yield f"Published for {work.resolution} on eight H200s: {PUBLISHED[work.resolution]}x. Predicted here, with"
            yield f"{last.ranks} ranks: the last column."


if __name__ == "__main__":
    main()
