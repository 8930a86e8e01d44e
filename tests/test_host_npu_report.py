"""`ospnext conformance run --host-npu`: the run happens on the emulated device, and every account of it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from host_npu_child import host_npu_variables

from ospnext.conformance import verify
from ospnext.conformance.host_npu import SENTENCE

CASE = "hif8_decode/required/bf16-all"
MAIN = "import sys; from ospnext.cli import main; sys.exit(main())"


def ospnext(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", MAIN, *arguments], capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    host_npu_variables()
    out = tmp_path_factory.mktemp("report")
    asked = ["--backend", "ascend", "--host-npu", "--case", CASE, "--out", str(out)]
    return ospnext("conformance", "run", *asked), out


def test_every_account_of_the_run_names_the_emulation(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = run
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "report.json").read_text())
    device = f"Ascend950PR_9599 ({SENTENCE})"
    assert (report["backend"]["device_name"], report["backend"]["device"]) == (device, "npu")
    assert {case["status"] for case in report["cases"]} == {"pass"}
    assert f"| device | {device} (`npu`) |" in (out / "report.md").read_text()
    assert f"ascend on {device}: " in done.stdout
    assert verify.read(out / "report.json")[0]["backend"]["device_name"] == device


def test_the_child_is_given_what_was_asked_and_its_exit_code_returned() -> None:
    host_npu_variables()
    done = ospnext("conformance", "run", "--host-npu", "--backend", "ascend", "--case", "no/such/*")
    assert done.returncode == 2
    assert "no check matches 'no/such/*'" in done.stderr
