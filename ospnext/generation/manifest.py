"""`manifest.jsonl`: one line per finished video, with all that is needed to make it again. One writer per file: where
replicas make several videos at a time, each but the first has a part of its own, `manifest.1.jsonl`, until the end.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ospnext import atomic
from ospnext.errors import ConfigError

FILE_NAME = "manifest.jsonl"
_PART = re.compile(r"manifest\.[1-9][0-9]*\.jsonl")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Entries by the name of their video, those of parts included; of several for one name, the last counts. No
    manifest is an empty one.
    """
    entries: dict[str, dict[str, Any]] = {}
    for path in _files(directory):
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                entries[entry["file"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                problem = f"{path}:{number}: not a manifest entry: {error!r}"
                raise ConfigError(f"{problem}; delete the line, or choose another --output") from error
    return entries


def append_entry(directory: Path, entry: dict[str, Any], replica: int = 0) -> None:
    """Add one line. The file is rewritten and renamed, so that no reader and no crash ever sees half a line."""
    path = directory / (f"manifest.{replica}.jsonl" if replica else FILE_NAME)
    _append(path, json.dumps(entry, ensure_ascii=False) + "\n")


def merge_parts(directory: Path) -> None:
    """Put the parts that a run has left into the manifest. Nobody else may be writing then."""
    for part in _parts(directory):
        _append(directory / FILE_NAME, part.read_text(encoding="utf-8"))
        part.unlink()


def _files(directory: Path) -> list[Path]:
    own = directory / FILE_NAME
    return [*([own] if own.exists() else []), *_parts(directory)]


def _parts(directory: Path) -> list[Path]:
    """Those of replicas: any other name, such as manifest.backup.jsonl, is somebody else's file."""
    return sorted(path for path in directory.glob("manifest.*.jsonl") if _PART.fullmatch(path.name))


def _append(path: Path, lines: str) -> None:
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    separator = "\n" if before and not before.endswith("\n") else ""
    atomic.write_text(path, f"{before}{separator}{lines}")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
