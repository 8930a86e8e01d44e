"""Ranks that share a sample compute what one process does: velocity and every gradient, to 1e-10 in fp64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_layouts import LAYOUTS, Layout

SCRIPT = Path(__file__).with_name("parallel_layouts.py")
CLOSE = 1e-10
EVERY = [(world, layout) for world, layouts in LAYOUTS.items() for layout in layouts]
EXACT = [(world, layout) for world, layout in EVERY if not layout.mutant and layout.payload == "plain"]
RIGHT = [pytest.param(world, layout, id=layout.name) for world, layout in EXACT]
EIGHT_BITS = [pytest.param(world, layout, id=layout.name) for world, layout in EVERY if layout.payload == "hif8"]
WRONG = [pytest.param(world, layout, id=layout.name) for world, layout in EVERY if layout.mutant]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World size -> what its ranks have found. The ranks of a size are started once for all its layouts."""
    known: dict[int, dict] = {}

    def of(world: int) -> dict:
        if world not in known:
            out = tmp_path_factory.mktemp("ranks") / "results.json"
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(SCRIPT), str(world), str(out)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr[-4000:]
            known[world] = json.loads(out.read_text())
        return known[world]

    return of


@pytest.mark.parametrize(("world", "layout"), RIGHT)
def test_ranks_compute_what_one_process_does(results, world: int, layout: Layout):
    found = results(world)[layout.name]
    assert found["agree"]
    assert found["velocity"] < CLOSE
    wrong = {name: off for name, off in found["gradients"].items() if off > CLOSE}
    assert not wrong


@pytest.mark.parametrize(("world", "layout"), WRONG)
def test_a_gradient_that_slices_is_seen(results, world: int, layout: Layout):
    """The forward pass is right: only gradients tell."""
    found = results(world)[layout.name]
    assert found["velocity"] < CLOSE
    assert max(found["gradients"].values()) > 0.3


@pytest.mark.parametrize(("world", "layout"), EIGHT_BITS)
def test_eight_bits_change_the_velocity_by_what_their_format_rounds(results, world: int, layout: Layout):
    """A value of three bits of mantissa is off by 2^-4 at most; each of the three switches rounds the stream once, and
    the blocks between them add what they compute from it.
    """
    found = results(world)[layout.name]
    assert found["agree"]
    assert 1e-4 < found["velocity"] < 3 * 2.0**-4
