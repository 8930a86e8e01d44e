"""The probe of the Ascend backend on machines that lack something, and what users are told there. A lack is made up:
outside facts are replaced, or a child process finds a package or a device that is not in order."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from host_npu_child import host_npu_variables

from ospnext.backends.ascend import device
from ospnext.cli.doctor import as_text
from ospnext.conformance.host_npu import SENTENCE
from ospnext.conformance.host_npu.wheel import RELEASES

RELEASE = torch.__version__.split("+")[0]
NO_RUNTIME = "libascendcl.so: cannot open shared object file: No such file or directory"
NO_DRIVER = "libascend_hal.so: cannot open shared object file: No such file or directory"


@dataclass(frozen=True)
class Machine:
    """What the probe can see from outside. All is in order unless said otherwise."""

    torch_npu: str | None = RELEASE
    accelerator: str | None = None
    runtime_error: str = ""
    nodes: tuple[str, ...] = ("/dev/davinci_manager", "/dev/davinci0")

    def reasons(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        """code -> text of every reason why the backend cannot run here."""
        kind = self.accelerator and torch.device(self.accelerator)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: kind)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: self.torch_npu and name)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: self.torch_npu)
        monkeypatch.setattr(ctypes, "CDLL", self._load)
        monkeypatch.setattr(device.Path, "exists", lambda path: str(path) in self.nodes)
        monkeypatch.setattr(device.glob, "glob", lambda _: [node for node in self.nodes if node[-1].isdigit()])
        monkeypatch.setattr(device.importlib, "import_module", self._import)
        probe = device.probe()
        assert probe.device is None
        return {reason.code: str(reason) for reason in probe.reasons}

    def _load(self, name: str) -> object:
        if self.runtime_error:
            raise OSError(self.runtime_error)
        return object()

    def _import(self, name: str) -> object:
        raise ImportError("libhccl.so: cannot open shared object file\nmore")


@pytest.mark.parametrize(
    ("machine", "code", "words"),
    [
        (Machine(torch_npu=None), "package", f"torch_npu not installed, want pip install torch_npu=={RELEASE}"),
        (Machine(torch_npu="2.9.0.post1"), "version", f"torch_npu 2.9.0.post1 with torch {RELEASE}, want pip install"),
        (Machine(accelerator="cuda"), "pytorch_build", "built for cuda, want a CPU build"),
        (Machine(runtime_error=NO_RUNTIME), "cann", "libascendcl.so: cannot open shared object"),
        (Machine(runtime_error=NO_DRIVER), "driver", "libascend_hal.so: cannot open shared object"),
        (Machine(nodes=()), "driver", "no /dev/davinci_manager, want the Ascend driver"),
        (Machine(nodes=("/dev/davinci_manager",)), "device", "there is no /dev/davinci0"),
        (Machine(), "import", "import torch_npu failed: libhccl.so: cannot open shared object file, want"),
    ],
    ids=["package", "version", "build", "cann", "driver-library", "driver", "device", "import"],
)
def test_each_lack_is_told_apart(machine, code, words, monkeypatch):
    reasons = machine.reasons(monkeypatch)
    assert list(reasons) == [code]
    assert words in reasons[code]


def test_all_that_can_be_known_is_told_at_once(monkeypatch):
    everything = Machine(torch_npu=None, accelerator="cuda", runtime_error=NO_RUNTIME, nodes=())
    assert list(everything.reasons(monkeypatch)) == ["package", "pytorch_build", "cann", "driver"]


@pytest.mark.parametrize("version", [RELEASE, f"{RELEASE}.post3", f"{RELEASE}rc1"])
def test_a_torch_npu_of_this_release_is_in_order(version, monkeypatch):
    assert "version" not in Machine(torch_npu=version, nodes=()).reasons(monkeypatch)


def test_a_chip_that_torch_npu_does_not_know_is_no_driver_problem():
    assert device._not_started(RuntimeError("Unsupported soc version: X\n[ERROR]"))[:2] == (
        "soc",
        "Unsupported soc version: X",
    )
    assert device._not_started(RuntimeError("aclInit failed"))[0] == "driver"


@pytest.mark.parametrize(
    ("shown", "numbers"),
    [(None, (0, 1)), ("3,5", (3, 5)), ("3", (3,)), ("3, 5", (3,)), ("3,,5", (3,)), ("3,5,99", (3, 5)), ("", (0, 1))],
)
def test_the_host_has_its_own_numbers_of_what_a_process_is_shown(monkeypatch, shown, numbers):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", shown)
    assert device._numbers(2) == numbers


# ---- children


def run(code: str, variables: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)


def doctor(variables: dict[str, str]) -> tuple[dict, str, subprocess.CompletedProcess]:
    """(what is said of the Ascend backend, the text for people, the process)."""
    variables = {name: value for name, value in variables.items() if not name.startswith("OSPNEXT_")}
    code = "import sys; from ospnext.cli import main; sys.exit(main(['doctor', '--json']))"
    done = run(code, variables)
    report = json.loads(done.stdout)
    return next(b for b in report["backends"] if b["name"] == "ascend"), as_text(report), done


def test_a_device_of_the_host_npu_says_what_it_is():
    found, text, _ = doctor(host_npu_variables(HOST_NPU_SOC="Ascend910_9392", HOST_NPU_COUNT="3"))
    told = found["device"]
    assert (told["type"], told["count"], told["capability"]) == ("npu", 3, "910C")
    assert told["name"] == f"Ascend910_9392 ({SENTENCE})"
    assert told["memory"] > 2**28
    played = RELEASES[RELEASE].version
    assert told["versions"] == {"torch": torch.__version__, "torch_npu": played, "cann": "unknown"}
    assert f"ascend: ready   (Huawei Ascend NPUs)\n    device     {told['name']}" in text


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"HOST_NPU_SOC": "Ascend310P3"}, "lacking    soc: Ascend310P3; want a chip of generation 910B, 910C, 950"),
        (
            {"HOST_NPU_COUNT": "0", "ASCEND_RT_VISIBLE_DEVICES": ""},
            "lacking    device: no NPU visible, with ASCEND_RT_VISIBLE_DEVICES=''; want at least one; see npu-smi info",
        ),
    ],
    ids=["soc", "count"],
)
def test_doctor_shows_what_a_started_device_lacks(variables, told):
    found, text, _ = doctor(host_npu_variables(**variables))
    assert not found["available"]
    assert told in text


@pytest.fixture
def unloadable(tmp_path: Path) -> dict[str, str]:
    """A torch_npu that PyTorch is told to load and that cannot be, as where CANN's set_env.sh was not sourced."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    metadata = tmp_path / f"torch_npu-{RELEASE}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {RELEASE}\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def test_doctor_lives_where_import_torch_dies(unloadable):
    found, text, done = doctor(unloadable)
    assert done.returncode == 1
    assert (
        "import torch fails here, and with it every other command: Failed to load the backend extension: torch_npu: "
        "libhccl.so: cannot open shared object file\n    until that is mended, TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    ) in text
    assert found["reasons"] and not found["available"]
    assert "reference: ready" in text


def test_other_commands_die_in_one_line_there(unloadable):
    done = run("import sys; from ospnext.cli import main; sys.exit(main(['explain', 'attention']))", unloadable)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "error: import torch: Failed to load the backend extension: torch_npu." in done.stderr
    assert "Cause: libhccl.so: cannot open shared object file. `ospnext doctor` says what is lacking" in done.stderr
