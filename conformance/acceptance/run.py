"""A run over all items, from what was asked to the files that keep it. It outlives whatever an item does to the device:
the process that asks is replaced when it dies, hangs or loses the device, and the rest goes on in the next one.
"""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import json
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ospnext.atomic import write_text
from ospnext.errors import BackendUnavailableError, ConfigError
from ospnext.version import __version__

from .. import report
from . import render
from .ask import COULD_NOT_RUN, DIFFERS, without_answer

SCHEMA = 1
WORKER = "ospnext.conformance.acceptance.worker"
#: Seconds until the device is there, and the least that an item gets: first calls load kernels, and may compile them.
START_LIMIT, LEAST_LIMIT = 300.0, 180.0
#: An item gets this many times what it is estimated to take.
PATIENCE = 10.0
#: A device that is gone is waited for this many times in a row; then no later item waits for it.
STARTS = 2


class Acceptance:
    """A run over the items of `backend` whose id matches one of `patterns` (all without patterns).

    `variables` is the environment of the process that has the device (default: this one's). `out` gets acceptance.json
    and acceptance.md, after every item.

    Raises:
        ConfigError: no item matches, `out` cannot be written, or the process does not start.
        BackendUnavailableError: this machine cannot run the backend; the message says why.
    """

    def __init__(
        self,
        backend: str,
        *,
        patterns: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        out: Path | None = None,
    ) -> None:
        self.backend, self._out, self._variables = backend, out, variables
        if out is not None:
            try:
                out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"--out {out}: {error.strerror}") from None
        self._started = datetime.datetime.now(datetime.UTC)
        self._worker = _Worker(backend, variables)
        self._failed_starts = 0
        self._gone_since = ""
        try:
            self.items = select_items(self._worker.hello["items"], patterns, backend)
        except ConfigError:
            self._worker.end()
            raise
        self.records: list[dict[str, Any]] = []

    def run(self) -> Iterator[dict[str, Any]]:
        """Ask item after item."""
        try:
            for words in self.items:
                record = self._ask(words)
                self.records.append(record)
                self._write()
                yield record
        finally:
            self._worker.end()

    def _ask(self, words: dict[str, Any]) -> dict[str, Any]:
        if self._worker.gone:
            if self._failed_starts == STARTS:
                return without_answer(words, f"{self._gone_since} (tried {STARTS} times, for items before this one)")
            try:
                self._worker = _Worker(self.backend, self._variables)
            except (ConfigError, BackendUnavailableError) as error:
                self._failed_starts += 1
                self._gone_since = f"after an item before it, the device does not come back: {error}"
                return without_answer(words, self._gone_since)
            self._failed_starts = 0
        return self._worker.ask(words)

    def report(self) -> dict[str, Any]:
        """What was found so far, as JSON types."""
        hello = self._worker.hello
        return {
            "schema": SCHEMA,
            "ospnext": __version__,
            "backend": self.backend,
            "device": hello["device"],
            "run": {
                "started": self._started.isoformat(timespec="seconds"),
                "seconds": round((datetime.datetime.now(datetime.UTC) - self._started).total_seconds(), 1),
                "items": len(self.items),
            },
            "source": report.source(),
            "environment": hello["environment"],
            "summary": dict(Counter(record["verdict"] for record in self.records)),
            "items": self.records,
        }

    def _write(self) -> None:
        if self._out is not None:
            found = self.report()
            write_text(self._out / "acceptance.json", json.dumps(found, indent=1) + "\n")
            write_text(self._out / "acceptance.md", render.markdown(found))


def select_items(items: Sequence[dict[str, Any]], patterns: Sequence[str], backend: str) -> list[dict[str, Any]]:
    """Items whose id matches a pattern, in order."""
    chosen = [words for words in items if not patterns or any(fnmatch.fnmatchcase(words["id"], p) for p in patterns)]
    if not chosen:
        raise ConfigError(f"--item {' '.join(patterns)}: {backend} has no such item here; --dry-run lists all")
    return chosen


def succeeded(found: Mapping[str, Any]) -> bool:
    """Whether every answer is as expected; items that this machine is known not to answer are left out."""
    return not any(
        record["verdict"] == DIFFERS or (record["verdict"] == COULD_NOT_RUN and not record["excused"])
        for record in found["items"]
    )


def _of_a_lost_device(words: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What an item answered that left a device which takes no more work: no answer, since a fault looks like one."""
    said = record["error"] or f"it had answered {record['answer']!r}"
    error = f"the device took no more work after it, and the next item has another process; {said}"
    return {**without_answer(words, error, seconds=record["seconds"]), "details": record["details"]}


class _Worker:
    """The parent's side of worker.py."""

    def __init__(self, backend: str, variables: Mapping[str, str] | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", WORKER, backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if variables is None else dict(variables),
        )
        self.gone = False
        hello = self._answer(START_LIMIT)
        if isinstance(hello, str):
            raise ConfigError(f"the process that asks the device did not start: {hello}; see what it printed above")
        if "unavailable" in hello:
            self.end()
            raise BackendUnavailableError(
                f"{hello['unavailable']}\n`--dry-run` prints the questions without a device; `--host-npu` asks an "
                "emulated one."
            )
        self.hello = hello

    def ask(self, words: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the answer says
            self._process.stdin.write(words["id"] + "\n")
            self._process.stdin.flush()
        record = self._answer(max(LEAST_LIMIT, PATIENCE * words["estimated_seconds"]))
        if isinstance(record, str):
            return without_answer(words, record, seconds=time.monotonic() - started)
        if record.pop("lost"):
            self.end()
            return _of_a_lost_device(words, record)
        return record

    def _answer(self, limit: float) -> dict[str, Any] | str:
        """A line of the process, or what became of it."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit)[0]:
            self.end()
            return f"no answer in {limit:.0f} s: the process was ended"
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.end()
            return f"the process died with exit code {code}"
        return json.loads(line)

    def end(self) -> None:
        self.gone = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # words that it never read
                    pipe.close()
