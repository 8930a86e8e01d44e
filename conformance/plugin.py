"""The pytest plugin of the suite: its options, one name per test module, and what it refuses: to mix two copies of
ospnext, and to be spread over processes.

`pytest conformance --backend NAME` is `ospnext conformance run --backend NAME`: same checks, same report. The plugin is
loaded in every pytest run wherever ospnext is installed, so it imports pytest and the standard library only."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
SUITE = "ospnext.conformance"

#: Why the suite cannot run as it was asked to; set while its tests are collected.
REFUSAL = pytest.StashKey[str]()


class SuiteModule(pytest.Module):
    """A test module of the suite, imported as `ospnext.conformance.<file>` whatever path or import mode pytest has.

    pytest would name the module after its folder. Then its classes would exist twice, and a spawned child could not
    import what it is to unpickle."""

    def _getobj(self) -> ModuleType:
        try:
            return importlib.import_module(_dotted_name(self.path))
        except pytest.skip.Exception as skipped:
            if skipped.allow_module_level:
                raise
            raise self.CollectError("pytest.skip at module level needs allow_module_level=True") from skipped


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if HERE not in module_path.resolve().parents:
        return None
    return SuiteModule.from_parent(parent, path=module_path)


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the suite's folders as plain ones: `pytest.Package` would import them under the folder's name."""
    folder = path.resolve()
    if folder != HERE and HERE not in folder.parents:
        return None
    return pytest.Dir.from_parent(parent, path=path)


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """Stop with one line. Raised any earlier, it would be a traceback among the errors of collection."""
    if REFUSAL in config.stash:
        raise pytest.UsageError(config.stash[REFUSAL])


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Options exist only in a run of the suite: other projects may have a `--backend` of their own."""
    config = pluginmanager.get_plugin("pytestconfig")
    if config is None or not _asks_for_suite(config):
        return
    group = parser.getgroup("ospnext conformance")
    group.addoption("--backend", help="the backend to judge (default: OSPNEXT_BACKEND)")
    group.addoption("--level", default="required,optional,extension", help="comma-separated levels (default: all)")
    group.addoption("--case", action="append", default=[], metavar="GLOB", help="only checks whose id matches")
    group.addoption("--device", help="device to run on (default: the backend's first)")
    group.addoption("--shard", default="1/1", metavar="I/N", help="run part I of N")
    group.addoption("--waivers", type=Path, metavar="FILE", help="known failures")
    group.addoption("--out", type=Path, metavar="DIR", help="folder for report.json and report.md")


def pytest_configure(config: pytest.Config) -> None:
    core = _core_folder()
    if core is None or HERE not in (core / HERE.name, core.parent / HERE.name):
        raise pytest.UsageError(_mixed(f"ospnext is {core or 'not importable'}", f"{SUITE} is {HERE}"))
    for folder in (config.invocation_params.dir, config.rootpath):
        shadow = folder.resolve() / "ospnext"
        if (shadow / "__init__.py").is_file() and shadow != core:
            raise pytest.UsageError(_mixed(f"the installed ospnext is {core}", f"pytest runs on a checkout, {shadow}"))
    if config.pluginmanager.hasplugin("xdist") and config.getoption("dist") != "no" and _asks_for_suite(config):
        raise pytest.UsageError(
            f"{SUITE} is not run by pytest-xdist: each of its processes would write a report of its own part over the "
            "others'. Give -n 0; to split a run, start several with --shard I/N and one --out, and "
            "`ospnext conformance verify` the folder."
        )


def _asks_for_suite(config: pytest.Config) -> bool:
    """Whether the suite, or a part of it, is named on the command line, or is where pytest was started."""
    start = config.invocation_params.dir
    for word in map(str, config.invocation_params.args):
        named = word.partition("::")[0]
        path = (start / named).resolve()
        if named == SUITE or named.startswith(f"{SUITE}.") or path == HERE or HERE in path.parents:
            return True
    return start.resolve() == HERE


def _dotted_name(path: Path) -> str:
    return ".".join((SUITE, *path.resolve().relative_to(HERE).with_suffix("").parts))


def _core_folder() -> Path | None:
    """Where the core's modules are. Asked of a submodule: next to a clone called `ospnext` the package is a namespace
    without a file."""
    spec = importlib.util.find_spec("ospnext.errors")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def _mixed(*found: str) -> str:
    return (
        f"two copies of ospnext are mixed: {'; '.join(found)}. Test a checkout after `pip install -e .` in its root; "
        f"test an installed wheel from any other directory, with `python -m pytest --pyargs {SUITE}`."
    )
