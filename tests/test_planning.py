"""`ospnext plan`: that its layouts are legal and in order, its sums add up, and its model is near what was measured."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from ospnext.cli import main
from ospnext.errors import ConfigError
from ospnext.models.config import preset
from ospnext.models.flops import forward_flops
from ospnext.models.layout import block_orders
from ospnext.models.quant_policy import QuantPolicy
from ospnext.models.traffic import forward_traffic, placements, shared_scales, without_sparsity
from ospnext.models.weights.quantized import Quantization
from ospnext.ops import HiF8Recipe
from ospnext.parallel.wire import Transfer
from ospnext.planning.devices import KNOWN, device, known_devices
from ospnext.planning.plan import Question, Row, of_dense, rows
from ospnext.planning.rank_memory import block_backward
from ospnext.planning.step_time import block_work, computing, exchanging, weights_moving
from ospnext.planning.text import dense_rows

ROOT = Path(__file__).resolve().parents[1]
P14, P13 = preset("14B"), preset("1.3B")
#: The short ones have three frames of latents instead of 21, and divide in the same way.
GRIDS = {"720p": (21, 45, 80), "768p": (21, 48, 80), "short 720p": (3, 45, 80), "short 768p": (3, 48, 80)}
H200 = device("h200")


def question(gpus: int, grid: str = "720p", **changes) -> Question:
    return Question(P14, GRIDS[grid], gpus, H200, **changes)


def sizes(row: Row) -> tuple[int, int, int, int]:
    return row.layout.sizes


def quantization(**policy) -> Quantization:
    return Quantization.of([QuantPolicy(**policy)], P14.num_layers)


# ---- layouts


@pytest.mark.parametrize("gpus", [1, 4, 6, 8, 16])
def test_every_layout_is_legal_and_the_best_comes_first(gpus: int) -> None:
    found = rows(question(gpus, "short 720p"))
    assert found
    for row in found:
        dp, cfg, ssp, ulysses = sizes(row)
        assert dp * cfg * ssp * ulysses == gpus
        assert cfg in (1, 2) and ssp in (1, 2, 4) and ssp * ulysses <= P14.num_heads
        assert sum(row.tokens) == 10800 and len(row.tokens) == ssp * ulysses
    assert len({row.layout for row in found}) == len(found)
    assert all(a.step <= b.step for a, b in itertools.pairwise(found))


def test_eight_devices_divide_branches_and_subsequences() -> None:
    best = rows(question(8))[0]
    assert sizes(best) == (1, 2, 4, 1)
    assert best.exchanges == 8 * 2 + 31 + 1 + 1  # of the blocks, the switches, the output, the branches


def test_without_guidance_there_are_no_branches_to_divide() -> None:
    assert {row.layout.cfg for row in rows(question(8, branches=1))} == {1}
    assert {row.layout.cfg for row in rows(question(8, training=True))} == {1}


def test_uneven_parts_are_told_and_waited_for() -> None:
    """720P: subsequences of 23 or 22 rows of 40 tokens a frame. 768P divides evenly."""
    uneven, even = ({sizes(row): row for row in rows(question(8, f"short {p}"))} for p in ("720p", "768p"))
    assert sorted(set(uneven[1, 2, 4, 1].tokens)) == [3 * 22 * 40, 3 * 23 * 40]
    assert uneven[1, 2, 4, 1].imbalance == pytest.approx(23 / 22.5 - 1)
    assert even[1, 2, 4, 1].imbalance == 0 == pytest.approx(even[1, 2, 4, 1].seconds.waiting, abs=1e-12)
    assert uneven[1, 2, 4, 1].seconds.waiting > 0.01 * uneven[1, 2, 4, 1].step
    heads = {sizes(row): row for row in rows(question(16, "short 768p"))}[1, 1, 1, 16]
    assert heads.imbalance == 0 and heads.seconds.waiting > 0  # of 40 heads some ranks compute 3 and some 2


def test_what_does_not_fit_comes_last() -> None:
    small = replace(H200, memory_gb=replace(H200.memory_gb, value=33))
    found = rows(replace(question(8), device=small))
    fits = [row.fits for row in found]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    assert all(row.fits == (row.needed <= 33e9) for row in found)


def test_a_number_without_a_layout_lists_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match=r"--gpus 41: no layout with --dp 1 is legal; .*: 1-40, 42, 44, .*80$"):
        rows(question(41, dp=1))
    assert rows(question(42, "short 720p", dp=1)) and rows(question(41, "short 720p"))
    with pytest.raises(ConfigError, match=r"--gpus 13: .*legal numbers: 1-12, 14, 16, 18, 20, 22, 24$"):
        rows(Question(P13, GRIDS["720p"], 13, H200, dp=1))
    with pytest.raises(ConfigError, match="--gpus 0: no layout is legal"):
        rows(question(0))
    with pytest.raises(ConfigError, match=r"fits this video: .*without any"):
        rows(Question(P14, (1, 1, 2), 4, H200, dp=1, branches=1))


# ---- sums


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (2, 2), (4, 4), (2, 3), (1, 7)])
@pytest.mark.parametrize("config", [P14, without_sparsity(P14)], ids=["sparse", "dense"])
def test_the_work_of_all_ranks_is_that_of_the_model(layout: tuple[int, int], config) -> None:
    if not config.sparse and layout[0] > 1:
        with pytest.raises(ConfigError):
            placements(config, GRIDS["short 720p"], *layout)
        return
    held = placements(config, GRIDS["short 720p"], *layout)
    orders = block_orders(config.block_kinds)
    works = [block_work(config, k, held[o], layout[1]) for k, o in zip(config.block_kinds, orders, strict=True)]
    told = forward_flops(config, GRIDS["short 720p"])
    assert sum(sum(work.linear) for work in works) == told.linear
    assert sum(sum(work.attention) for work in works) == told.attention + told.cross


@pytest.mark.parametrize("training", [False, True])
def test_steps_are_the_sums_of_their_parts(training: bool) -> None:
    for row in rows(question(8, training=training)):
        assert row.step == pytest.approx(sum(row.seconds.parts.values()) + row.weights_waiting)
        assert row.needed == sum(row.memory.values())
        assert row.rate == pytest.approx(row.layout.dp / row.step)


def test_bytes_of_a_step_are_those_of_its_forwards_and_of_the_other_branch() -> None:
    velocity = 4 * 16 * 21 * 90 * 160
    for row in rows(question(8)):
        one = forward_traffic(P14, GRIDS["720p"], row.layout.ssp, row.layout.ulysses)
        more = velocity if row.layout.cfg == 2 else 0
        assert row.sent == tuple(2 // row.layout.cfg * b + more for b in one.sent)
        assert row.exchanges == 2 // row.layout.cfg * len(one.transfers) + (more > 0)


def test_weights_are_replicated_to_sample_and_divided_to_train() -> None:
    for row in rows(question(8)):
        assert row.memory["weights"] == pytest.approx(2 * P14.parameter_count(), rel=0.02)
    for row in rows(question(8, training=True)):
        assert row.memory["weights, gradients and moments"] == 16 * P14.parameter_count() // 8
        assert row.weights_sent == pytest.approx(7 / 8 * 8 * P14.parameter_count(), rel=1e-9)


# ---- the model of time


def test_one_device_takes_operations_over_rates() -> None:
    (only,) = rows(question(1))
    told = forward_flops(P14, GRIDS["720p"])
    assert only.step == pytest.approx(2 * (told.linear / 647e12 + (told.attention + told.cross) / 638e12))
    assert only.sent == (0,) and only.exchanges == 0


@pytest.mark.parametrize(
    ("variant", "policy"),
    [
        ("dense", {}),
        ("osp", {}),
        ("osp-hif8", {"quant": "hif8"}),
        ("osp-hif8-attn", {"quant": "hif8", "quant_attn": "hif8_native"}),
    ],
)
@pytest.mark.parametrize("resolution", ["720p", "768p"])
def test_one_device_is_near_what_was_measured(variant: str, policy: dict[str, str], resolution: str) -> None:
    """A forward of the 14B model on an H200. The rates are fitted to blocks of all sizes, not to these sums of them."""
    known = json.loads((ROOT / "benchmarks/results/h200_model.json").read_text())["rows"]
    measured = {(row["resolution"], row["variant"]): row["milliseconds"] for row in known}[resolution, variant]
    asked = question(1, resolution, branches=1, quantization=quantization(**policy))
    told = 1e3 * rows(of_dense(asked) if variant == "dense" else asked)[0].step
    assert 1.0 < told / measured < 1.09


def test_training_is_near_what_was_measured() -> None:
    """Four checkpointed blocks at 768P: training_step_h200.md has 4,975.6 ms for full ones, 2,912.6 ms for one of
    them and three sparse ones, and a peak of 27.6 GiB."""
    grid = GRIDS["768p"]
    token = placements(P14, grid, 1, 1)["token"]
    full, sparse = (block_work(P14, kind, token, 1) for kind in ("full", "token"))
    for works, measured in (([full] * 4, 4.9756), ([full, sparse, sparse, sparse], 2.9126)):
        told = computing(works, H200, linear8=False, attention8=False, training=True)
        assert told.total == pytest.approx(measured, rel=0.03)
    stream, weights = 80640 * 5120 * 2, 351_394_304 * 2
    # Inputs of four blocks and the output, its gradient; weights, of which none has a gradient yet.
    held = 6 * stream + 4 * weights
    assert (held + block_backward(P14, 80640, question(1).dtype)) / 2**30 == pytest.approx(27.6, rel=0.02)


def test_an_exchange_takes_its_busiest_rank_and_a_latency() -> None:
    moved = Transfer("x", ((0, 360, 10), (0, 0, 0), (0, 720, 0)))
    inside = exchanging(moved, (0, 1, 2), H200)
    assert inside.exchanging == pytest.approx(1080 / (450e9 * 0.71))  # rank 1 receives from both
    assert inside.latency == pytest.approx(25e-6)
    across = exchanging(moved, (6, 7, 8), H200)  # rank 8 is in the next node
    assert across.exchanging == pytest.approx(720 / (50e9 * 0.8))
    assert across.latency == pytest.approx(50e-6)


def test_groups_that_leave_a_node_are_slower() -> None:
    """Sixteen devices in two nodes: with the branches apart, groups of eight stay in theirs."""
    ordered = rows(question(16, "short 720p"))
    found = {sizes(row): row for row in ordered}
    assert found[1, 1, 4, 4].seconds.exchanging > 3 * found[1, 2, 4, 2].seconds.exchanging
    assert ordered[0].layout.cfg == 2
    # Six ranks do not divide a node: the group in the middle is in both.
    assert {sizes(row): row for row in rows(question(12, "short 720p"))}[2, 1, 2, 3].seconds.latency > 224 * 49e-6


def test_weights_of_two_nodes_travel_between_them_once() -> None:
    sent, spent = weights_moving(1000, 2, 16, H200)
    assert sent == 1000 * 8 * 15 // 16
    assert spent == pytest.approx(max(8000 / 2 / 8 / (50e9 * 0.8), 8000 * 7 / 8 / (450e9 * 0.71)))
    assert weights_moving(1000, 2, 1, H200) == (0, 0.0)


def test_eight_bits_compute_and_travel_faster() -> None:
    plain, codes = rows(question(8))[0], rows(question(8, payload="hif8"))[0]
    assert max(codes.sent) < 0.78 * max(plain.sent)
    assert codes.seconds.exchanging < plain.seconds.exchanging
    linears = rows(question(8, quantization=quantization(quant="hif8")))[0]
    both = rows(question(8, quantization=quantization(quant="hif8", quant_attn="hif8_native")))[0]
    assert plain.step > linears.step > both.step
    assert linears.memory["weights"] < 0.55 * plain.memory["weights"]
    qdq = rows(question(8, quantization=quantization(quant_attn="hif8")))[0]
    assert qdq.seconds.attention == plain.seconds.attention  # the products are those of bf16


def test_scales_of_whole_tensors_are_agreed_on() -> None:
    assert shared_scales(P14, quantization()) == 0
    assert shared_scales(P14, quantization(quant="hif8")) == 6
    assert shared_scales(P14, quantization(quant="hif8", recipe=HiF8Recipe(granularity="row"))) == 0
    assert shared_scales(P14, quantization(quant="hif8", quant_attn="hif8")) == 12
    assert shared_scales(P14, quantization(quant_attn="hif8_native")) == 4
    plain, quantized = (rows(question(4, quantization=q))[0] for q in (quantization(), quantization(quant="hif8")))
    assert quantized.exchanges == plain.exchanges + 40 * 6
    assert quantized.seconds.latency == pytest.approx(plain.seconds.latency + 40 * 6 * 25e-6)


def test_wan_is_predicted_in_the_same_way() -> None:
    asked = question(8, quantization=quantization(quant="hif8"))
    dense = dense_rows(asked)
    assert {row.layout.ssp for row in dense} == {1}
    assert dense[0].step == rows(of_dense(question(8)))[0].step  # in bf16 whatever was asked
    assert dense_rows(of_dense(asked)) == []


# ---- devices


def test_every_figure_says_how_it_is_known() -> None:
    for known in known_devices().values():
        for name, figure in known.figures:
            assert figure.source, name
            if figure.how == "measured" and name != "reached":
                file = figure.source.split(".md")[0]
                assert (ROOT / "benchmarks/results" / f"{file}.md").exists(), name
    assert device("h200").measured and not device("ascend950pr").measured


def test_figures_of_another_device_come_from_a_file(tmp_path: Path) -> None:
    text = KNOWN.read_text()
    own = text[text.index("h200:") : text.index("ascend950pr:")].replace("h200:", "mine:", 1)
    file = tmp_path / "mine.yaml"
    file.write_text(own)
    assert device("mine", file) == device("h200")
    file.write_text(own.replace("value: 647", "value: 0"))
    with pytest.raises(ConfigError, match=r"mine\.linear_tflops must be positive, found 0"):
        device("mine", file)
    file.write_text(own.replace("per_node: {value: 8", "per_node: {value: 0.5"))
    with pytest.raises(ConfigError, match=r"mine\.per_node must be a whole number, found 0\.5"):
        device("mine", file)
    file.write_text(own.replace("per_node:", "per_nodes:"))
    with pytest.raises(ConfigError, match=r"unknown key 'per_nodes'.*did you mean 'per_node'"):
        device("mine", file)
    file.write_text("mine: 3\n")
    with pytest.raises(ConfigError, match="'mine' must be a section"):
        device("mine", file)
    with pytest.raises(ConfigError, match=r"unknown device 'h20' \(did you mean 'h200'\?\); devices: h200, ascend"):
        device("h20")


# ---- the command


def run(arguments: str) -> int:
    return main(["plan", *arguments.split()])


def test_the_command_says_that_it_predicts(capsys) -> None:
    assert run("--preset 14b --resolution 720p --gpus 8 --top 2") == 0
    out = capsys.readouterr().out
    assert out.startswith("Prediction, not a measurement")
    assert "647  measured   token_scaling_h200.md" in out and "0.8  assumed" in out
    table = [
        line.split() for line in out.splitlines() if line.split()[:4] in (["1", "2", "4", "1"], ["1", "2", "1", "4"])
    ]
    assert [row[4] for row in table] == ["18,480-19,320", "18,900"]
    assert "and 13 more; --top 15 shows them" in out
    assert "Wan2.1 (full attention, bf16) on the same 8, predicted in the same way:" in out


def test_the_published_plans_are_what_the_command_says(capsys) -> None:
    """benchmarks/results/plan_14b_720p.txt; run its commands again when a figure changes."""
    known = (ROOT / "benchmarks/results/plan_14b_720p.txt").read_text()
    arguments = "--preset 14b --resolution 720p --gpus 8 --device h200"
    assert run(arguments) == 0
    assert f"$ ospnext plan {arguments}\n{capsys.readouterr().out}" in known


def test_the_command_gives_everything_as_json(capsys) -> None:
    assert run("--gpus 4 --resolution 480p --training --json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prediction"].startswith("Prediction") and "training" in found["step"]
    assert [layout["dp"] * layout["ssp"] * layout["ulysses"] for layout in found["layouts"]] == [4] * len(
        found["layouts"]
    )
    assert found["device"]["linear_tflops"] == {
        "value": 647.0,
        "how": "measured",
        "source": "token_scaling_h200.md, fitted to 16 blocks; what is elementwise is in it",
    }


def test_unmeasured_devices_are_said_to_be(capsys) -> None:
    assert run("--gpus 2 --device ascend950pr --resolution 480p --dense") == 0
    out = capsys.readouterr().out
    assert "No rate of Ascend 950PR, nodes of eight was measured" in out
    assert "dense 14b at 480p" in out and "Wan2.1 (full" not in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--gpus 0", "legal numbers: 1-80 and any more"),
        ("--gpus 8 --device h100", "unknown device 'h100'"),
        ("--gpus 8 --dp 0", "--top and --dp must be at least 1"),
        ("--gpus 8 --training --payload hif8", "have no gradient"),
        ("--gpus 8 --resolution 8k", "unknown resolution '8k'"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, arguments: str, says: str) -> None:
    assert run(arguments) == 2
    assert says in capsys.readouterr().err
