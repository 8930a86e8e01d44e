"""Prompt files: one prompt per line, or JSONL with settings per row. What a row means for a video stands in jobs.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ospnext.config import resolve
from ospnext.errors import ConfigError


@dataclass(frozen=True)
class PromptRow:
    """The keys of a JSONL row. null means: as configured for the whole run."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    id: str | int | None = None


class LocatedPrompt(NamedTuple):
    """A row and where it was written, as `file:line`, for error messages."""

    row: PromptRow
    where: str


def read_prompts(path: str | Path) -> tuple[LocatedPrompt, ...]:
    """The prompts of a UTF-8 file (a BOM and CRLF are accepted); blank lines are skipped.

    A file is JSONL when it is named `.jsonl` or when its first line that is not blank starts with `{`.

    Raises:
        ConfigError: with `file:line`: bad JSON, unknown keys, wrong types, an empty prompt, an id given twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # reads CRLF as \n
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompt file {str(path)!r}: {error}") from error
    # Not str.splitlines: it also splits at characters, such as U+2028, that JSON allows inside a string.
    lines = [(f"{path}:{number}", line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"the prompt file {str(path)!r} holds no prompt; write one prompt per line, or JSONL rows")
    is_jsonl = Path(path).suffix.lower() == ".jsonl" or lines[0][1].startswith("{")
    prompts = tuple(LocatedPrompt(_row(line, where) if is_jsonl else PromptRow(line), where) for where, line in lines)
    _require_distinct_ids(prompts)
    return prompts


def _row(line: str, where: str) -> PromptRow:
    try:
        values = json.loads(line, object_pairs_hook=_without_repeated_keys)
    except ValueError as error:
        found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ConfigError(f"{where}: not a JSON row: {found}") from error
    if not isinstance(values, dict):
        raise ConfigError(f'{where}: a row must be a JSON object such as {{"prompt": "a cat"}}, found {line[:80]}')
    row = resolve(PromptRow, (where, values))
    if not row.prompt.strip():
        raise ConfigError(f"{where}: the prompt is empty")
    if row.id is not None and not str(row.id).strip():
        raise ConfigError(f"{where}: the id is empty; leave the key out to number the video by its position")
    return row


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is given twice")
    return dict(pairs)


def _require_distinct_ids(prompts: tuple[LocatedPrompt, ...]) -> None:
    first: dict[str, str] = {}
    for row, where in prompts:
        if row.id is None:
            continue
        if str(row.id) in first:
            raise ConfigError(f"{where}: the id {str(row.id)!r} was already given at {first[str(row.id)]}")
        first[str(row.id)] = where
