"""The device of the host NPU: memory, views, random numbers, gradients and whole programs, in one child process."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from host_npu_child import on_host_npu

FOLDER = Path(__file__).parent / "host_npu_checks"
CHECKS = [
    f"{file.stem}.{node.name}"
    for file in sorted(FOLDER.glob("[a-z]*.py"))
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    done = on_host_npu(str(FOLDER))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_on_the_host_npu(check: str, results: dict[str, str]) -> None:
    assert not results[check], results[check]
