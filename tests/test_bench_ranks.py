"""The scripts in benchmarks/ that measure ranks and compare them with one process: each in small, over gloo."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from ospnext.bench.weights import random_block
from ospnext.bench.workload import workload
from ospnext.models.traffic import forward_traffic

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OSPNEXT_BACKEND": "reference"}
TINY = workload("tiny", "96x128", 9)


def on_two_ranks(script: str, *arguments: object) -> str:
    """What the two print on stdout, together."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return printed([*launch, str(BENCHMARKS / f"{script}.py"), *map(str, arguments)])


def printed(command: list[str]) -> str:
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows(text: str) -> dict[str, list[str]]:
    """Of all tables, by their first two columns."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {f"{first} {second}": others for first, second, *others in cells}


def test_ranks_are_measured_with_their_exchanges(tmp_path):
    text = on_two_ranks("ranks_measured", "--tiny", "--repeats", "1", "--out", tmp_path / "out.md")
    assert text.strip() == (tmp_path / "out.md").read_text().strip()  # the first rank alone prints
    found = rows(text)
    for model in ("osp, 2 x 1", "osp, 2 x 1, payload hif8", "osp, 1 x 2", "dense, 1 x 2"):
        ranks, alone, whole, in_order, exchanging, moving, *_, saved = found[f"96x128 {model}"]
        assert ranks == "2"
        times = [float(number.replace(",", "")) for number in (alone, whole, in_order, exchanging, moving)]
        assert min(times) > 0
        assert times[4] <= times[3] < times[1]  # what moves, what waits beside it, and the whole
        assert float(saved.rstrip("%")) == pytest.approx(100 * (1 - times[0] / times[1]), abs=0.1)
    assert found["96x128 osp, 1 x 1"][:2] == ["1", found["96x128 osp, 1 x 1"][1]]
    assert "16 bytes 0.00" in found
    assert "could save (whole - alone) / whole at most" in text


def test_the_slowest_rank_of_each_block_counts_and_the_fastest_in_an_exchange():
    """Two ranks, two repeats, one exchange; 3 blocks. And a third rank that has no part in the exchange."""
    script = runpy.run_path(str(BENCHMARKS / "ranks_measured.py"), run_name="ranks_measured")
    alone, whole = [[10.0, 20.0], [11.0, 19.0]], [[15.0, 24.0], [14.0, 25.0]]
    exchanges = [[[2.0], [4.0]], [[1.0], [6.0]]]
    times = script["Times"](3, alone, whole, exchanges, [[True], [True]])
    assert script["summed"]([times]) == pytest.approx((3 * 15.5, 3 * 20.0, 3 * 3.25, 3 * 2.5))
    idle = [*exchanges, [[0.0], [0.0]]]
    times = script["Times"](3, [*alone, alone[0]], [*whole, whole[0]], idle, [[True], [True], [False]])
    assert script["summed"]([times])[3] == pytest.approx(3 * 2.5)


@pytest.mark.parametrize(("ssp", "ulysses"), [(2, 1), (1, 2)])
def test_blocks_in_order_make_every_exchange_of_a_forward(ssp: int, ulysses: int):
    """As many, and as many bytes, as the formulas of traffic say."""
    script = runpy.run_path(str(BENCHMARKS / "rank_share.py"), run_name="rank_share")
    cpu, rank = torch.device("cpu"), 0
    plans, _ = script["fullest"](TINY.config, TINY, ssp, ulysses, cpu)
    made: list[int] = []

    def noted(x, send_splits, receive_splits, group=None):
        made.append(x[: sum(send_splits) - send_splits[rank]].numel() * x.itemsize)
        return script["handed_back"](x, send_splits, receive_splits, group)

    with torch.no_grad(), script["through"](noted):
        script["blocks_in_order"](random_block(TINY.config, cpu).eval(), TINY.config, plans, cpu)()
    blocks = forward_traffic(TINY.config, TINY.grid, ssp, ulysses).blocks
    assert made == [transfer.sent[rank] for block in blocks for transfer in block]
    counted = script["distinct"](TINY.config, plans)
    of_kind = Counter(plan.exchange is not None for plan in plans)
    assert sum(count for plan, count in counted if plan.exchange is not None) == of_kind[True]
    assert sum(count for _, count in counted) == len(plans)


def test_training_of_ranks_is_compared(tmp_path):
    """What 3 steps change differs by rounding in fp32, and in bf16 by what bf16 itself changes."""
    text = on_two_ranks("training_across_ranks", "--out", tmp_path / "out.md")
    found = {line.split("|")[1].strip(): float(line.split("|")[3]) for line in text.splitlines() if "e-" in line}
    bf16 = found["one process: bf16 and fp32"]
    for layout in ("ssp 2, ulysses 1", "ssp 1, ulysses 2"):
        assert found[f"fp32: {layout}"] < bf16 / 10
        assert found[f"bf16: {layout}, and fp32"] < 2 * bf16


@pytest.mark.slow
def test_videos_of_ranks_are_compared(tmp_path):
    script = [sys.executable, str(BENCHMARKS / "video_across_ranks.py"), "--dtypes", "fp32"]
    text = printed([*script, "--runs", "one process;cfg 2", "--out", str(tmp_path / "out.md")])
    assert re.search(r"\| fp32: cfg 2 \| 0 \| 100.00% \| 0 \| 100.00% \| identical \|", text)
    assert text.strip() == (tmp_path / "out.md").read_text().strip()


def test_a_run_that_fails_is_a_row():
    script = [sys.executable, str(BENCHMARKS / "video_across_ranks.py"), "--dtypes", "fp32", "--limit", "0.5"]
    text = printed([*script, "--runs", "one process;cfg 2"])
    assert "| fp32: one process | FAILED |" in text
    assert "| fp32: cfg 2 | FAILED |" in text
