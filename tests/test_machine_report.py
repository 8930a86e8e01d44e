"""What a machine without accelerators is told: errors for absent backends and misspelt variables, doctor, explain."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from ospnext import ops
from ospnext.cli import main
from ospnext.ops.registry import registry

needs_no_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has what the test needs to be absent"
)


def ospnext(*words: str, **environ: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OSPNEXT_")} | environ
    command = [sys.executable, "-c", "import sys; from ospnext.cli import main; sys.exit(main())", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_no_cuda
@pytest.mark.parametrize(
    ("backend", "lacking"), [("cuda", ["pytorch_build"]), ("ascend", ["package: got torch_npu", "cann:", "driver:"])]
)
def test_a_backend_that_cannot_run_is_one_error_with_every_reason(backend, lacking, tmp_path):
    model = ["--model", str(tmp_path), "--output", str(tmp_path / "out")]
    done = ospnext("generate", "a fox", *model, OSPNEXT_BACKEND=backend)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    for words in (f"OSPNEXT_BACKEND={backend} was asked for", *lacking, "It needs: ", "ospnext doctor"):
        assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_misspelt_variable_lists_the_known_ones(tmp_path):
    done = ospnext("generate", "a fox", "--model", str(tmp_path), OSPNEXT_BACKND="reference")
    assert done.returncode == 2
    assert "unknown environment variable OSPNEXT_BACKND (did you mean OSPNEXT_BACKEND?)" in done.stderr
    assert "OSPNEXT_FALLBACK:" in done.stderr


def test_doctor_reports_every_backend_with_reasons(capsys):
    with ops.use_backend("reference"):
        assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {backend["name"]: backend for backend in report["backends"]}
    assert found.keys() == registry().manifests.keys() >= {"reference", "cuda", "ascend"}
    assert [k["id"] for k in found["reference"]["kernels"]["attention"]] == ["reference.sdpa", "reference.math"]
    for backend in found.values():
        assert backend["available"] == (not backend["reasons"])
    assert report["policy"]["backend"] == "reference"


@needs_no_cuda
def test_doctor_works_where_the_policy_cannot_be_followed():
    done = ospnext("doctor", OSPNEXT_BACKEND="cuda")
    assert done.returncode == 1
    assert "policy   cannot be followed: OSPNEXT_BACKEND=cuda" in done.stdout
    assert "reference: ready" in done.stdout


BROKEN_TORCH = """
import os
if {condition}:
    raise {error}
import sys
sys.path.remove({folder!r})
del sys.modules["torch"]
import torch
"""


def doctor_with(folder, error: str, condition: str = "True", *words: str) -> subprocess.CompletedProcess:
    """In front of PyTorch lies a package that raises `error`, and else is PyTorch."""
    (folder / "torch.py").write_text(BROKEN_TORCH.format(error=error, condition=condition, folder=str(folder)))
    return ospnext("doctor", *words, PYTHONPATH=str(folder), TORCH_DEVICE_BACKEND_AUTOLOAD="1")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        ("ImportError('libfoo.so.1: cannot open')", "libfoo.so.1: cannot open; "),
        ("OSError('libfoo.so.1: cannot open\\nmore')", "libfoo.so.1: cannot open; "),
        ("RuntimeError('a bad build')", "a bad build; "),
        ("RuntimeError()", "RuntimeError; "),
    ],
)
def test_doctor_says_in_one_line_why_torch_is_not_imported(tmp_path, error, cause):
    done = doctor_with(tmp_path, error)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"import torch fails here: {cause}with TORCH_DEVICE_BACKEND_AUTOLOAD=0: ")
    assert done.stdout.count("\n") == 1 and done.stdout.endswith("(exit code 1)\n")
    said = json.loads(doctor_with(tmp_path, error, "True", "--json").stdout)
    assert said["torch_import"].startswith(cause)


@pytest.mark.parametrize(
    ("error", "cause"),
    [("OSError('libfoo.so.1: cannot open')", "libfoo.so.1: cannot open"), ("ImportError", "ImportError")],
)
def test_doctor_reports_all_the_same_where_torch_is_imported_without_extensions(tmp_path, error, cause):
    done = doctor_with(tmp_path, error, "os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] != '0'")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"import torch fails here, and with it every other command: {cause}\n" in done.stdout
    assert "reference: ready" in done.stdout


def test_explain_names_the_chosen_kernel_and_the_reasons_of_the_others(capsys):
    assert main(["explain", "attention", "--tokens", "9", "--feature", "key_mask", "--backend", "reference"]) == 0
    text = " ".join(capsys.readouterr().out.split())  # columns are as wide as the longest name
    assert "reference.math chosen" in text
    assert "reference.sdpa rejected key_mask: got True" in text


def test_explain_says_no_with_its_exit_code(capsys):
    with ops.use_backend("reference", ops={"attention": "reference.sdpa"}):
        assert main(["explain", "attention", "--feature", "key_mask", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["chosen"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["atention"], "did you mean 'attention'?"),
        (["attention", "--feature", "mask"], "attention knows packed, key_mask"),
        (["fused.rope", "--shape", "1,x"], "not a list of integers"),
    ],
)
def test_explain_refuses_what_does_not_exist(capsys, words, message):
    assert main(["explain", *words]) == 2
    assert message in capsys.readouterr().err
