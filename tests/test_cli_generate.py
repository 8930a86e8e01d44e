"""`ospnext generate`: the command line, what is refused before anything loads, and real videos end to end."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import av
import fake_pipeline
import numpy as np
import pytest
import torch
from fake_pipeline import NAMES, SMALL, files_in, generate, sha256

from ospnext import ops
from ospnext.cli import COMMANDS, main
from ospnext.cli import generate as command
from ospnext.cli.generate import split_words
from ospnext.cli.ranks import Ranks
from ospnext.config import read_yaml
from ospnext.diffusion import FlowMatchSchedule
from ospnext.errors import ConfigError
from ospnext.generation import videos
from ospnext.generation.config import SchedulerConfig
from ospnext.generation.manifest import read_manifest
from ospnext.launch import Launch
from ospnext.parallel.config import ParallelConfig
from ospnext.pipelines import OSPNextPipeline, to_uint8, write_mp4, write_random_checkpoint

fake, prompts = fake_pipeline.fake, fake_pipeline.prompts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(directory, preset="tiny", seed=0)
    return directory


# ---- the command line


def printed_config(capsys, tmp_path, *arguments):
    assert generate("--print-config", *arguments) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    return read_yaml(tmp_path / "printed.yaml")


def test_command_line_beats_file_beats_defaults(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nprompts: file.txt\nvideo: {height: 64, width: 64}\nscheduler: {shift: 2}\n")
    given = ["fox", "--config", file, "video.width=96", "--model", "m", "video.width=128"]
    found = printed_config(capsys, tmp_path, *given)
    assert found["video"] == {"height": 64, "width": 128, "num_frames": 81, "fps": 16, "quality": 8}
    assert (found["seed"], found["model"], found["scheduler"]["shift"]) == (1, "m", 2)
    assert (found["prompt"], found["prompts"]) == ("fox", None)  # a prompt replaces the file's prompt file
    assert printed_config(capsys, tmp_path, "--config", file)["prompts"] == "file.txt"
    assert printed_config(capsys, tmp_path, "--config", file, "--seed", "3")["seed"] == 3


def test_the_printed_config_gives_itself(tmp_path, capsys):
    first = printed_config(capsys, tmp_path, "no", "sampling.negative_prompt=''", "scheduler.solver=euler")
    assert printed_config(capsys, tmp_path, "--config", tmp_path / "printed.yaml") == first
    assert first["prompt"] == "no"


@pytest.mark.parametrize(
    ("words", "verbatim", "expected"),
    [
        (["a red fox", "seed=3", "video.fps=8"], [], ("a red fox", ["seed=3", "video.fps=8"])),
        (["e=mc2 written in chalk"], [], ("e=mc2 written in chalk", [])),
        (["A=B"], [], ("A=B", [])),
        (["seed = growing"], [], ("seed = growing", [])),
        (["seed=growing"], [], (None, ["seed=growing"])),
        (["fps=8"], ["seed=growing"], ConfigError),
        ([], ["seed=growing"], ("seed=growing", [])),
        (["sampel.num_inference_steps=3"], [], ConfigError),
        (["height=32"], [], ConfigError),
        (["samplng.negative_prompt=bad hands"], [], ConfigError),
        (["unlike=anything"], [], ConfigError),
        (["a", "red fox"], [], ConfigError),
        (["a"], ["b"], ConfigError),
    ],
)
def test_words_are_prompts_or_settings_and_never_guessed(words, verbatim, expected):
    if expected is ConfigError:
        with pytest.raises(ConfigError, match="--prompts"):
            split_words(words, verbatim)
    else:
        assert split_words(words, verbatim) == expected


def test_a_misspelled_setting_names_the_right_one():
    with pytest.raises(ConfigError, match=r"'fps' is no key \(did you mean 'video.fps'\?\)"):
        split_words(["fps=8"], [])


def test_words_after_the_dashes_are_the_prompt(tmp_path, capsys):
    found = printed_config(capsys, tmp_path, "--seed", "4", "--", "seed=5")
    assert (found["prompt"], found["seed"]) == ("seed=5", 4)


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from ospnext.cli import main\n"
        "for argv in (['--help'], ['--version'], []):\n"
        "    try: main(argv)\n"
        "    except SystemExit as stop: assert stop.code == 0, argv\n"
        "assert main(['genrate']) == 2\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'ospnext.cli.generate'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "did you mean 'generate'?" in done.stderr


def test_every_command_can_say_what_it_takes(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: ospnext {name} " in capsys.readouterr().out


# ---- what is refused before anything loads


def test_mistakes_are_found_before_diffusers_or_transformers_is_imported(tmp_path, checkpoint):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "video_0.mp4").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "height": 40}\n')
    (tmp_path / "bad.yaml").write_text("video:\n  hieght: 32\n")
    good = ["fox", "--model", str(checkpoint), "--output", str(tmp_path / "out"), *SMALL]
    cases = {
        "no prompt was given": good[1:],
        "no model was given": ["fox"],
        "is not a directory": [*good, "--model", str(tmp_path / "nowhere")],
        "is not a text-to-video checkpoint": [*good, "--model", str(tmp_path)],
        "lacks transformer": [*good, "--model", str(broken)],
        "did you mean 'video.height'": [*good, "--config", str(tmp_path / "bad.yaml")],
        "video.height must be a multiple of 16": [*good, "video.height=40"],
        "video.num_frames must be 4k + 1": [*good, "video.num_frames=80"],
        "rows.jsonl:2: video.height": [*good[1:], "--prompts", str(tmp_path / "rows.jsonl")],
        "holds no prompt": [*good[1:], "--prompts", str(tmp_path / "empty.txt")],
        "both a prompt and a prompt file": [*good, "--prompts", "x"],
        "unknown backend 'cudda'": [*good, "--backend", "cudda"],
        "is a file; give a folder": [*good, "--output", str(tmp_path / "empty.txt" / "out")],
        "add --resume": [*good, "--output", str(tmp_path / "taken")],
        "sparse_ratio must be at least 2": [*good, "transformer.sparse_ratio=1"],
        "found 'many' (text)": [*good, "sampling.num_inference_steps=many"],
        "'seed' was given twice": [*good, "--seed", "1", "seed=2"],
        "unrecognized arguments: --sede": [*good, "--sede=1"],
        "invalid int value": [*good, "--seed", "x"],
        "compile must be one of off, blocks, max, found 'fast'": [*good, "compile=fast"],
        "sampling.batched_guidance must be one of auto, on, off": [*good, "sampling.batched_guidance=yes"],
        "vae.tiling must be one of auto, on, off": [*good, "vae.tiling=true"],
        "vae.tiling=off makes none; change one": [*good, "vae.tiling=off", "vae.parallel=on"],
        "--report-quant looks into layers": [*good, "quant=hif8", "--report-quant", "compile=blocks"],
    }
    code = (
        "import json, sys; from ospnext.cli import main\n"
        "codes = [main(['generate', *argv]) for argv in json.loads(sys.argv[1])]\n"
        "print(json.dumps([codes, sorted({'diffusers', 'transformers'} & sys.modules.keys())]))"
    )
    command = [sys.executable, "-c", code, json.dumps(list(cases.values()))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[2] * len(cases), []]
    errors = ("\n" + done.stderr.strip()).split("\nerror: ")[1:]
    assert "Traceback" not in done.stderr
    assert len(errors) == len(cases), done.stderr
    for expected, error in zip(cases, errors, strict=True):
        assert expected in error
    assert not (tmp_path / "out").exists()


def test_unexpected_exceptions_keep_their_traceback(fake, prompts):
    fake.on_call = lambda n: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(*prompts)


# ---- a run


def test_a_run_passes_on_every_setting_and_records_it(fake, prompts, tmp_path, capsys):
    more = ["sampling.guidance_scale=3.5", "scheduler.solver=unipc", "--seed", "20", "video.fps=8", "vae.tiling=on"]
    assert generate(*prompts, *more) == 0
    out = tmp_path / "out"
    assert files_in(out) == sorted([*NAMES, "config.yaml", "manifest.jsonl"])
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == NAMES
    assert [row["seed"] for row in rows] == [20, 21, 40]
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    for row, call in zip(rows, fake.calls, strict=True):
        keys = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")
        assert {key: row[key] for key in keys} == {key: call[key] for key in keys}
        assert call["generator"].initial_seed() == row["seed"]
        assert row["sha256"] == sha256(out / row["file"])
        assert (row["height"], row["width"], row["num_frames"], row["fps"]) == (32, 48, 5, 8)
        assert (row["num_inference_steps"], row["guidance_scale"]) == (2, 3.5)
        assert row["model"] == str(tmp_path.resolve())
        assert row["versions"]["torch"] == torch.__version__
        # Two steps with shift 5: sigmas 1, 5 * 0.5 / (1 + 4 * 0.5) and 0, as little-endian fp32.
        assert row["sigmas_sha256"] == hashlib.sha256(np.array([1, 2.5 / 3, 0], "<f4").tobytes()).hexdigest()
        assert row["backend"]["device"] == "cpu"
        how = {"compile": "off", "batched_guidance": "auto", "vae_tiling": "on", "vae_parallel": "auto"}
        assert row["execution"] == how | fake.decided
    assert fake.calls[0]["negative_prompt"] == ""
    assert fake.calls[1]["negative_prompt"].startswith("色调艳丽")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # pytest's stdout is no terminal
    assert all(name in line for name, line in zip(NAMES, lines, strict=True))
    assert fake.bar["disable"] is True


def test_the_written_config_repeats_the_run(fake, prompts, tmp_path):
    assert generate(*prompts, "--seed", "5") == 0
    assert generate("--config", tmp_path / "out" / "config.yaml", "--output", tmp_path / "again") == 0
    assert [sha256(tmp_path / "again" / name) for name in NAMES] == [sha256(tmp_path / "out" / name) for name in NAMES]


def test_the_recorded_seed_makes_a_video_again_on_its_own(fake, prompts, tmp_path):
    assert generate(*prompts, "--seed", "5") == 0
    row = read_manifest(tmp_path / "out")["second.mp4"]
    assert generate("b", "--seed", row["seed"], *prompts[2:4], "--output", tmp_path / "alone", *SMALL) == 0
    assert sha256(tmp_path / "alone" / "video_0.mp4") == row["sha256"]


def test_shared_seeds_make_one_noise_for_all_prompts(fake, prompts, tmp_path):
    assert generate(*prompts, "seed_mode=shared") == 0
    shas = [sha256(tmp_path / "out" / name) for name in NAMES]
    assert shas[0] == shas[1] != shas[2]  # the third row has a seed of its own


def test_backend_option_beats_the_environment_for_the_run_only(fake, prompts, monkeypatch):
    before = ops.current_policy()
    monkeypatch.setenv("OSPNEXT_BACKEND", "auto")
    assert generate(*prompts, "--backend", "reference") == 0
    assert {call["backend"] for call in fake.calls} == {"reference"}
    assert ops.current_policy() == before


def test_dry_run_prints_the_plan_and_writes_nothing(fake, prompts, tmp_path, capsys, monkeypatch):
    def make_plan(run, jobs, device, layout, local_ranks):
        return SimpleNamespace(text=lambda: f"{len(jobs)} of {len(run.jobs)} on {device}")

    monkeypatch.setitem(sys.modules, "ospnext.generation.plan", SimpleNamespace(make_plan=make_plan))
    assert generate(*prompts, "--dry-run") == 0
    assert capsys.readouterr().out == "3 of 3 on cpu\n"
    assert not (tmp_path / "out").exists()
    assert fake.calls == []


def test_the_ways_to_run_reach_the_pipeline(tmp_path, checkpoint, monkeypatch):
    found = {}
    monkeypatch.setattr(
        videos, "make_video", lambda run, job, pipeline, device, mesh: found.update(vars(pipeline)) or {"seconds": 0}
    )
    settings = ["compile=blocks", "sampling.batched_guidance=off", "vae.tiling=on", "vae.parallel=off"]
    assert generate("fox", "--model", checkpoint, "--output", tmp_path / "out", *SMALL, *settings) == 0
    assert (found["batched_guidance"], found["vae_tiling"], found["vae_parallel"]) == ("off", "on", "off")
    assert found["_compiled"].mode == "blocks"


class AsIfFirst(Ranks):
    """The first of ranks that are not there."""

    def in_step(self, timeout=0.0):
        return nullcontext()

    def agree(self, facts, device):
        pass


def test_a_run_says_when_replicas_have_no_video(fake, prompts, capsys, monkeypatch):
    ranks = AsIfFirst(Launch(rank=0, world=5, local_rank=0, local_world=5))
    monkeypatch.setattr(command, "ranks_of_command", lambda: nullcontext(ranks))
    monkeypatch.setattr(command, "_make_videos", lambda *_: 0)
    for dp, said in ((5, "dp 5: 2 replicas have no video; "), (3, "")):
        layout = ParallelConfig(dp=dp)
        monkeypatch.setattr("ospnext.generation.parallel.layout_of", lambda run, world, layout=layout: layout)
        assert generate(*prompts) == 0
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)


# ---- the real pipeline


def test_setting_a_shift_turns_dynamic_shifting_off():
    dynamic = FlowMatchSchedule(dynamic_shift=True)
    configured = videos.configured_schedule
    assert configured(dynamic, SchedulerConfig(shift=3)) == FlowMatchSchedule(shift=3, dynamic_shift=False)
    assert configured(dynamic, SchedulerConfig()) == dynamic
    assert configured(FlowMatchSchedule(), SchedulerConfig(use_dynamic_shifting=True)) == dynamic


def test_a_video_from_the_command_line_is_what_the_pipeline_makes(tmp_path, checkpoint, capsys):
    settings = [*SMALL, "sampling.guidance_scale=3", "sampling.negative_prompt=rain", "video.quality=9"]
    settings += ["scheduler.shift=2", "scheduler.solver=euler"]
    settings += ["transformer.skiparse_model_type=full", "transformer.timestep_rounding=bf16"]
    assert generate("a red fox", "--model", checkpoint, "--output", tmp_path / "out", "--seed", "7", *settings) == 0
    with av.open(str(tmp_path / "out" / "video_0.mp4")) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].average_rate == 16
    assert [(frame.height, frame.width) for frame in frames] == [(32, 48)] * 5

    pipeline = OSPNextPipeline.from_pretrained(
        checkpoint, transformer_overrides={"skiparse_model_type": "full"}, timestep_rounding="bf16"
    )
    pipeline.schedule, pipeline.solver = FlowMatchSchedule(shift=2), "euler"
    noise = torch.Generator().manual_seed(7)
    expected = pipeline("a red fox", "rain", 32, 48, 5, num_inference_steps=2, guidance_scale=3, generator=noise)
    write_mp4(to_uint8(expected.frames[0]), tmp_path / "expected.mp4", fps=16, quality=9)
    assert (tmp_path / "out" / "video_0.mp4").read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_convert_and_init_random_from_the_command_line(tmp_path, checkpoint, capsys):
    assert main(["init-random", "--output", str(tmp_path / "model"), "--seed", "0"]) == 0
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert sha256(tmp_path / "model" / weights) == sha256(checkpoint / weights)
    assert main(["init-random", "--output", str(tmp_path / "model")]) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err

    source, target = str(tmp_path / "model" / "transformer"), tmp_path / "official"
    dense = ["skiparse_model_type=full"]
    assert main(["convert", source, str(target), "--to", "official", "--dtype", "bfloat16", *dense]) == 0
    config = json.loads((target / "config.json").read_text())
    assert config["skiparse_model_type"] == "full"
    assert main(["convert", source, str(tmp_path / "x"), "--to", "official", "sparse_ratoi=2"]) == 2
    assert "did you mean 'sparse_ratio'?" in capsys.readouterr().err
    assert main(["convert", source, str(tmp_path / "x"), "--to", "official", "--max-shard-size", "5 apples"]) == 2
    assert not (tmp_path / "x").exists()
