"""What this release of the suite is: the ids that must pass, and hashes of them and of the code. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
MUST_PASS = HERE / "data" / "must_pass.txt"


def must_pass(level: str) -> list[str]:
    """Ids of a level, in order. Extension checks are a vendor's own and are not listed."""
    lines = MUST_PASS.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#") and line.split("/")[1] == level]


def must_pass_hash(level: str) -> str:
    return _sha256("\n".join(must_pass(level)).encode())


def suite_hash() -> str:
    """Over every file that decides what passes: the suite, the contracts and the bounds."""
    digest = hashlib.sha256()
    for name, path in sorted(_files()):
        digest.update(f"{name}\n".encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def _files() -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec("ospnext.errors")
    assert spec is not None and spec.origin is not None
    ops = Path(spec.origin).parent / "ops"
    for path in (ops / "contract.py", ops / "tolerance.py", *ops.glob("contracts/*.py")):
        yield f"ops/{path.relative_to(ops).as_posix()}", path
    for path in (*HERE.rglob("*.py"), *HERE.glob("data/*")):
        yield f"conformance/{path.relative_to(HERE).as_posix()}", path


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
