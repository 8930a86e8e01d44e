"""A pipeline that makes noise, for what `ospnext generate` does around one, and three prompts for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ospnext import ops
from ospnext.cli import main
from ospnext.diffusion import FlowMatchSchedule
from ospnext.generation import videos

SMALL = ["video.height=32", "video.width=48", "video.num_frames=5", "sampling.num_inference_steps=2"]
PROMPTS = '{"prompt": "a", "negative_prompt": ""}\n{"prompt": "b", "id": "second"}\n{"prompt": "c", "seed": 40}\n'
NAMES = ["video_0.mp4", "second.mp4", "video_2.mp4"]


class FakePipeline:
    """Makes noise from the generator it is given and remembers how it was called; `on_call(n)` may interrupt call n."""

    def __init__(self, on_call=lambda n: None):
        self.schedule, self.solver = FlowMatchSchedule(), "unipc"
        self.calls, self.on_call = [], on_call
        self.decided = {"batched": False, "tiled": False}

    def set_progress_bar_config(self, **options):
        self.bar = options

    def __call__(self, **arguments):
        self.calls.append(arguments | {"backend": ops.current_policy().backend})
        self.on_call(len(self.calls))
        shape = (1, arguments["num_frames"], arguments["height"], arguments["width"], 3)
        return SimpleNamespace(frames=torch.rand(shape, generator=arguments["generator"]).numpy())


@pytest.fixture
def fake(monkeypatch):
    pipeline = FakePipeline()
    monkeypatch.setattr(videos, "check_checkpoint", lambda run: None)
    monkeypatch.setattr(videos, "load_pipeline", lambda run, device, mesh: pipeline)
    return pipeline


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.jsonl").write_text(PROMPTS)
    return ["--prompts", str(tmp_path / "p.jsonl"), "--model", str(tmp_path), "--output", str(tmp_path / "out"), *SMALL]


def generate(*arguments) -> int:
    return main(["generate", *map(str, arguments)])


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
