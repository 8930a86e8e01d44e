"""`ospnext generate`: what an interruption leaves, what `--resume` goes on with, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fake_pipeline
import pytest
from fake_pipeline import NAMES, PROMPTS, files_in, generate, sha256

from ospnext.errors import ConfigError
from ospnext.generation import videos
from ospnext.generation.manifest import append_entry, read_manifest

fake, prompts = fake_pipeline.fake, fake_pipeline.prompts


def interrupt_at(number):
    def on_call(n):
        if n == number:
            raise KeyboardInterrupt

    return on_call


def test_ctrl_c_while_sampling_leaves_whole_videos_and_resume_completes(fake, prompts, tmp_path, capsys):
    fake.on_call = interrupt_at(2)
    assert generate(*prompts) == 130
    assert files_in(tmp_path / "out") == ["config.yaml", "manifest.jsonl", "video_0.mp4"]
    assert "1 of 3 videos were made; the same command with --resume" in capsys.readouterr().err
    kept = (tmp_path / "out" / "video_0.mp4").stat().st_mtime_ns

    fake.on_call = lambda n: None
    assert generate(*prompts, "--resume") == 0
    assert [call["prompt"] for call in fake.calls] == ["a", "b", "b", "c"]
    assert (tmp_path / "out" / "video_0.mp4").stat().st_mtime_ns == kept
    manifest = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in manifest] == NAMES

    assert generate(*prompts, "--resume") == 0  # nothing is left to do
    assert len(fake.calls) == 4
    assert "3 of 3 videos are already in" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["write_mp4", "sha256_of", "append_entry"])
def test_ctrl_c_while_writing_leaves_no_partial_file(fake, prompts, tmp_path, monkeypatch, step):
    real = getattr(videos, step)

    def interrupted(*arguments):
        if "second.mp4" not in str(arguments):
            return real(*arguments)
        if step == "write_mp4":
            Path(arguments[1]).write_bytes(b"half a video")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(videos, step, interrupted)
        assert generate(*prompts) == 130
    assert files_in(tmp_path / "out") == ["config.yaml", "manifest.jsonl", "video_0.mp4"]
    assert generate(*prompts, "--resume") == 0
    assert files_in(tmp_path / "out") == sorted([*NAMES, "config.yaml", "manifest.jsonl"])


def test_an_entry_whose_video_was_never_named_is_made_again(fake, prompts, tmp_path):
    """What a power cut between the manifest entry and the renaming leaves."""
    assert generate(*prompts) == 0
    (tmp_path / "out" / "second.mp4").unlink()
    assert generate(*prompts, "--resume") == 0
    assert read_manifest(tmp_path / "out")["second.mp4"]["sha256"] == sha256(tmp_path / "out" / "second.mp4")


@pytest.mark.parametrize(
    ("change", "field", "was", "now"),
    [
        ("--seed=1", "seed", "0", "1"),
        ("video.width=64", "width", "48", "64"),
        ("video.fps=8", "fps", "16", "8.0"),
        ("sampling.guidance_scale=4", "guidance_scale", "5.0", "4.0"),
        ("sampling.num_inference_steps=3", "num_inference_steps", "2", "3"),
        ("scheduler.shift=3", "scheduler", ".*'shift': None", ".*'shift': 3.0"),
        ("transformer.timestep_rounding=bf16", "transformer", ".*'none'", ".*'bf16'"),
        ("dtype=bfloat16", "dtype", "None", "'bfloat16'"),
        ("model=elsewhere", "model", ".*", ".*elsewhere'"),
    ],
)
def test_resume_with_another_setting_names_it(fake, prompts, capsys, change, field, was, now):
    assert generate(*prompts) == 0
    if change.startswith("model"):
        prompts = [*prompts[:2], *prompts[4:]]
    assert generate(*prompts, "--resume", change) == 2
    assert len(fake.calls) == 3
    expected = rf"^error: .*video_0\.mp4 was made with other settings: .*{field} was {was}.* and is now {now}"
    assert re.search(expected, capsys.readouterr().err)


def test_resume_with_another_prompt_names_it(fake, prompts, tmp_path, capsys):
    assert generate(*prompts) == 0
    (tmp_path / "p.jsonl").write_text(PROMPTS.replace('"b"', '"a boat"'))
    assert generate(*prompts, "--resume") == 2
    assert "second.mp4 was made with other settings: prompt was 'b' and is now 'a boat'" in capsys.readouterr().err


def test_resume_may_change_what_does_not_touch_the_videos(fake, prompts, tmp_path):
    assert generate(*prompts) == 0
    with (tmp_path / "p.jsonl").open("a") as file:
        file.write('{"prompt": "d"}\n')
    how = ["compile=blocks", "sampling.batched_guidance=off", "vae.tiling=on"]
    assert generate(*prompts, "--resume", "--backend", "reference", *how) == 0
    assert [call["prompt"] for call in fake.calls] == ["a", "b", "c", "d"]


def test_resume_refuses_a_video_it_does_not_know_or_that_has_changed(fake, prompts, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "second.mp4").write_bytes(b"mine")
    assert generate(*prompts, "--resume") == 2
    assert "second.mp4 exists but the manifest does not know it" in capsys.readouterr().err
    assert (tmp_path / "out" / "second.mp4").read_bytes() == b"mine"

    (tmp_path / "out" / "second.mp4").unlink()
    assert generate(*prompts) == 0
    with (tmp_path / "out" / "second.mp4").open("ab") as file:
        file.write(b"x")
    assert generate(*prompts, "--resume") == 2
    assert "another sha256" in capsys.readouterr().err


def test_a_damaged_manifest_is_refused_with_its_line(tmp_path):
    append_entry(tmp_path, {"file": "a.mp4"})
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"file": "b.m')
    with pytest.raises(ConfigError, match=r"manifest\.jsonl:2: not a manifest entry"):
        read_manifest(tmp_path)


def test_other_files_beside_the_manifest_are_left_alone(fake, prompts, tmp_path):
    """Neither read as a part of it, nor put into it and deleted."""
    out, backup = tmp_path / "out", {"file": "second.mp4", "seed": 77}
    assert generate(*prompts) == 0
    for name in ("manifest.backup.jsonl", "manifest.0.jsonl", "manifest.1.old.jsonl"):
        append_entry(tmp_path, backup)
        (tmp_path / "manifest.jsonl").rename(out / name)
    before = read_manifest(out)
    assert before["second.mp4"]["seed"] == 1
    (out / "video_0.mp4").unlink()
    assert generate(*prompts, "--resume") == 0
    assert read_manifest(out)["second.mp4"] == before["second.mp4"]
    for name in ("manifest.backup.jsonl", "manifest.0.jsonl", "manifest.1.old.jsonl"):
        assert json.loads((out / name).read_text()) == backup


def test_an_interrupted_append_leaves_the_manifest_as_it_was(tmp_path, monkeypatch):
    append_entry(tmp_path, {"file": "a.mp4"})

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            append_entry(tmp_path, {"file": "b.mp4"})
    assert files_in(tmp_path) == ["manifest.jsonl"]
    assert list(read_manifest(tmp_path)) == ["a.mp4"]
