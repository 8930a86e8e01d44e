"""Several ranks make the videos that one process makes: in every layout, from the command line, and interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel_pipelines import CASES, WORLD, Case

from ospnext.cli import main
from ospnext.generation.manifest import read_manifest, sha256_of
from ospnext.pipelines import write_random_checkpoint

SCRIPT = Path(__file__).with_name("parallel_pipelines.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
FP32_ROUNDING = 2.0**-24
SMALL = ["video.height=64", "video.width=96", "video.num_frames=5", "sampling.num_inference_steps=2"]
SMALL += ["sampling.negative_prompt=''"]
BITWISE = [pytest.param(case, id=case.name) for case in CASES if case.bitwise]
ROUNDED = [pytest.param(case, id=case.name) for case in CASES if not case.bitwise and not case.quant]
OWN_SCALES = next(case for case in CASES if not case.share_scales)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(directory, preset="tiny", seed=0)
    return directory


@pytest.fixture(scope="module")
def of_ranks(checkpoint, tmp_path_factory):
    """What each rank of one launch has found, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, str(SCRIPT), str(checkpoint), str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def torchrun(ranks: int, *arguments: object) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launch, "-m", "ospnext", "generate", *map(str, arguments)]


# ---- layouts


@pytest.mark.parametrize("case", BITWISE)
def test_ranks_sample_the_very_bits_of_one_process(of_ranks, case: Case):
    """Each row of a product is the same sum whichever rows are beside it, as kernels of CPUs are at this size."""
    assert all(found[case.name]["agree"] and found[case.name]["bitwise"] for found in of_ranks)


@pytest.mark.parametrize("case", ROUNDED)
def test_another_order_of_tokens_changes_roundings_only(of_ranks, case: Case):
    """Judged as kernels are: against fp64, by what one process rounds off."""
    for found in (found[case.name] for found in of_ranks):
        assert found["agree"]
        assert 0 < found["off"] <= 2 * found["yardstick"] + 2 * FP32_ROUNDING * found["largest"]


def test_scales_must_be_shared(of_ranks):
    """Else each rank has the scale of its own tokens: an error in the first digit."""
    assert not of_ranks[0][OWN_SCALES.name]["bitwise"]
    assert of_ranks[0][OWN_SCALES.name]["off"] > 1e-3 * of_ranks[0][OWN_SCALES.name]["largest"]


def test_what_depends_on_a_ranks_memory_is_decided_together(of_ranks):
    assert [found["batched"] for found in of_ranks] == [[False] * WORLD] * WORLD


# ---- the command line


def said(of_ranks, command: str) -> list[tuple[int, str, str]]:
    return [tuple(found[command][key] for key in ("code", "out", "err")) for found in of_ranks]


def test_a_wrong_size_ends_all_ranks_and_is_told_once(of_ranks):
    error = "error: parallel.ssp=3: the model has 4 subsequences, to be divided evenly, so ssp must be one of 1, 2, 4\n"
    assert said(of_ranks, "size") == [(2, "", error), *[(2, "", "")] * (WORLD - 1)]


def test_an_error_of_one_rank_ends_all_and_names_it(of_ranks):
    codes, outs, errs = zip(*said(of_ranks, "one rank"), strict=True)
    assert codes == (2,) * WORLD
    assert not any(outs)
    assert [rank for rank, err in enumerate(errs) if err] == [2]
    assert errs[2].startswith("error on rank 2: ")
    assert "tiny-elsewhere is not a directory" in errs[2]


def test_ranks_that_were_started_differently_say_in_what(of_ranks):
    codes, outs, errs = zip(*said(of_ranks, "differing"), strict=True)
    assert codes == (2,) * WORLD
    assert not any(outs) and not any(errs[1:])
    assert "  seed\n    ranks 0, 2, 3: 0\n    rank 1: 1\n" in errs[0]


def test_a_dry_run_of_ranks_prints_their_layout_once(of_ranks, tmp_path):
    (code, out, err), *others = said(of_ranks, "dry run")
    assert (code, err) == (0, "")
    assert others == [(0, "", "")] * (WORLD - 1)
    assert "ranks     4: dp 1 x cfg 2 x ssp 2 x ulysses 1\n" in out
    assert "rank        16,380 to 17,472 tokens\n" in out


def test_one_process_plans_for_ranks_and_does_not_run_as_them(checkpoint, tmp_path, capsys):
    command = ["generate", "a fox", "--model", str(checkpoint), "--output", str(tmp_path / "out"), *SMALL]
    assert main([*command, "parallel.cfg=2", "parallel.ssp=2", "--dry-run"]) == 0
    assert "ranks     4: dp 1 x cfg 2 x ssp 2 x ulysses 1\n" in capsys.readouterr().out
    assert main([*command, "parallel.ssp=2"]) == 2
    assert "needs 2 processes, this is one: start it with `torchrun --nproc-per-node 2 -m" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_torchrun_makes_the_files_of_one_process(checkpoint, tmp_path, capfd):
    """Two replicas of two ranks and three videos: one replica makes two."""
    (tmp_path / "prompts.txt").write_text("a fox\na dog\na cat\n")
    given = ["--prompts", tmp_path / "prompts.txt", "--model", checkpoint, *SMALL]
    assert main(["generate", *map(str, given), "--output", str(tmp_path / "one")]) == 0
    capfd.readouterr()
    layout = ["parallel.dp=2", "parallel.cfg=1", "parallel.ssp=2"]
    command = torchrun(4, *given, "--output", tmp_path / "ranks", *layout)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]

    names = [f"video_{i}.mp4" for i in range(3)]
    assert sorted(os.listdir(tmp_path / "ranks")) == ["config.yaml", "manifest.jsonl", *names]
    entries = read_manifest(tmp_path / "ranks")
    assert sorted(entries) == names
    for name, entry in entries.items():
        assert sha256_of(tmp_path / "ranks" / name) == entry["sha256"] == sha256_of(tmp_path / "one" / name)
        assert entry["execution"]["ranks"] == {"dp": 2, "cfg": 1, "ssp": 2, "ulysses": 1}
    assert sorted(re.findall(r"\[(\d)/3\] \S*(video_\d)", done.stdout)) == [
        ("1", "video_0"),
        ("2", "video_1"),
        ("3", "video_2"),
    ]
    assert done.stdout.count("\n") == 3
    assert "Traceback" not in done.stderr

    (tmp_path / "ranks" / names[1]).unlink()
    assert main(["generate", *map(str, given), "--output", str(tmp_path / "ranks"), "--resume"]) == 0
    assert "2 of 3 videos are already in" in capfd.readouterr().out
    assert sha256_of(tmp_path / "ranks" / names[1]) == sha256_of(tmp_path / "one" / names[1])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in Linux's /proc")
def test_ctrl_c_leaves_no_process_and_no_half_video(checkpoint, tmp_path):
    endless = ["sampling.num_inference_steps=1000", "parallel.ssp=2", "sampling.guidance_scale=1"]
    given = ["a fox", "--model", checkpoint, "--output", tmp_path / "out", *SMALL, *endless]
    # A session of its own: nobody but the launcher is to get the signal, and it passes it on.
    with subprocess.Popen(
        torchrun(2, *given), env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while (
            not (tmp_path / "out" / "config.yaml").exists() and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        ranks = children(process.pid)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(ranks) == 2
    assert not [rank for rank in ranks if Path(f"/proc/{rank}").exists()]
    assert os.listdir(tmp_path / "out") == ["config.yaml"]
