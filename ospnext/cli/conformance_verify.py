"""`ospnext conformance verify`: check a report without running anything. Imports no torch."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from ospnext.errors import ConfigError

HELP = """Check that a conformance report proves what it claims: every must-pass id once and passed, errors within
bounds, made by this suite from a clean checkout, no waiver out of date, contents unchanged since the run.

  ospnext conformance verify report/report.json
  ospnext conformance verify report                          # a folder with the shards of one run
  ospnext conformance verify report --markdown report.md     # and as one table

Runs nothing and needs no accelerator. Exits with 1 if the report is refused. The digest inside a report finds damage
and careless edits; it is no signature."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("report", type=Path, help="report.json, or a folder of shards")
    parser.add_argument(
        "--level", default="required", metavar="LEVELS", help="levels that must be complete (default: required)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write what the shards say together, if accepted")


def run(args: argparse.Namespace) -> int:
    from ospnext.conformance import render, verify

    reports = verify.read(args.report)
    levels = [word.strip() for word in args.level.split(",") if word.strip()]
    found = verify.problems(reports, datetime.date.today(), levels)
    for problem in found:
        print(f"refused: {problem}", file=sys.stderr)
    if not found:
        backend = reports[0]["backend"]
        count = sum(len(report["cases"]) for report in reports)
        if args.markdown:
            _write(args.markdown, render.markdown(render.together(reports)))
        print(f"accepted: {backend['name']} on {backend['device_name']}, {count} results, level {', '.join(levels)}")
    return 1 if found else 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--markdown {path}: {error.strerror}; give a file in a folder that is there") from None
