"""The suite under pytest: the same checks, results and report as `ospnext conformance run`, and no effect elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ospnext.cli import main

ROOT = Path(__file__).resolve().parent.parent
PATTERN = "attention/required/b1-q1-k3-*"

pytestmark = pytest.mark.slow


def run_pytest(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OSPNEXT_", "PYTEST_"))} | variables
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def outcomes(folder: Path) -> list[tuple[str, str, str]]:
    report = json.loads((folder / "report.json").read_text())
    assert report["problems"] == []
    return [(case["id"], case["implementation"], case["status"]) for case in report["cases"]]


@pytest.fixture(scope="module")
def by_command(tmp_path_factory) -> list[tuple[str, str, str]]:
    out = tmp_path_factory.mktemp("command")
    assert main(["conformance", "run", "--backend", "reference", "--case", PATTERN, "--quiet", "--out", str(out)]) == 0
    return outcomes(out)


@pytest.mark.parametrize(
    ("suite", "named_by"), [("conformance", "option"), ("--pyargs ospnext.conformance", "variable")]
)
def test_pytest_runs_what_the_command_runs(suite, named_by, by_command, tmp_path):
    option, variables = ["--backend", "reference"], {}
    if named_by == "variable":
        option, variables = [], {"OSPNEXT_BACKEND": "reference"}
    words = [*suite.split(), *option, "--case", PATTERN, "--out", str(tmp_path / "out"), "-v"]
    done = run_pytest(*words, cwd=ROOT if suite == "conformance" else tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(tmp_path / "out") == by_command
    tests = [f"test_check[{i} [{implementation}]] PASSED" for i, implementation, _ in by_command]
    lines = [line.partition("::")[2].rpartition(" [")[0].rstrip() for line in done.stdout.splitlines() if "::" in line]
    assert lines == [*tests, "test_waivers_are_in_force PASSED"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md"]


def test_without_a_backend_it_is_a_usage_error_that_names_them(tmp_path):
    done = run_pytest("--pyargs", "ospnext.conformance", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "Give --backend NAME or set OSPNEXT_BACKEND; known: ascend, cuda, reference" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_mistake_is_a_usage_error_too(tmp_path):
    words = ("--pyargs", "ospnext.conformance", "--backend", "reference", "--case", "atention/*")
    done = run_pytest(*words, cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "no check matches 'atention/*'" in done.stdout + done.stderr


def test_several_processes_are_refused_and_none_are_not(tmp_path):
    """Each would write the report of its part alone."""
    pytest.importorskip("xdist")
    words = ("--pyargs", "ospnext.conformance", "--backend", "reference", "--case", PATTERN, "--out", "out")
    done = run_pytest(*words, "-n", "2", cwd=tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "is not run by pytest-xdist" in done.stderr and "--shard I/N" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert run_pytest(*words, "-n", "0", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "report.json").exists()


def test_a_backend_option_of_another_project_is_its_own(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n"
        "    for name in ('--backend', '--level', '--case', '--device', '--shard', '--waivers', '--out'):\n"
        "        parser.addoption(name, default='theirs')\n"
    )
    (tmp_path / "test_theirs.py").write_text(
        "def test_options(request):\n"
        "    names = ('backend', 'level', 'case', 'device', 'shard', 'waivers', 'out')\n"
        "    found = [request.config.getoption(f'--{name}') for name in names]\n"
        "    assert found == ['mine', *['theirs'] * 6]\n"
    )
    done = run_pytest("-q", "--backend", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
