"""The scripts in benchmarks/ that measure blocks and models: each in its tiny form on a CPU, and its arithmetic."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from ospnext.bench import diffusers_twin, floor, weights
from ospnext.bench.workload import workload

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")

SCRIPTS = {
    "model_error": ("| 7 full |", "latents after 3 steps of Euler"),
    "training_step": ("| dense, bf16 |", "| sparse, HiF8 linears |"),
    "token_scaling": ("Fitted:", "| 128x160 | 9 | 240 | token |"),
    "rank_share": ("No two\ndevices were used together.", "| 96x128 | osp | 2 | 2 x 1 | 72 |"),
    "diffusers_model": ("| native |", "diffusers 0."),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_companion_scripts(script, tmp_path, capsys, monkeypatch):
    if script == "diffusers_model":
        pytest.importorskip("diffusers")
        monkeypatch.setattr(diffusers_twin, "COMPILER", "aot_eager")  # to put back what the script changes
    monkeypatch.setattr(sys, "argv", [script, "--tiny", "--out", str(tmp_path / "out.md")])
    runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    text = (tmp_path / "out.md").read_text()
    assert all(words in text for words in SCRIPTS[script])
    assert "FAILED" not in text
    assert text.strip() == capsys.readouterr().out.strip()


def test_the_fit_finds_the_rates_that_made_the_points():
    """Times of 3 ms + linear at 700 and attention at 600 TFLOP/s come back."""
    script = runpy.run_path(str(BENCHMARKS / "token_scaling.py"), run_name="token_scaling")
    made = []
    for resolution in ("480p", "720p", "768p"):
        work = workload("14b", resolution)
        for kind in ("full", "token"):
            linear = work.tokens * 600_000_000
            attention = floor.self_attention_flops(work.config, kind, work.grid)
            made.append(script["Point"](work, kind, linear, attention, 3 + linear / 700e9 + attention / 600e9))
    found = script["fit"](made)
    assert found.constant == pytest.approx(3, rel=1e-6)
    assert found.linear_rate == pytest.approx(700e12, rel=1e-6)
    assert found.attention_rate == pytest.approx(600e12, rel=1e-6)


def test_errors_of_a_model_in_fp32_are_those_of_rounding():
    """bf16 rounds at 2^-9; HiFloat8 linears err by some percent (docs/hif8.md); per row is no worse than per tensor."""
    script = runpy.run_path(str(BENCHMARKS / "model_error.py"), run_name="model_error")
    work = script["TINY"]
    state, inputs = weights.random_state(work.config, CPU), weights.random_inputs(work, CPU)
    with torch.no_grad():
        truth = script["in_fp32"](work.config, state)
        given = script["block_inputs"](truth, inputs)
        plain, tensor, by_row = (
            script["block_errors"](truth, variant.build(work.config, state), given, inputs.text_BLC)
            for variant in script["VARIANTS"][:3]
        )
    assert max(plain) < 2e-2 < min(by_row)
    assert max(tensor) < 0.12
    assert sum(by_row) <= sum(tensor)
