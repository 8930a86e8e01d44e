"""The benchmark beside diffusers: the same velocity from the same weights, and its rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from ospnext.bench import diffusers_twin, variants, weights
from ospnext.bench.variants import VARIANTS
from ospnext.bench.workload import workload
from ospnext.cli import main

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
SIZE = ["--preset", "tiny", "--resolution", "64x96", "--frames", "5", "--repeats", "1", "--quiet"]


def test_diffusers_computes_the_same_velocity(monkeypatch):
    """In fp32, through the key map and on shared weights; the bound is that of test_model_against_diffusers."""
    pytest.importorskip("diffusers")
    work = workload("tiny", "64x96", frames=5)
    state, inputs = (
        weights.random_state(work.config, CPU, torch.float32),
        weights.random_inputs(work, CPU, torch.float32),
    )
    ours = VARIANTS["dense"].build(work.config, state)
    theirs = diffusers_twin.twin(variants.dense(work.config), state)
    assert theirs.blocks[3].ffn.net[2].weight.data_ptr() == state["blocks.3.ffn.2.weight"].data_ptr()
    name = diffusers_twin.fastest_attention(work.config, work.tokens, CPU, torch.float32)
    forward = diffusers_twin.forward_of(theirs, name, inputs, "off")
    expected = ours(inputs.latents_BCTHW, inputs.timestep_B, inputs.text_BLC)
    assert ((forward() - expected).norm() / expected.norm()).item() < 1e-5


def bench(tmp_path, *options: str) -> dict:
    path = tmp_path / "bench.json"
    assert main(["bench", "model", *SIZE, "--json", str(path), "--out", str(tmp_path / "bench.md"), *options]) == 0
    return json.loads(path.read_text())


def test_against_diffusers(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers_twin, "COMPILER", "aot_eager")
    found = bench(tmp_path, "--variants", "dense,osp", "--against", "diffusers", "--layers", "2")
    dense, osp, theirs = found["rows"]
    assert theirs["variant"] == "diffusers-compiled"
    assert theirs["error"] is None
    # Both round to bf16, 2^-9, in other places: several percent would be another function.
    assert theirs["difference_to"]["dense"] < 2e-2
    assert dense["ratio_to_diffusers_compiled"] == pytest.approx(theirs["milliseconds"] / dense["milliseconds"])
    assert osp["ratio_to_diffusers_compiled"] is not None
    assert next(iter(theirs["kernels"]["attention"])).startswith("diffusers.")


def test_without_diffusers_the_error_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["bench", "model", *SIZE, "--against", "diffusers"]) == 2
    assert "pip install 'ospnext[t2v]'" in capsys.readouterr().err
