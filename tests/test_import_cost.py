"""What importing ospnext costs and drags in. Every question is asked of a fresh interpreter."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[1] / "ospnext"

VENDOR = {"torch_npu", "flash_attn", "flash_attn_interface", "triton", "cudnn"}
#: What the optional extras bring. The core must import without any of it.
EXTRAS = {"diffusers", "transformers", "tokenizers", "huggingface_hub", "accelerate", "peft", "av", "ftfy", "tqdm",
          "sentencepiece", "PIL", "regex"}  # fmt: skip
MAX_IMPORT_MS = 60.0

#: Hides the packages in sys.argv[1], as if they were not installed.
HIDE = """
import sys
from importlib.machinery import PathFinder

hidden, found = set(sys.argv[1].split(",")), PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name.split(".")[0] in hidden else found(name, *where)
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str, after: str = "sys") -> set[str]:
    """The modules that `statement` adds to an interpreter which has run `import <after>`."""
    code = f"import json, sys, {after}\nbefore = set(sys.modules)\n{statement}\n"
    return set(json.loads(python(code + "print(json.dumps(sorted(set(sys.modules) - before)))")))


def core_modules() -> list[str]:
    files = sorted(CORE.rglob("*.py"))
    names = [".".join(("ospnext", *file.relative_to(CORE).with_suffix("").parts)) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def forbidden(loaded: set[str], packages: set[str]) -> list[str]:
    return sorted(name for name in loaded if name.split(".")[0] in packages)


def test_import_ospnext_loads_itself_only() -> None:
    loaded = loaded_by("import ospnext")
    assert {name for name in loaded if name.startswith("ospnext")} <= {"ospnext", "ospnext.version"}
    assert forbidden(loaded, VENDOR | EXTRAS | {"torch", "numpy", "yaml", "safetensors"}) == []


@pytest.fixture(scope="module")
def ops() -> set[str]:
    """What `import ospnext.ops` adds to PyTorch, which itself looks for tqdm and, with a GPU, for triton."""
    loaded = loaded_by("import ospnext.ops", after="torch")
    assert "ospnext.ops.registry" in loaded
    return loaded


def test_import_ops_loads_no_vendor_and_no_backend(ops: set[str]) -> None:
    assert forbidden(ops, VENDOR | EXTRAS) == []
    assert [name for name in ops if name.startswith(("ospnext.backends", "ospnext.conformance"))] == []


def test_import_ops_does_not_load_the_compiler(ops: set[str]) -> None:
    """torch._dynamo brings 800 modules and doubles the cost of `import torch`; who does not compile need not pay."""
    assert not ops & {"torch._dynamo", "torch._inductor"}


def test_import_ospnext_is_quick() -> None:
    """Measured without PyTorch, which it does not load: so its own share of the standard library is counted too."""
    code = "import time; start = time.perf_counter(); import ospnext; print(1000 * (time.perf_counter() - start))"
    milliseconds = [float(python(code)) for _ in range(5)]
    print(f"import ospnext: {', '.join(f'{ms:.1f}' for ms in milliseconds)} ms")
    assert statistics.median(milliseconds) < MAX_IMPORT_MS


def test_every_public_name_resolves() -> None:
    code = """
import ospnext, types
assert ospnext.__all__ == sorted(set(ospnext.__all__))
assert set(ospnext.__all__) <= set(dir(ospnext))
for name in ospnext.__all__:
    value = getattr(ospnext, name)
    assert value is not None and not isinstance(value, types.ModuleType), name
try:
    ospnext.no_such_name
except AttributeError as error:
    print(error)
"""
    assert "no_such_name" in python(code)


def test_the_core_imports_without_the_extras() -> None:
    """Every core module, with the extras and vendor packages hidden."""
    modules = core_modules()
    assert {"models", "ops", "sparse", "diffusion", "pipelines"} <= {
        name.split(".")[1] for name in modules if name.count(".")
    }
    code = HIDE + "import importlib\nfor name in sys.argv[2].split(','):\n    importlib.import_module(name)\n"
    python(code, ",".join(EXTRAS | VENDOR), ",".join(modules))


def test_a_hidden_package_is_missing() -> None:
    with pytest.raises(AssertionError, match="No module named 'yaml'"):
        python(HIDE + "import ospnext.yaml_text", "yaml")
