"""Waivers: failures that are known, owned and dated. An expired, unmatched or now passing waiver is itself a failure.

A TOML file holds any number of

    [[waiver]]
    cases = ["attention/required/b1-q1-k3-h2-d64-bf16-mask"]   # full ids, never patterns: nothing slips in later
    backend = "acme"
    implementation = "acme.flash"       # optional: only there
    device = "Acme One"                 # optional: only on devices whose name contains this
    reason = "..."
    issue = "https://..."
    owner = "..."
    granted = 2026-11-01
    expires = 2027-02-01                # at most 180 days later
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ospnext.errors import ConfigError

from .check import Result

MAX_DAYS = 180


@dataclass(frozen=True)
class Waiver:
    """One entry of the file."""

    cases: tuple[str, ...]
    backend: str
    reason: str
    issue: str
    owner: str
    granted: datetime.date
    expires: datetime.date
    implementation: str = ""
    device: str = ""

    def covers(self, result: Result) -> bool:
        return result.id in self.cases and self.implementation in ("", result.implementation)

    def __str__(self) -> str:
        shown = self.cases[0] + (f" and {len(self.cases) - 1} more" if len(self.cases) > 1 else "")
        return f"waiver of {shown} ({self.issue}, {self.owner}, until {self.expires})"


def read_waivers(path: Path) -> list[Waiver]:
    """Raises ConfigError, naming the entry and what is wrong, for anything but complete and plausible waivers."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if entries.keys() - {"waiver"}:
        raise ConfigError(f"{path}: only [[waiver]] tables are known, found {sorted(entries.keys() - {'waiver'})}")
    found = entries.get("waiver", [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ConfigError(f"{path}: only [[waiver]] tables are known, with two brackets")
    return [_waiver(f"{path}, waiver {n}", entry) for n, entry in enumerate(found, start=1)]


def _waiver(where: str, entry: dict[str, Any]) -> Waiver:
    known = {f.name: f.default for f in fields(Waiver)}
    unknown, missing = entry.keys() - known.keys(), {n for n, d in known.items() if d != ""} - entry.keys()
    if unknown or missing:
        raise ConfigError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}; keys: {', '.join(known)}")
    cases = entry["cases"]
    if not isinstance(cases, list) or not cases or any(not isinstance(c, str) or set(c) & set("*?[") for c in cases):
        raise ConfigError(f"{where}: cases must be a list of full ids without wildcards, got {cases!r}")
    for name in ("granted", "expires"):
        if type(entry[name]) is not datetime.date:
            raise ConfigError(f"{where}: {name} must be a date such as 2026-11-01, got {entry[name]!r}")
    if not str(entry["issue"]).startswith(("https://", "http://")):
        raise ConfigError(f"{where}: issue must be a URL, got {entry['issue']!r}")
    for name in ("backend", "reason", "owner"):
        if not isinstance(entry[name], str) or not entry[name].strip():
            raise ConfigError(f"{where}: {name} must say something, got {entry[name]!r}")
    for name in ("implementation", "device"):
        if not isinstance(entry.get(name, ""), str):
            raise ConfigError(f"{where}: {name} must be text, got {entry[name]!r}")
    days = (entry["expires"] - entry["granted"]).days
    if not 0 <= days <= MAX_DAYS:
        raise ConfigError(f"{where}: expires {days} days after it was granted; 0 to {MAX_DAYS} are allowed")
    return Waiver(**{**entry, "cases": tuple(cases)})


def apply_waivers(
    results: Sequence[Result],
    waivers: Iterable[Waiver],
    *,
    backend: str,
    device: str,
    known_ids: Iterable[str],
    today: datetime.date,
) -> tuple[list[Result], list[str]]:
    """The results with what is waived marked so, and what is wrong with the waivers themselves.

    `known_ids` are those of the whole suite, so that a partial run does not call a waiver unmatched."""
    results, known, problems = list(results), set(known_ids), []
    for waiver in waivers:
        if waiver.backend != backend or waiver.device not in device:
            continue
        if today > waiver.expires or today < waiver.granted:
            problems.append(f"{waiver}: in force from {waiver.granted} to {waiver.expires}, and today is {today}")
            continue
        problems += [f"{waiver}: there is no check {case!r}" for case in waiver.cases if case not in known]
        covered = [i for i, result in enumerate(results) if waiver.covers(result)]
        for i in covered:
            if results[i].status == "pass":
                problems.append(f"{waiver}: {results[i].id} passes now; remove it from the file")
            else:
                results[i] = replace(results[i], status="waived", message=f"{waiver}: {results[i].message}")
    return results, problems
