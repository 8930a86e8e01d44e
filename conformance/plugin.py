"""The pytest plugin of the suite: one name per test module, and a refusal to mix two copies of ospnext.

It is loaded in every pytest run wherever ospnext is installed, so it imports pytest and the standard library only."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
SUITE = "ospnext.conformance"


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


def pytest_configure(config: pytest.Config) -> None:
    core = _core_folder()
    if core is None or HERE not in (core / HERE.name, core.parent / HERE.name):
        raise pytest.UsageError(_mixed(f"ospnext is {core or 'not importable'}", f"{SUITE} is {HERE}"))
    for folder in (config.invocation_params.dir, config.rootpath):
        shadow = folder.resolve() / "ospnext"
        if (shadow / "__init__.py").is_file() and shadow != core:
            raise pytest.UsageError(_mixed(f"the installed ospnext is {core}", f"pytest runs on a checkout, {shadow}"))


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
