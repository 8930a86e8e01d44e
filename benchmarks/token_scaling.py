"""Time of one full and of one sparse block of the 14B model as the video grows, against the model of FLOPs.

    python benchmarks/token_scaling.py --out benchmarks/results/token_scaling.md
    python benchmarks/token_scaling.py --tiny                                     # on a CPU, in seconds

Fits  milliseconds = a + linear FLOPs / one rate + attention FLOPs / another rate  to all points by least squares of
relative errors. Where it fits, the FLOPs of models/flops.py foretell any other size."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ospnext.bench import floor
from ospnext.bench.measure import release, timed
from ospnext.bench.report import table
from ospnext.bench.versions import versions
from ospnext.bench.weights import random_block
from ospnext.bench.workload import Workload, workload
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models.config import BlockKind
from ospnext.models.layers import Block
from ospnext.models.layout import stream_layout

RESOLUTIONS, FRAMES = ("480p", "720p", "768p", "1080p"), (81, 161)
TINY_RESOLUTIONS, TINY_FRAMES = ("64x96", "96x96", "96x128", "128x160"), (5, 9)
KINDS: tuple[BlockKind, ...] = ("full", "token")


@dataclass(frozen=True)
class Point:
    """Operations are of one block."""

    work: Workload
    kind: BlockKind
    linear: int
    attention: int
    milliseconds: float


@dataclass(frozen=True)
class Fit:
    """Milliseconds, and operations per second."""

    constant: float
    linear_rate: float
    attention_rate: float

    def milliseconds(self, linear: int, attention: int) -> float:
        return self.constant + 1e3 * (linear / self.linear_rate + attention / self.attention_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="timed calls of each block (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    tiny = arguments.tiny
    sizes = [(r, n) for n in (TINY_FRAMES if tiny else FRAMES) for r in (TINY_RESOLUTIONS if tiny else RESOLUTIONS)]
    works = [workload("tiny" if tiny else "14b", resolution, frames) for resolution, frames in sizes]
    with chosen_backend(None) as device, torch.no_grad():
        text = "\n".join(report(list(points(works, arguments.repeats, device)), device)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def points(works: list[Workload], repeats: int, device: torch.device) -> Iterator[Point]:
    block = random_block(works[0].config, device).eval()
    for work in works:
        for kind in KINDS:
            yield measure(block, work, kind, repeats, device)
            release()


def measure(block: Block, work: Workload, kind: BlockKind, repeats: int, device: torch.device) -> Point:
    config = work.config
    # Both kinds in one order, so that no switch is in it: the same work but for attention.
    layout = stream_layout(KINDS, config.sparse_ratio, work.grid, 1, config.rope_pairs, torch.float32, device)
    plan = layout.blocks[KINDS.index(kind)]
    x_BNC = torch.randn(1, work.tokens, config.dim, device=device, dtype=torch.bfloat16)
    time_B6C = torch.randn(1, 6, config.dim, device=device)
    text_shape = (1, config.text_len, config.num_heads, config.head_dim)
    keys_values = tuple(torch.randn(text_shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    timing = timed(lambda: block(x_BNC, time_B6C, keys_values, plan), device, repeats=repeats)
    one = config.replace(num_layers=1, skiparse_model_type="full", sparse_ratio=1, num_full_blocks=0)
    linear = sum(2 * work.tokens * a * b * count for (a, b), count in floor.block_linears(one).items())
    attention = floor.self_attention_flops(config, kind, work.grid) + floor.cross_attention_flops(config, work.tokens)
    return Point(work, kind, linear, attention, timing.median)


def fit(found: list[Point]) -> Fit:
    """Least squares of relative errors, so that small sizes count as much as large ones."""
    rows = torch.tensor([[1.0, p.linear / 1e9, p.attention / 1e9] for p in found], dtype=torch.float64)
    times = torch.tensor([p.milliseconds for p in found], dtype=torch.float64)
    solution = torch.linalg.lstsq(rows / times[:, None], torch.ones_like(times)[:, None], driver="gelsd").solution
    constant, per_linear, per_attention = solution.flatten().tolist()
    return Fit(constant, 1e12 / per_linear, 1e12 / per_attention)


def report(found: list[Point], device: torch.device) -> Iterator[str]:
    said, model = versions(device), fit(found)
    config = found[0].work.config
    yield from ("# One block as the video grows", "")
    yield f"{config.dim} channels, bf16. {said.get('device_name', device)}, backend {said['backend']}, torch"
    yield f"{torch.__version__}."
    yield ""
    yield f"Fitted: {model.constant:.3g} ms + linear at {model.linear_rate / 1e12:.3g} TFLOP/s + attention at"
    yield f"{model.attention_rate / 1e12:.3g} TFLOP/s. A negative rate or constant means that these points do not"
    yield "determine it."
    yield ""
    errors, body = [], []
    for p in found:
        told = model.milliseconds(p.linear, p.attention)
        errors.append(told / p.milliseconds - 1)
        size = [p.work.resolution, str(p.work.frames), f"{p.work.tokens:,}", p.kind]
        flops = [f"{p.linear / 1e12:.3g}", f"{p.attention / 1e12:.3g}"]
        body.append([*size, *flops, f"{p.milliseconds:,.2f}", f"{told:,.2f}", f"{errors[-1]:+.1%}"])
    head = ["video", "frames", "tokens", "block", "linear TFLOP", "attention TFLOP", "ms", "fitted ms", "off by"]
    yield from table(head, body)
    yield ""
    yield f"Off by {statistics.mean(map(abs, errors)):.1%} on average, by {max(map(abs, errors)):.1%} at most."
    yield ""
    times = {(p.work, p.kind): p.milliseconds for p in found}
    works = dict.fromkeys(p.work for p in found)
    gains = ", ".join(f"{w.resolution} x {w.frames}: {times[w, 'full'] / times[w, 'token']:.2f}" for w in works)
    yield f"A full block takes so many times as long as a sparse one: {gains}."


if __name__ == "__main__":
    main()
