"""`python -m ospnext.conformance.host_npu.schemas [--version X | --wheel FILE]`: pinned schemas of the operators that a
backend may call against those that a torch_npu declares.

A package is read, not imported, so that one for another version of torch can be looked at, too."""

from __future__ import annotations

import argparse
import difflib
import functools
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ospnext.errors import ConfigError, OSPNextError

#: One schema a line, as torch_npu 2.13.0 declares them.
FILE = Path(__file__).resolve().parents[1] / "data" / "host_npu_schemas.txt"
#: The library of the package that declares them, as text.
LIBRARY = "torch_npu/lib/libtorch_npu.so"


@dataclass(frozen=True)
class Comparison:
    """One operator: its pinned schema, and the one found, or None."""

    name: str
    pinned: str
    found: str | None

    @property
    def same(self) -> bool:
        return self.found is not None and canonical(self.pinned) == canonical(self.found)

    def difference(self) -> Iterator[str]:
        """What is gone from the pinned schema ("-") and what is new ("+"), an argument or result a line."""
        if self.found is None:
            yield "  - the operator"
            return
        pinned, found = (_parts(canonical(schema)) for schema in (self.pinned, self.found))
        yield from (f"  {line}" for line in difflib.ndiff(pinned, found) if line[0] in "+-")


def name_of(schema: str) -> str:
    return schema.partition("(")[0].removeprefix("npu::")


@functools.cache
def pinned() -> Mapping[str, str]:
    """Name -> schema."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return {name_of(line): line for line in lines}


@functools.cache
def canonical(schema: str) -> str:
    """The schema as torch prints it: quotes, numbers and namespaces no longer differ."""
    import torch

    return str(torch._C.parse_schema(schema.removeprefix("npu::")))


def _parts(schema: str) -> list[str]:
    """Arguments and results one by one; what stands in brackets stays together."""
    return re.findall(r"->.*|\w+\(|(?:\([^()]*\)|[^,()])+", schema)


def declared(library: bytes) -> Mapping[str, str]:
    """Schemas of the pinned operators in the text of a library that registers them."""
    found = {}
    for name in pinned():
        texts = set(_texts(library, f"{name}(".encode()))
        if len(texts) > 1:
            raise ConfigError(f"the library declares {name} {len(texts)} times, in different ways")
        found.update((name, text) for text in texts)
    return found


def _texts(library: bytes, start: bytes) -> Iterator[str]:
    """Whole strings of C that begin with `start`, with or without the namespace, and have a result."""
    place = library.find(start)
    while place >= 0:
        before, text = library[max(0, place - 6) : place], library[place : library.index(b"\0", place)]
        if before.endswith((b"\0", b"\0npu::")) and b") -> " in text:
            yield text.decode()
        place = library.find(start, place + 1)


def compare(found: Mapping[str, str]) -> list[Comparison]:
    return [Comparison(name, schema, found.get(name)) for name, schema in pinned().items()]


def library_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(LIBRARY)


def library_of(version: str) -> bytes:
    """Of a version that the package index has, for this Python; downloaded and not kept.

    Raises:
        ConfigError: the index does not have it, or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        asked.append(f"torch_npu=={version}")
        done = subprocess.run(asked, capture_output=True, text=True)
        wheels = list(Path(folder).glob("torch_npu-*.whl"))
        if done.returncode or not wheels:
            told = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ConfigError(
                f"torch_npu {version} could not be downloaded. Asked: {' '.join(asked)}. Answer: "
                f"{told[-1] if told else 'no wheel and no message'}. Fetch the wheel elsewhere and pass --wheel FILE"
            )
        return library_in(wheels[0])


def library_in_use() -> bytes:
    """Of the package that the host NPU runs with."""
    from .wheel import package, release_for_torch

    return (package(release_for_torch()).folder.parent / LIBRARY).read_bytes()


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; 1 if something differs, 2 if there is nothing to compare with."""
    parser = argparse.ArgumentParser(prog="python -m ospnext.conformance.host_npu.schemas", description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--version", help="a version of torch_npu to download; default: the one for the torch in use")
    source.add_argument("--wheel", type=Path, help="a wheel of torch_npu")
    asked = parser.parse_args(arguments)
    try:
        library = (
            library_in(asked.wheel) if asked.wheel else library_of(asked.version) if asked.version else library_in_use()
        )
        comparisons = compare(declared(library))
    except OSPNextError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for comparison in comparisons:
        print(f"{comparison.name}: {'same' if comparison.same else 'different'}")
        if not comparison.same:
            print(f"  pinned {comparison.pinned}\n  found  {comparison.found}")
            print("\n".join(comparison.difference()))
    return 0 if all(comparison.same for comparison in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
