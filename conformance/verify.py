"""Whether reports prove what they claim. Imports no torch and runs nothing: anyone can check a vendor's report."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ospnext.errors import ConfigError

from .release import must_pass, must_pass_hash, suite_hash

SCHEMA = 1
SHOWN = 5
#: Levels with a must-pass list; extension checks are a vendor's own.
LISTED = ("required", "optional")
STATUSES = ("pass", "fail", "unsupported", "waived", "error")
KEYS = {"schema", "suite", "backend", "run", "source", "environment", "summary", "problems", "waivers", "decisions"}
KEYS |= {"cases", "digest"}
BOUNDS = (("max_error", "max_bound"), ("rms_error", "rms_bound"))


def read(path: Path) -> list[dict[str, Any]]:
    """The reports in a file, or in every `*.json` of a folder (the shards of one run).

    Raises:
        ConfigError: nothing is there, or it is no report.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path} holds no *.json; give a report.json or the folder that --out named")
    reports = []
    for file in files:
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{file}: not a report: {error}") from None
        if not isinstance(report, dict) or report.get("schema") != SCHEMA or KEYS - report.keys():
            raise ConfigError(
                f"{file}: not a conformance report of schema {SCHEMA}, which has {', '.join(sorted(KEYS))}"
            )
        reports.append(report)
    return reports


def problems(
    reports: Sequence[dict[str, Any]], today: datetime.date, levels: Sequence[str] = ("required",)
) -> list[str]:
    """Everything that keeps these reports from proving `levels`; empty if they do.

    Raises:
        ConfigError: a level has no list of checks that must be there; without this, none would be asked for.
    """
    if not levels or set(levels) - {*LISTED}:
        raise ConfigError(f"level {', '.join(levels)!r}: a report can prove {' and '.join(LISTED)}")
    try:
        return [*_about_reports(reports), *_about_cases(reports, levels), *_about_waivers(reports, today)]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return [f"malformed report: {type(error).__name__}: {error}"]


def _of_run(report: dict[str, Any], key: str) -> dict[str, Any]:
    """What all shards share: they may run on several cards of one kind."""
    return {name: value for name, value in report[key].items() if (key, name) != ("backend", "device")}


def _about_reports(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    for n, report in enumerate(reports, start=1):
        where = f"report {n}: " if len(reports) > 1 else ""
        body = {key: value for key, value in report.items() if key != "digest"}
        if hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() != report["digest"]:
            yield f"{where}the digest does not fit the contents: the file was changed after the run"
        made_by, this = report["suite"]["hash"], suite_hash()
        if made_by != this:
            version = report["suite"]["version"]
            yield f"{where}made by another suite, {made_by[:12]} of ospnext {version}; this one is {this[:12]}"
        for level, found in report["suite"]["must_pass"].items():
            if found != must_pass_hash(level):
                yield f"{where}its list of {level} checks is not that of this suite"
        if report["source"]["dirty"]:
            yield f"{where}made from a checkout with uncommitted changes"
        if report["problems"]:
            yield f"{where}the run ended with problems: {'; '.join(report['problems'][:SHOWN])}"
    for key in ("backend", "source"):
        if any(_of_run(report, key) != _of_run(reports[0], key) for report in reports[1:]):
            yield f"the reports differ in {key}: they are not shards of one run"


def _about_cases(reports: Sequence[dict[str, Any]], levels: Sequence[str]) -> Iterator[str]:
    by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in reports:
        for case in report["cases"]:
            by_id[case["id"]].append(case)
    for level in levels:
        missing = [identifier for identifier in must_pass(level) if identifier not in by_id]
        if missing:
            yield f"{len(missing)} {level} checks were not run: {_some(missing)}"
    listed = {identifier for level in LISTED for identifier in must_pass(level)}
    unknown = [i for i, cases in by_id.items() if i not in listed and cases[0]["level"] != "extension"]
    if unknown:
        yield f"{len(unknown)} checks are unknown to this suite: {_some(unknown)}"
    for identifier, cases in by_id.items():
        twice = [name for name, count in Counter(case["implementation"] for case in cases).items() if count > 1]
        if twice or sum(case["chosen"] for case in cases) != 1:
            yield f"{identifier}: run twice, or not on exactly one chosen implementation"
        for case in cases:
            yield from _about_case(case)


def _about_case(case: dict[str, Any]) -> Iterator[str]:
    label = f"{case['id']} [{case['implementation']}]" if case["implementation"] else case["id"]
    status = case["status"]
    if case["level"] != case["id"].split("/")[1] or status not in STATUSES:
        yield f"{label}: level {case['level']!r} or status {status!r} is not what the id says or the suite knows"
    elif status in ("fail", "error"):
        yield f"{label}: {status}: {case['message'].splitlines()[-1] if case['message'] else 'no message'}"
    elif status == "unsupported" and (case["level"] == "required" or not case["reasons"]):
        yield f"{label}: unsupported, which needs a reason and is no answer at level required"
    elif status == "pass":
        for name, numbers in case["results"].items():
            within = all(
                numbers[e] is not None and numbers[b] is not None and numbers[e] <= numbers[b] for e, b in BOUNDS
            )
            if not (within and numbers["finite"]):
                yield f"{label}: called a pass, and {name} is not within its bound"


def _about_waivers(reports: Sequence[dict[str, Any]], today: datetime.date) -> Iterator[str]:
    for report in reports:
        covered = {case for waiver in report["waivers"] for case in waiver["cases"]}
        for case in report["cases"]:
            if case["status"] == "waived" and case["id"] not in covered:
                yield f"{case['id']}: waived without a waiver"
        for waiver in report["waivers"]:
            if today > datetime.date.fromisoformat(waiver["expires"]):
                yield f"the waiver of {_some(waiver['cases'])} expired on {waiver['expires']} ({waiver['issue']})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
