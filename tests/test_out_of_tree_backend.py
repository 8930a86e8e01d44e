"""A complete vendor's package (tests/acme), installed next to the built wheel, is judged with one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_packaging import (  # noqa: F401  (fixtures)
    Environment,
    libraries,
    new_environment,
    pip,
    source,
    wheel,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ACME = Path(__file__).parent / "acme"


@pytest.fixture(scope="module")
def vendor(wheel: Path, libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:  # noqa: F811
    """The wheel and ospnext-acme in an environment that has never seen the checkout."""
    environment = new_environment(tmp_path_factory.mktemp("vendor_env"), libraries)
    package = tmp_path_factory.mktemp("vendor") / "acme"
    shutil.copytree(ACME, package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    environment.install(str(wheel), str(package))
    return environment


def test_it_conforms_with_one_command(vendor: Environment, tmp_path: Path) -> None:
    """Every third check, but those at the length of a video: all of them take four minutes."""
    command = vendor.root / "bin" / "ospnext"
    listed = vendor.python("-P", str(command), "conformance", "list", "--backend", "acme", cwd=tmp_path)
    extension = "attention/extension/acme-q33-k65-d8-bf16"
    ids = [line for line in listed.stdout.splitlines() if "k75600" not in line]
    ids = [extension, *(line for line in ids[::3] if line != extension)]
    patterns = [word for identifier in ids for word in ("--case", identifier)]
    run = ("conformance", "run", "--backend", "acme", "--out", "report", *patterns)
    done = vendor.python("-P", str(command), *run, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["summary"]) == {"pass"}
    assert {case["id"] for case in report["cases"]} == set(ids)
    used = {case["implementation"] for case in report["cases"] if case["implementation"]}
    assert used == {"acme.sdpa", "acme.rows", "acme.exchange", "acme.bits", "acme.rms_norm", "composite"}
    assert report["source"] == {"commit": None, "dirty": None}


def test_its_own_folder_called_backends_stands_next_to_ours(vendor: Environment, tmp_path: Path) -> None:
    code = "import backends, ospnext.backends; print(backends.__file__); print(ospnext.backends.__file__)"
    theirs, ours = vendor.answer(code, cwd=tmp_path).splitlines()
    assert theirs == str(vendor.packages / "backends" / "__init__.py")
    assert ours == str(vendor.packages / "ospnext" / "backends" / "__init__.py")


def test_pytest_is_the_same_thing(vendor: Environment, tmp_path: Path) -> None:
    suite = ("-m", "pytest", "-q", "--pyargs", "ospnext.conformance", "--backend", "acme")
    done = vendor.python(*suite, "--case", "attention/required/b1-q1-k3-*", "--out", "report", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "report" / "report.json").read_text())["backend"]["name"] == "acme"
