"""The wheel, the editable install and the pytest plugin, each seen as a user sees it: installed into an environment of
its own and run from somewhere else. Nothing here touches the environment that runs the tests.

An environment is a venv whose only other packages are links to those of the running one, ospnext left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterable
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"ospnext": "ospnext", "backends": "ospnext/backends", "conformance": "ospnext/conformance"}
BUILD_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet")

#: A test module for conformance/: it fails unless it exists once, and a spawned child can import what it is sent.
PROBE = """
import multiprocessing, sys

NAME = "ospnext.conformance.test_probe"

class Payload:
    pass

def child(payload, answers):
    answers.put((type(payload).__module__, __name__))

def test_has_one_name():
    assert [n for n, m in sys.modules.items() if getattr(m, "__file__", None) == __file__] == [NAME]
    assert not {"conformance", "backends"} & {name.split(".")[0] for name in sys.modules}

def test_spawned_child_imports_it():
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=child, args=(Payload(), answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert answers.get(timeout=10) == (NAME, NAME)
"""
INNER = "def test_inner():\n    assert __name__ == 'ospnext.conformance.nested.test_inner'\n"
PROBES = {"test_probe.py": PROBE, "nested/__init__.py": "", "nested/test_inner.py": INNER}


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=400, **options)


@dataclass(frozen=True)
class Environment:
    """A venv: `python(...)` runs in it, in folder `cwd`, without the variables of this process that would leak in."""

    root: Path

    @property
    def executable(self) -> str:
        return str(self.root / "bin" / "python")

    @property
    def packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.root)}))

    def python(self, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("OSPNEXT_", "PYTEST_", "PYTHON"))}
        return run([self.executable, *arguments], cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1", **variables})

    def answer(self, code: str, *, cwd: Path, **variables: str) -> str:
        done = self.python("-c", textwrap.dedent(code), cwd=cwd, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def install(self, *what: str) -> None:
        pip(self.executable, "install", *what)


def pip(python: str, command: str, *arguments: str) -> None:
    """Run this environment's pip on the environment of `python`, offline."""
    done = run([sys.executable, "-m", "pip", "--python", python, command, *OFFLINE, *arguments])
    assert done.returncode == 0, done.stdout + done.stderr


def new_environment(root: Path, libraries: Path) -> Environment:
    environment = Environment(root)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=100)
    (environment.packages / "libraries.pth").write_text(f"{libraries}\n")
    return environment


def copy_checkout(to: Path) -> Path:
    """What a fresh clone holds of the build."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for file in filter(Path.exists, (ROOT / name for name in BUILD_FILES)):
        shutil.copy(file, to)
    return to


def plant(conformance: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (conformance / name).parent.mkdir(exist_ok=True)
        (conformance / name).write_text(text)


def plant_probes(conformance: Path) -> None:
    """The probes stand in for the suite's own tests, which have their own runs."""
    for real in conformance.rglob("test_*.py"):
        real.unlink()
    plant(conformance, PROBES)


def outcome(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of a `pytest -q` run, without the time it took."""
    return done.stdout.strip().rpartition("\n")[2].partition(" in ")[0]


def assert_passes(count: int, done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, outcome(done)) == (0, f"{count} passed"), done.stdout + done.stderr


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libraries")
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(path).iterdir():
            if entry.suffix != ".pth" and "ospnext" not in entry.name and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("source") / "clone")


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel in an environment."""
    environment = new_environment(tmp_path_factory.mktemp("wheel_env"), libraries)
    environment.install(str(wheel))
    plant_probes(environment.packages / "ospnext" / "conformance")
    return environment


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout called `ospnext`, as `git clone` makes it."""
    checkout = copy_checkout(tmp_path_factory.mktemp("parent") / "ospnext")
    plant_probes(checkout / "conformance")
    return checkout


@pytest.fixture(scope="session")
def editable(clone: Path, libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = new_environment(tmp_path_factory.mktemp("editable_env"), libraries)
    environment.install("--editable", str(clone))
    return environment


# ---- the wheel ------------------------------------------------------------------------------------------------------


def files_below(folder: Path) -> Iterable[str]:
    return (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts)


def test_wheel_holds_the_three_folders_and_nothing_else(wheel: Path, source: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    assert code == {f"{place}/{file}" for folder, place in FOLDERS.items() for file in files_below(source / folder)}
    assert "ospnext/py.typed" in code
    assert {name.split("/")[0] for name in names - code} == {f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_wheel_carries_the_licence_and_the_entry_points(wheel: Path, source: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith("METADATA")).removesuffix("METADATA")
    assert archive.read(f"{info}licenses/LICENSE") == (source / "LICENSE").read_bytes()
    entry_points = ConfigParser()
    entry_points.read_string(archive.read(f"{info}entry_points.txt").decode())
    assert {section: dict(entry_points[section]) for section in entry_points.sections()} == {
        "console_scripts": {"ospnext": "ospnext.cli:main"},
        "ospnext.backends": {name: f"ospnext.backends.{name}:MANIFEST" for name in ("reference", "cuda", "ascend")},
        "pytest11": {"ospnext-conformance": "ospnext.conformance.plugin"},
    }


def test_installed_wheel_works_from_anywhere(installed: Environment, tmp_path: Path) -> None:
    code = """
        import json, ospnext.backends.reference, ospnext.conformance
        from ospnext.ops.registry import registry
        modules = ospnext, ospnext.backends.reference, ospnext.conformance
        print(json.dumps([[m.__file__ for m in modules], sorted(registry().manifests), registry().failures]))
    """
    places, backends, failures = json.loads(installed.answer(code, cwd=tmp_path))
    site = installed.packages / "ospnext"
    inside = ("__init__.py", "backends/reference/__init__.py", "conformance/__init__.py")
    assert places == [str(site / file) for file in inside]
    assert (backends, failures) == (["ascend", "cuda", "reference"], {})


# ---- one name per module --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["backends", "conformance"])
def test_mapped_folder_refuses_a_second_name(folder: str) -> None:
    done = run([sys.executable, "-c", f"import {folder}"], cwd=ROOT)
    assert done.returncode == 1
    assert f"ImportError: import this folder as 'ospnext.{folder}', not as '{folder}'" in done.stderr
    assert "pip install -e ." in done.stderr


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
@pytest.mark.parametrize("asked", ["conformance", "conformance/test_probe.py", "--pyargs ospnext.conformance"])
def test_suite_has_one_identity_in_a_checkout(asked: str, mode: str, editable: Environment, clone: Path) -> None:
    done = editable.python("-m", "pytest", "-q", f"--import-mode={mode}", *asked.split(), cwd=clone)
    assert_passes(2 if asked.endswith(".py") else 3, done)


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_suite_has_one_identity_in_a_wheel(mode: str, installed: Environment, tmp_path: Path) -> None:
    pytest_in = ("-m", "pytest", "-q", f"--import-mode={mode}")
    assert_passes(3, installed.python(*pytest_in, "--pyargs", "ospnext.conformance", cwd=tmp_path))


def test_one_bad_module_does_not_hide_the_others(editable: Environment, clone: Path) -> None:
    """Skips and errors at import belong to their own file, and failing asserts show their values."""
    files = {
        "test_broken.py": "import no_such_module",
        "test_skipped.py": "import pytest\npytest.skip('no device', allow_module_level=True)",
        "test_careless.py": "import pytest\npytest.skip('meant for one test')",
        "test_values.py": "def test_ok():\n    pass\ndef test_unequal():\n    left = 3\n    assert left == 4",
    }
    plant(clone / "conformance", {f"uneven/{name}": text for name, text in {"__init__.py": "", **files}.items()})
    arguments = ("-m", "pytest", "-q", "--continue-on-collection-errors", "conformance/uneven")
    try:
        done = editable.python(*arguments, cwd=clone)
    finally:
        shutil.rmtree(clone / "conformance" / "uneven")
    assert outcome(done) == "1 failed, 1 passed, 1 skipped, 2 errors", done.stdout + done.stderr
    assert "assert 3 == 4" in done.stdout
    assert "No module named 'no_such_module'" in done.stdout
    assert "allow_module_level=True" in done.stdout


# ---- copies that must not mix ---------------------------------------------------------------------------------------


def test_wheel_and_checkout_are_refused_together(installed: Environment, clone: Path, tmp_path: Path) -> None:
    """-P is how the `pytest` command starts: the working directory is not on sys.path, so the wheel is imported."""
    for cwd in (clone, tmp_path):
        done = installed.python("-P", "-m", "pytest", str(clone / "conformance"), cwd=cwd)
        assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
        assert str(installed.packages / "ospnext") in done.stderr
        assert str(clone / "ospnext") in done.stderr
        assert "pip install -e ." in done.stderr
        assert "--pyargs ospnext.conformance" in done.stderr


def test_checkout_that_hides_the_wheel_stops_pytest(installed: Environment, clone: Path) -> None:
    """`python -m pytest` imports the checkout's `ospnext`, which holds no suite: Python stops before the plugin can."""
    done = installed.python("-m", "pytest", "conformance", cwd=clone)
    assert done.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert "No module named 'ospnext.conformance'" in done.stderr


def test_two_checkouts_are_refused_together(editable: Environment, clone: Path, tmp_path: Path) -> None:
    other = copy_checkout(tmp_path / "other")
    done = editable.python("-m", "pytest", "conformance", cwd=other)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert f"ospnext is {other / 'ospnext'}" in done.stderr
    assert f"ospnext.conformance is {clone / 'conformance'}" in done.stderr


@pytest.mark.parametrize("autoload_off", ["", "1"])
@pytest.mark.parametrize("options", [(), ("-p", "ospnext-conformance")])
def test_plugin_is_light(options: tuple[str, ...], autoload_off: str, installed: Environment, tmp_path: Path) -> None:
    """Named by its entry point, the plugin loads once, whether or not pytest has loaded it by itself."""
    (tmp_path / "test_elsewhere.py").write_text(f"""
import sys
def test_modules():
    assert ('ospnext.conformance.plugin' in sys.modules) is {bool(options) or not autoload_off}
    assert 'torch' not in sys.modules and 'ospnext.ops' not in sys.modules
""")
    arguments = ("-m", "pytest", "-q", *options)
    assert_passes(1, installed.python(*arguments, cwd=tmp_path, PYTEST_DISABLE_PLUGIN_AUTOLOAD=autoload_off))


def test_next_to_a_clone_called_ospnext_everything_imports(editable: Environment, clone: Path) -> None:
    """There Python takes the clone itself for a namespace package `ospnext`, and `ospnext/__init__.py` never runs."""
    files = [*clone.glob("ospnext/**/*.py"), *clone.glob("backends/*/__init__.py"), *clone.glob("conformance/*.py")]
    inside = [file.relative_to(clone).with_suffix("").parts for file in files]  # vendors' kernels need their hardware
    names = [".".join((FOLDERS[top].replace("/", "."), *rest)).removesuffix(".__init__") for top, *rest in inside]
    names.remove("ospnext")
    code = f"""
        import importlib, json, sys
        from ospnext.ops.registry import registry
        places, wrong = {{}}, {{}}
        for name in {names!r}:
            try:
                places[name] = importlib.import_module(name).__file__
            except Exception as error:
                wrong[name] = repr(error)
        twice = [f for f in places.values() if sum(getattr(m, "__file__", "") == f for m in sys.modules.values()) > 1]
        print(json.dumps([places, wrong, twice, sorted(registry().manifests)]))
    """
    places, wrong, twice, backends = json.loads(editable.answer(code, cwd=clone.parent))
    assert (wrong, twice) == ({}, [])
    assert backends == ["ascend", "cuda", "reference"]
    assert [place for place in places.values() if not place.startswith(f"{clone}/")] == []
    assert_passes(3, editable.python("-m", "pytest", "-q", "--pyargs", "ospnext.conformance", cwd=clone.parent))


# ---- out-of-tree backends -------------------------------------------------------------------------------------------

ACME_PROJECT = """
[project]
name = "acme"
version = "1"
[project.entry-points."ospnext.backends"]
acme = "backends.acme:MANIFEST"
broken = "backends.broken:MANIFEST"
[tool.setuptools]
packages = ["backends", "backends.acme"]
"""
ACME = """
from ospnext.ops.registry import DeviceInfo, Implementation, Manifest, Probe

def probe(): return Probe(DeviceInfo("cpu", "acme one"))
def attend(request): raise NotImplementedError

IMPLEMENTATIONS = (Implementation("acme.attend", "attention", "backends.acme:attend"),)
MANIFEST = Manifest("acme", "a vendor's", ("cpu",), "backends.acme:probe", IMPLEMENTATIONS)
"""
DISCOVER = """
    import json, backends
    from ospnext.ops.policy import current_policy
    from ospnext.ops.registry import registry
    known = registry()
    kernel = known.kernel(known.manifests["acme"].implementations[0])
    chosen = {"policy": current_policy().backend, "kernel": kernel.__module__, "vendor": backends.__file__}
    print(json.dumps({**chosen, "backends": sorted(known.manifests), "failed": sorted(known.failures)}))
"""


@pytest.fixture(scope="session")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vendor's package with a `backends/` folder of its own, installed: one backend loads, the other does not."""
    source, target = tmp_path_factory.mktemp("acme"), tmp_path_factory.mktemp("acme_installed")
    (source / "backends" / "acme").mkdir(parents=True)
    (source / "pyproject.toml").write_text(ACME_PROJECT)
    (source / "backends" / "__init__.py").touch()
    (source / "backends" / "acme" / "__init__.py").write_text(ACME)
    (source / "backends" / "broken.py").write_text("raise ImportError('libacme.so: cannot open shared object file')")
    pip(sys.executable, "install", "--target", str(target), str(source))
    return target


def test_out_of_tree_backend_stands_next_to_ours(installed: Environment, acme: Path, tmp_path: Path) -> None:
    found = json.loads(installed.answer(DISCOVER, cwd=tmp_path, PYTHONPATH=str(acme), OSPNEXT_BACKEND="acme"))
    assert found == {
        "policy": "acme",
        "kernel": "backends.acme",
        "vendor": str(acme / "backends" / "__init__.py"),
        "backends": ["acme", "ascend", "cuda", "reference"],
        "failed": ["broken"],
    }


def test_backend_that_does_not_load_shows_why(installed: Environment, acme: Path, tmp_path: Path) -> None:
    code = "from ospnext.ops.policy import current_policy; current_policy()"
    done = installed.python("-c", code, cwd=tmp_path, PYTHONPATH=str(acme), OSPNEXT_BACKEND="broken")
    assert done.returncode == 1
    message = done.stderr.rpartition("BackendUnavailableError")[2]
    assert "OSPNEXT_BACKEND=broken" in message
    assert f'File "{acme / "backends" / "broken.py"}", line 1' in message
    assert "libacme.so: cannot open shared object file" in message
