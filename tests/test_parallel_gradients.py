"""The table of gradients of ranks against one process: what it says as committed, and as its script makes it."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_layouts import Computed, Layout, model_of

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "parallel_gradients.py"
COMMITTED = BENCHMARKS / "results" / "parallel_gradients.md"
#: In fp64, and of the rounding of a scale to fp32 that a guided velocity makes larger.
CLOSE, SCALES, WRONG = 1e-10, 1e-5, 1e-3
#: Made of the text's keys and values, or before them.
OF_TEXT = {"text", "cross-attention"}

Rows = list[tuple[dict[str, str], dict[str, float]]]


@pytest.fixture(scope="module", params=["committed", "tiny"])
def tables(request, tmp_path_factory) -> dict[str, Rows]:
    out = COMMITTED
    if request.param == "tiny":
        out = tmp_path_factory.mktemp("table") / "out.md"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.strip() == out.read_text().strip()
    return parsed(out.read_text())


def parsed(text: str) -> dict[str, Rows]:
    """By heading, the rows of its tables: what the layout is, and errors by column."""
    found: dict[str, Rows] = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        head, body = cells[0], [row for row in cells if row[0] not in ("layout", "---")]
        found[title] = [
            (dict(zip(head[:5], row, strict=False)), dict(zip(head[5:], map(float, row[5:]), strict=True)))
            for row in body
        ]
    return found


@pytest.mark.parametrize("section", ["Full precision", "HiFloat8"])
def test_ranks_have_the_gradients_of_one_process(tables, section: str) -> None:
    for layout, errors in tables[section]:
        assert len(errors) == 13
        assert max(errors.values()) < CLOSE, layout
    assert any(any(errors.values()) for _, errors in tables[section])  # it is not compared with itself


ODD = "HiFloat8, where ranks are no power of two"


def test_where_scales_round_otherwise_only_the_text_can_tell(tables) -> None:
    for layout, errors in tables[ODD]:
        assert max(error for group, error in errors.items() if group not in OF_TEXT) < CLOSE, layout
        assert 0 < max(errors.values()) < SCALES, layout


def test_quantizing_changes_more_than_how_often_a_loss_is_counted(tables) -> None:
    of_ranks, of_one = [], {}
    for layout, errors in tables[f"{ODD}, against a loss that is counted once"]:
        if layout["ranks"] == "1":
            of_one[layout["k"], "guided" in layout["layout"]] = errors
        else:
            of_ranks.append((layout, errors))
    assert of_ranks
    for layout, errors in of_ranks:
        yardstick = of_one[layout["k"], "cfg" in layout["layout"]]
        assert all(errors[group] < yardstick[group] for group in errors), layout


def test_a_gradient_that_slices_is_seen_in_every_group_before_an_exchange(tables) -> None:
    """The forward pass is right, and so is the head, behind the last exchange."""
    assert tables["A gradient that slices"]
    for layout, errors in tables["A gradient that slices"]:
        right = {"velocity", "head"}
        assert max(errors[group] for group in right) < CLOSE, layout
        assert min(error for group, error in errors.items() if group not in right) > WRONG, layout


def test_the_committed_table_has_every_kind_of_layout() -> None:
    rows = [layout for section in parsed(COMMITTED.read_text()).values() for layout, _ in section]
    assert {row["ranks"] for row in rows} >= set("234689")
    assert {(row["k"], row[""]) for row in rows} == {(k, even) for k in "123" for even in ("even", "uneven")}
    words = {word for row in rows for word in row["layout"].split(" x ")}
    assert words >= {"cfg 2", *(f"ssp {n}" for n in (2, 3, 4, 9)), *(f"ulysses {n}" for n in (2, 3, 4, 6, 8))}


def test_a_group_tells_its_own_error_only() -> None:
    script = runpy.run_path(str(SCRIPT), run_name="parallel_gradients")
    gradients = {name: torch.ones(3) for name, _ in model_of(Layout(1, 1, full=0)).named_parameters()}
    for name, group in (
        ("patch_embedding.bias", "patch"),
        ("blocks.2.modulation", "modulation"),
        ("blocks.1.self_attn.k.weight", "k"),
        ("blocks.3.norm3.weight", "cross-attention"),
        ("head.modulation", "head"),
    ):
        off = gradients | {name: torch.tensor([1.0, 0.75, 1.0])}
        errors = script["by_group"](Computed(torch.ones(2), off), Computed(torch.ones(2), gradients))["errors"]
        assert {column: error for column, error in errors.items() if error} == {group: 0.25}
