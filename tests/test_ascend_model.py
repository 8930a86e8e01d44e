"""Whole models on the Ascend backend, in one process on the host NPU: training, HiF8, and videos from the same seed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from host_npu_child import host_npu_variables, on_host_npu

from ospnext.pipelines import write_random_checkpoint

SCRIPT = Path(__file__).with_name("ascend_model_checks.py")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of every check of the script."""
    host_npu_variables()
    folder = tmp_path_factory.mktemp("model")
    write_random_checkpoint(folder / "tiny", preset="tiny", seed=0)
    done = on_host_npu(str(SCRIPT), str(folder / "tiny"), str(folder / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))
def test_on_the_host_npu(check: str, outcomes: dict[str, str]) -> None:
    assert outcomes[f"check_{check}"] == ""
