"""The real torch_npu, on the host NPU: its schemas, meta kernels and autograd formulas are what the Ascend backend was
written for. One process for each NPU that is played runs its checks; each is a test here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch_npu_checks
import torch_npu_meta_checks

from ospnext.conformance.host_npu import environment, schemas
from ospnext.errors import ConfigError

SCRIPT = Path(torch_npu_checks.__file__)


def run_checks(soc: str, folder: Path) -> dict[str, Any]:
    try:
        variables = environment({**os.environ, "HOST_NPU_SOC": soc})
    except ConfigError as error:
        pytest.skip(f"torch_npu cannot be had here: {error}")
    out = folder / "results.json"
    done = subprocess.run([sys.executable, str(SCRIPT), str(out)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert found["about"]["device"] == soc
    return found["checks"]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_checks(torch_npu_checks.SOC, tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("name", torch_npu_checks.CHECKS[torch_npu_checks.SOC])
def test_contract(name: str, results: dict[str, Any]) -> None:
    assert results[name]["error"] == ""


@pytest.fixture(scope="session")
def old_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_checks(torch_npu_checks.OLD_SOC, tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("name", torch_npu_checks.CHECKS[torch_npu_checks.OLD_SOC])
def test_contract_before_950(name: str, old_results: dict[str, Any]) -> None:
    assert old_results[name]["error"] == ""


def test_every_operator_that_the_backend_calls_is_pinned() -> None:
    called = set(torch_npu_meta_checks.called_by_backend())
    assert {operator for _, operator in called} <= schemas.pinned().keys()
    assert called


PINNED = schemas.pinned()


def test_comparison_tells_what_changed() -> None:
    found = dict(PINNED)
    del found["npu_gelu"]
    found["npu_rms_norm"] = PINNED["npu_rms_norm"].replace("float epsilon=1e-06", "float eps=1e-06, int axis=-1")
    found["npu_rotary_mul"] = PINNED["npu_rotary_mul"].replace("'half'", '"half"')
    different = {c.name: list(c.difference()) for c in schemas.compare(found) if not c.same}
    assert different == {
        "npu_gelu": ["  - the operator"],
        "npu_rms_norm": [
            "  -  float epsilon=9.9999999999999995e-07",
            "  +  float eps=9.9999999999999995e-07",
            "  +  int axis=-1",
        ],
    }


def test_command_exits_by_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, code in ((False, 0), (True, 1)):
        wheel = tmp_path / f"torch_npu-{code}.whl"
        lines = [line.replace("int axis=1", "int axis=-1") if change else line for line in PINNED.values()]
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(schemas.LIBRARY, b"\0" + b"\0\0".join(line.encode() for line in lines) + b"\0")
        assert schemas.main(["--wheel", str(wheel)]) == code
        assert ("npu_quantize: different" in capsys.readouterr().out) == change
