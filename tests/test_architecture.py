"""The shape of the house, read from the syntax trees: who may import whom, and what the core may not say.

No project code runs here. Each check is a function of a source tree, so that `test_a_check_catches` can hand it a tree
with one forbidden line."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Folder of the checkout -> the package it is imported as.
FOLDERS = {"ospnext": "ospnext", "backends": "ospnext.backends", "conformance": "ospnext.conformance"}

#: Part of the core -> the parts it may import. Single files in ospnext/ are open to all and import only each other.
MAY_IMPORT: dict[str, set[str]] = {
    "numerics": set(),
    "ops": {"numerics"},
    "sparse": {"ops"},
    "diffusion": {"ops"},
    "parallel": {"ops", "sparse"},
    "models": {"ops", "numerics", "sparse", "parallel"},
    "planning": {"ops", "sparse", "parallel", "models"},
    "pipelines": {"ops", "sparse", "diffusion", "parallel", "models"},
    "generation": {"ops", "sparse", "diffusion", "parallel", "models", "pipelines"},
    "bench": {"ops", "sparse", "parallel", "models", "pipelines"},
    "training": {"ops", "numerics", "sparse", "diffusion", "parallel", "models"},
    "rl": {"ops", "sparse", "diffusion", "parallel", "models", "pipelines", "training"},
    "shapes": {"ops", "sparse", "diffusion", "parallel", "models", "pipelines", "training"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
BACKENDS_MAY_IMPORT = {"ospnext.ops", "ospnext.numerics", "ospnext.errors"}
CONFORMANCE_MAY_IMPORT = {
    "ospnext.ops",
    "ospnext.numerics",
    "ospnext.models",
    "ospnext.diffusion",
    "ospnext.sparse",
    "ospnext.errors",
    "ospnext.atomic",
    "ospnext.version",
}

THIRD_PARTY = {"torch", "numpy", "yaml", "safetensors"}
VENDOR_PACKAGES = {"torch_npu", "triton", "flash_attn", "flash_attn_interface"}
VENDOR_STRING = re.compile(r"(torch\.)?(cuda|npu)(:\d*)?|(torch_npu|triton|flash_attn\w*)(\..*)?")
VENDOR_ATTRIBUTES = {"cuda", "npu", "is_cuda", "is_npu"}
DOTTED_PATH = re.compile(r"ospnext\.(backends|conformance)\.[\w.]+(:\w+)?")

VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper"}
MAX_LINES = 400


@dataclass(frozen=True)
class Source:
    """One module: its path in the checkout, the name it is imported under, and its syntax tree."""

    path: str
    name: str
    tree: ast.Module
    lines: int

    @property
    def package(self) -> str:
        """The package that relative imports start from."""
        return self.name if self.path.endswith("__init__.py") else self.name.rpartition(".")[0]

    @property
    def part(self) -> str:
        """Which part of the core this is: "models", "ops", ..., or "" for the single files in ospnext/."""
        inside = self.path.split("/")[1:]
        return inside[0] if len(inside) > 1 else ""

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


Check = Callable[[list[Source]], Iterator[str]]


def read(root: Path) -> list[Source]:
    sources = []
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            inside = path.relative_to(root / folder).with_suffix("").parts
            name = ".".join((package, *inside)).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text, str(path))
            sources.append(Source(path.relative_to(root).as_posix(), name, tree, len(text.splitlines())))
    return sources


def of(sources: list[Source], *folders: str) -> list[Source]:
    return [source for source in sources if source.path.split("/")[0] in folders]


def imports(source: Source, names: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Every import at any depth as an absolute dotted name; `from a import b` is `a.b` where that is a module."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = source.package.split(".")
                base = ".".join([*ancestors[: len(ancestors) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node, full if full in names else base


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def is_project(name: str) -> bool:
    return within(name, {"ospnext"})


# ---- the checks -----------------------------------------------------------------------------------------------------


def core_arrows(sources: list[Source]) -> Iterator[str]:
    names = {source.name for source in sources}
    for source in of(sources, "ospnext"):
        if source.part and source.part not in MAY_IMPORT:
            yield f"{source.path}: ospnext/{source.part}/ is new: say in MAY_IMPORT what it may import"
            continue
        # The facade names everything and loads it on first use; `python -m ospnext` is the command line.
        if source.name in ("ospnext", "ospnext.__main__"):
            continue
        allowed = MAY_IMPORT.get(source.part, set())
        for node, name in imports(source, names):
            part = name.split(".")[1] if name.count(".") else ""
            if is_project(name) and part in MAY_IMPORT and part != source.part and part not in allowed:
                yield source.at(node, f"{source.part or 'a single file'} may not import {name}")


def core_does_not_import_its_facade(sources: list[Source]) -> Iterator[str]:
    """Next to a clone called `ospnext`, an editable install shows `ospnext` as a namespace: `ospnext/__init__.py` does
    not run there while submodules import. So nothing may need a name from it."""
    names = {source.name for source in sources}
    for source in sources:
        for node, name in imports(source, names):
            if name == "ospnext" and source.name != "ospnext":
                yield source.at(node, "takes a name from ospnext/__init__.py; import the module that defines it")


def core_knows_no_backend(sources: list[Source]) -> Iterator[str]:
    """Nor the suite that judges backends; only the command line, the top of the house, may start it."""
    names = {source.name for source in sources}
    for source in of(sources, "ospnext"):
        for node, name in imports(source, names):
            if source.part == "cli" and within(name, {"ospnext.conformance"}):
                continue
            if within(name, {"ospnext.backends", "ospnext.conformance", "backends", "conformance"}):
                yield source.at(node, f"imports {name}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and DOTTED_PATH.fullmatch(node.value):
                yield source.at(node, f"names the module {node.value!r}")


def core_imports_little(sources: list[Source]) -> Iterator[str]:
    """At import time; extras are imported inside the function that needs them."""
    allowed = THIRD_PARTY | set(sys.stdlib_module_names) | {"ospnext"}
    for source in of(sources, "ospnext"):
        for node in import_time_statements(source.tree):
            absolute = isinstance(node, ast.ImportFrom) and node.level == 0 and node.module
            for name in [a.name for a in node.names] if isinstance(node, ast.Import) else [absolute or "ospnext"]:
                if name.split(".")[0] not in allowed:
                    yield source.at(node, f"imports {name} at import time; the core may import {sorted(THIRD_PARTY)}")


def import_time_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not the bodies of functions, nor of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from import_time_statements(node)


def core_names_no_vendor(sources: list[Source]) -> Iterator[str]:
    for source in of(sources, "ospnext"):
        for node, name in imports(source, {"torch.cuda", "torch.npu"}):
            if name.split(".")[0] in VENDOR_PACKAGES or within(name, {"torch.cuda", "torch.npu"}):
                yield source.at(node, f"imports {name}")
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Attribute) and node.attr in VENDOR_ATTRIBUTES:
                yield source.at(node, f"uses {ast.unparse(node)}")
            elif isinstance(node, ast.Name) and node.id in VENDOR_PACKAGES:
                yield source.at(node, f"uses {node.id}")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and VENDOR_STRING.fullmatch(node.value):
                yield source.at(node, f"holds the string {node.value!r}")


def backends_look_down_only(sources: list[Source]) -> Iterator[str]:
    names = {source.name for source in sources}
    for source in of(sources, "backends"):
        own = ".".join(source.name.split(".")[:3])  # ospnext.backends.<backend>
        for node, name in imports(source, names):
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            inside = relative and within(name, {own})
            if not inside and (relative or is_project(name)) and not within(name, BACKENDS_MAY_IMPORT):
                yield source.at(node, f"imports {name}; allowed: {sorted(BACKENDS_MAY_IMPORT)}, itself relatively")


def conformance_looks_at_the_seam(sources: list[Source]) -> Iterator[str]:
    names = {source.name for source in sources}
    for source in of(sources, "conformance"):
        for node, name in imports(source, names):
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            inside = relative and within(name, {"ospnext.conformance"})
            if not inside and (relative or is_project(name)) and not within(name, CONFORMANCE_MAY_IMPORT):
                yield source.at(node, f"imports {name}; allowed: {sorted(CONFORMANCE_MAY_IMPORT)}, itself relatively")


def environment_has_one_reader(sources: list[Source]) -> Iterator[str]:
    """Outside ops/policy.py an environment variable is read by a literal name that is not ours, or not at all."""
    for source in of(sources, "ospnext", "backends"):
        if source.path == "ospnext/ops/policy.py":
            continue
        keyed = {id(part) for node in ast.walk(source.tree) if reads_another_variable(node) for part in ast.walk(node)}
        for node in ast.walk(source.tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")
            name = isinstance(node, ast.Name) and node.id in ("environ", "getenv")
            if (attribute or name) and id(node) not in keyed:
                yield source.at(node, "reads the environment; OSPNEXT_ variables are read in ospnext/ops/policy.py")


def reads_another_variable(node: ast.AST) -> bool:
    """Whether this is `os.environ["X"]`, `os.environ.get("X")`, `"X" in os.environ` or the like, for a foreign X."""
    key: ast.AST | None = None
    if isinstance(node, ast.Subscript):
        key = node.slice
    elif isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
        key = node.args[0] if node.func.attr in ("get", "getenv", "setdefault", "pop") else None
    elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
        key = node.left
    return isinstance(key, ast.Constant) and isinstance(key.value, str) and not key.value.startswith("OSPNEXT_")


def modules_say_what_they_are(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if not ast.get_docstring(source.tree):
            yield f"{source.path}: no docstring on what lives here"


def files_are_small(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.lines > MAX_LINES:
            yield f"{source.path}: {source.lines} lines; split it by idea, {MAX_LINES} are the limit"


def names_say_something(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if VAGUE_NAMES & set(source.path.removesuffix(".py").split("/")):
            yield f"{source.path}: name the file after what it holds"


CHECKS: tuple[Check, ...] = (
    core_arrows,
    core_does_not_import_its_facade,
    core_knows_no_backend,
    core_imports_little,
    core_names_no_vendor,
    backends_look_down_only,
    conformance_looks_at_the_seam,
    environment_has_one_reader,
    modules_say_what_they_are,
    files_are_small,
    names_say_something,
)


@pytest.fixture(scope="module")
def tree() -> list[Source]:
    sources = read(ROOT)
    assert {"ospnext.ops.policy", "ospnext.backends.reference", "ospnext.conformance.plugin"} <= {
        source.name for source in sources
    }
    return sources


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_architecture(check: Check, tree: list[Source]) -> None:
    found = list(check(tree))
    assert not found, "\n" + "\n".join(found)


FORBIDDEN: list[tuple[Check, str, str]] = [
    (core_arrows, "ospnext/ops/x.py", "from ospnext.models import layers"),
    (core_arrows, "ospnext/ops/x.py", "def f():\n    from .. import models"),
    (core_arrows, "ospnext/models/x.py", "import ospnext.pipelines.video"),
    (core_arrows, "ospnext/sparse/x.py", "from ospnext import models"),
    (core_arrows, "ospnext/pipelines/x.py", "from ospnext.cli import main"),
    (core_arrows, "ospnext/errors.py", "from ospnext.ops import explain"),
    (core_arrows, "ospnext/newcomer/x.py", ""),
    (core_does_not_import_its_facade, "ospnext/models/x.py", "from ospnext import __version__"),
    (core_does_not_import_its_facade, "backends/a/x.py", "from ospnext import use_backend"),
    (core_knows_no_backend, "ospnext/ops/x.py", "from ospnext.backends import reference"),
    (core_knows_no_backend, "ospnext/models/x.py", "import ospnext.conformance"),
    (core_knows_no_backend, "ospnext/cli/x.py", "import ospnext.backends.a"),
    (core_knows_no_backend, "ospnext/ops/x.py", "target = 'ospnext.backends.reference.attention:math'"),
    (core_imports_little, "ospnext/pipelines/x.py", "import diffusers"),
    (core_imports_little, "ospnext/pipelines/x.py", "try:\n    from tqdm.auto import tqdm\nexcept ImportError: pass"),
    (core_names_no_vendor, "ospnext/models/x.py", "import torch\ntorch.cuda.synchronize()"),
    (core_names_no_vendor, "ospnext/models/x.py", "def f(x):\n    return x.is_npu"),
    (core_names_no_vendor, "ospnext/models/x.py", "device = 'cuda'"),
    (core_names_no_vendor, "ospnext/models/x.py", "def f(i):\n    return f'npu:{i}'"),
    (core_names_no_vendor, "ospnext/models/x.py", "def f():\n    import triton.language as tl"),
    (core_names_no_vendor, "ospnext/models/x.py", "from torch import cuda"),
    (core_names_no_vendor, "ospnext/models/x.py", "package = 'flash_attn.cute'"),
    (backends_look_down_only, "backends/a/x.py", "from ospnext.models import layers"),
    (backends_look_down_only, "backends/a/x.py", "from ..b import kernels"),
    (backends_look_down_only, "backends/a/x.py", "from ospnext.backends.a import kernels"),
    (conformance_looks_at_the_seam, "conformance/x.py", "from ospnext.pipelines import video"),
    (conformance_looks_at_the_seam, "conformance/x.py", "from ospnext.backends import reference"),
    (environment_has_one_reader, "ospnext/cli/x.py", "import os\nos.environ['OSPNEXT_BACKEND']"),
    (environment_has_one_reader, "backends/a/x.py", "import os\nos.getenv('OSPNEXT_' + 'OPS', 'RANK')"),
    (environment_has_one_reader, "ospnext/cli/x.py", "import os\nsettings = dict(os.environ)"),
    (modules_say_what_they_are, "ospnext/ops/bare.py", ""),
    (files_are_small, "ospnext/ops/x.py", "pass\n" * MAX_LINES),
    (names_say_something, "ospnext/ops/utils.py", ""),
    (names_say_something, "backends/a/common/x.py", ""),
]

ALLOWED: list[tuple[str, str]] = [
    ("ospnext/models/x.py", "from ospnext import ops\nfrom ospnext.errors import PolicyError"),
    ("ospnext/ops/x.py", "'''Choose cuda.cudnn or \"npu\".'''\nexample = 'attention=cuda.cudnn,quantize=reference'"),
    ("ospnext/ops/x.py", "GROUP = 'ospnext.backends'"),
    ("ospnext/pipelines/x.py", "def f():\n    import diffusers\n    return diffusers"),
    ("ospnext/parallel/x.py", "import os\nrank = int(os.environ['RANK'])"),
    ("backends/a/x.py", "import triton\nfrom ospnext.ops.contract import need\nfrom . import y\nfrom .y import z"),
    ("ospnext/cli/x.py", "def run():\n    from ospnext.conformance import y"),
    ("conformance/x.py", "from ospnext.models import config\nfrom .y import z"),
]


def planted(root: Path, path: str, source: str) -> list[Source]:
    """The modules of a small house with one module planted in it."""
    house = ["ospnext/__init__.py", "backends/a/y.py", "backends/b/kernels.py", "conformance/y.py"]
    house += [f"ospnext/{part}/__init__.py" for part in MAY_IMPORT]
    for file in [*house, path]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text('"""What lives here."""\n')
    if source or not path.endswith("bare.py"):
        source = f'"""What lives here."""\n{source}\n'
    (root / path).write_text(source)
    return read(root)


@pytest.mark.parametrize(("check", "path", "source"), FORBIDDEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_check_catches(check: Check, path: str, source: str, tmp_path: Path) -> None:
    found = list(check(planted(tmp_path, path, source)))
    assert found
    assert all(line.startswith(path) for line in found)


@pytest.mark.parametrize(("path", "source"), ALLOWED)
def test_no_check_forbids_what_is_allowed(path: str, source: str, tmp_path: Path) -> None:
    assert [line for check in CHECKS for line in check(planted(tmp_path, path, source))] == []
