"""`manifest.jsonl`: one line per finished video, with all that is needed to make it again. One writer per folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ospnext import atomic
from ospnext.errors import ConfigError

FILE_NAME = "manifest.jsonl"


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Entries by the name of their video; of several for one name, the last counts. No manifest is an empty one."""
    path = directory / FILE_NAME
    if not path.exists():
        return {}
    entries: dict[str, dict[str, Any]] = {}
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


def append_entry(directory: Path, entry: dict[str, Any]) -> None:
    """Add one line. The file is rewritten and renamed, so that no reader and no crash ever sees half a line."""
    path = directory / FILE_NAME
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    separator = "\n" if before and not before.endswith("\n") else ""
    atomic.write_text(path, f"{before}{separator}{json.dumps(entry, ensure_ascii=False)}\n")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
