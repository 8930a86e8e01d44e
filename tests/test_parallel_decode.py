"""Ranks that share a decode make the frames of one process that decodes in tiles, and share nothing that fits whole."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parallel_decodes import LATENTS, PIPELINES, WORLDS, broken_on_the_last
from rank_processes import run_ranks
from test_parallel_generate import ENVIRONMENT, SMALL, torchrun

from ospnext.cli import main
from ospnext.generation.manifest import read_manifest, sha256_of
from ospnext.pipelines import write_random_checkpoint

SCRIPT = Path(__file__).with_name("parallel_decodes.py")
RUNS = [(world, layout, way) for world, runs in PIPELINES.items() for layout, way in runs]
CASES = {case.name: case for case in LATENTS}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """By number of ranks, what each of them has found."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {w: [json.loads((folder / f"{w}-{rank}.json").read_text()) for rank in range(w)] for w in WORLDS}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
class TestOneDecode:
    def test_the_first_gets_the_bits_of_one_process_and_the_others_nothing(self, of_ranks, world, name):
        assert [found[name]["equal"] for found in of_ranks[world]] == [True, *[None] * (world - 1)]

    def test_each_tile_is_decoded_once_and_the_work_is_even(self, of_ranks, world, name):
        """The hook of the decoder saw an area for each tile and latent frame."""
        videos, _, frames, _, _ = CASES[name].shape
        tiles = of_ranks[world][0][name]["tiles"]
        decoded = [found[name]["areas"] for found in of_ranks[world]]
        assert sorted(itertools.chain(*decoded)) == sorted(tiles * frames * videos)
        per_frame = [sum(areas) / (frames * videos) for areas in decoded]
        assert max(per_frame) - min(per_frame) <= max(tiles)
        assert all(per_frame) == (len(tiles) >= world)

    def test_every_rank_but_the_first_sends_its_frames_once(self, of_ranks, world, name):
        frames = CASES[name].shape[2]
        first, *others = (found[name] for found in of_ranks[world])
        assert first["sent"] == 0
        for found in others:
            positions = sum(found["areas"]) // frames
            assert found["sent"] == positions * (4 * frames - 3) * 3 * 8 * 8 * 4


def test_some_ranks_have_no_tile(of_ranks):
    assert [bool(found["two-tiles"]["areas"]) for found in of_ranks[4]] == [True, True, False, False]


@pytest.mark.parametrize(("world", "layout", "way"), RUNS, ids=lambda value: getattr(value, "name", None))
def test_pipelines(of_ranks, world, layout, way):
    for found in (found[f"{layout}, {way.name}"] for found in of_ranks[world]):
        assert found["frames"] == ([way.expected] if found["leads"] else None)
        assert found["decided"]["shared"] == way.shared
        if found["leads"] or way.shared:
            assert found["decided"]["tiled"] == (way.expected == "tiles")


def test_a_rank_that_fails_in_its_tiles_ends_all():
    first, last = run_ranks(broken_on_the_last, 2, 60.0, timeout=60.0, limit=240.0)  # each imports diffusers first
    assert first.exit_code not in (0, None) and last.exit_code == 1
    assert last.stderr.rstrip().endswith("RuntimeError: no room for a tile")
    assert "rank 1: RuntimeError: no room for a tile" in first.stderr


def test_torchrun_makes_the_file_of_one_process(tmp_path, capfd):
    """In two tiles, by ranks that have a branch of guidance each."""
    write_random_checkpoint(tmp_path / "model", preset="tiny", seed=0)
    given = ["a fox", "--model", tmp_path / "model", *SMALL, "video.width=272"]
    given += ["vae.tiling=on", "sampling.batched_guidance=off"]
    assert main(["generate", *map(str, given), "--output", str(tmp_path / "one")]) == 0
    command = torchrun(2, *given, "--output", tmp_path / "ranks")
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(os.listdir(tmp_path / "ranks")) == ["config.yaml", "manifest.jsonl", "video_0.mp4"]
    one, shared = (read_manifest(tmp_path / folder)["video_0.mp4"] for folder in ("one", "ranks"))
    assert one["sha256"] == shared["sha256"] == sha256_of(tmp_path / "ranks" / "video_0.mp4")
    assert (one["execution"]["tiled"], one["execution"]["shared"]) == (True, False)
    assert (shared["execution"]["tiled"], shared["execution"]["shared"]) == (True, True)
    assert shared["execution"]["ranks"]["cfg"] == 2
