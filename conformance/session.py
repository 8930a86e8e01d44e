"""One run of the suite, from what was asked to the files that prove it. The command line and pytest both drive this."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ospnext.atomic import write_text
from ospnext.errors import ConfigError
from ospnext.ops.policy import AUTO, current_policy, require_available
from ospnext.ops.registry import registry

from . import matrix, render, report, runner
from .check import Result
from .runner import Step
from .waivers import Waiver, apply_waivers, read_waivers

SHIPPED_WAIVERS = Path(__file__).parent / "data" / "waivers.toml"


class Session:
    """The steps of a run, the results so far, and the report at the end.

    Args:
        backend: a backend's name.
        device: where to run; None = the backend's first device.
        levels: any of "required", "optional", "extension".
        patterns: shell-style patterns of check ids; none = all.
        shard: (i, n) runs part i, from 1, of n.
        waivers: a TOML file besides the one that ships.
        out: folder for report.json, report.md and, while the run lasts, results.jsonl.

    Raises:
        ConfigError: something asked for does not exist; the message lists what does.
        BackendUnavailableError: this machine cannot run the backend.
    """

    def __init__(
        self,
        backend: str,
        *,
        device: str | None = None,
        levels: Sequence[str] = matrix.LEVELS,
        patterns: Sequence[str] = (),
        shard: tuple[int, int] = (1, 1),
        waivers: Path | None = None,
        out: Path | None = None,
    ) -> None:
        self.backend, self.out = backend, out
        default = runner.default_device(backend)
        self.device = _device(device) if device else default
        require_available(backend, registry())
        runner.check_device(backend, self.device)
        _require_present(self.device)
        self.manifest = registry().manifests[backend]
        everything = matrix.all_checks(self.manifest)
        self._all_ids = [check.id for check in everything]
        asked_for = matrix.select_checks(everything, levels, patterns)
        if not asked_for:
            raise ConfigError(f"{backend} has no check of level {' or '.join(levels)} that matches: nothing was judged")
        chosen = matrix.shard(asked_for, *shard)
        self.steps: list[Step] = runner.plan(chosen, backend, self.device)
        self.asked: dict[str, Any] = {"levels": list(levels), "patterns": list(patterns), "shard": list(shard)}
        self.results: list[Result] = []
        #: The step after which the device took no more work.
        self._lost = ""
        self._waivers: list[Waiver] = [*read_waivers(SHIPPED_WAIVERS), *(read_waivers(waivers) if waivers else [])]
        self._decisions, self._started = report.Decisions(), datetime.datetime.now(datetime.UTC)
        self._name = "report" if shard == (1, 1) else f"report-{shard[0]}-of-{shard[1]}"
        if out is not None:
            self._journal = out / f"{self._name}.jsonl"
            try:
                out.mkdir(parents=True, exist_ok=True)
                self._journal.unlink(missing_ok=True)
            except OSError as error:
                raise ConfigError(f"--out {out}: {error.strerror}") from None

    def run(self) -> Iterator[tuple[Step, Result]]:
        """Run every step that is left, one after the other."""
        for step in self.steps:
            yield step, self.run_step(step)

    def run_step(self, step: Step) -> Result:
        """Run one step and keep its result; until then the journal ends with the step's name."""
        if self._lost:
            return self.record(step, runner.not_run(step, self._lost))
        self._note({"id": step.label, "status": "started"})
        result = runner.run_step(step, self.backend, self.device)
        if result.status == "error" and runner.is_lost(self.device):
            self._lost = step.label
        return self.record(step, result)

    def record(self, step: Step, result: Result) -> Result:
        """Keep a result; it is on disk at once, so that a crash of the next kernel does not lose it."""
        result = replace(result, decision=self._decisions.add(step.decision))
        self.results.append(result)
        self._note({"id": step.label, "status": result.status, "ratio": result.ratio, "message": result.message})
        return result

    def finish(self) -> dict[str, Any]:
        """Apply waivers, write report.json and report.md to `out`, and return the report."""
        self.results, problems = self._waived(self.results)
        missing = len(self.steps) - len(self.results)
        if missing:
            problems.append(f"{missing} checks of this run were not run")
        made = report.build(
            self.results,
            self._decisions,
            manifest=self.manifest,
            device=self.device,
            asked=self.asked,
            started=self._started,
            waivers=[w for w in self._waivers if w.backend == self.backend],
            problems=problems,
        )
        if self.out is not None:
            write_text(self.out / f"{self._name}.json", json.dumps(made, indent=1) + "\n")
            write_text(self.out / f"{self._name}.md", render.markdown(made))
            self._journal.unlink(missing_ok=True)
        return made

    def is_waived(self, result: Result) -> bool:
        """Whether a waiver in force covers a failure."""
        return self._waived([result])[0][0].status == "waived"

    def waiver_problems(self) -> list[str]:
        """What is wrong with the waivers, judged by the results so far."""
        return self._waived(self.results)[1]

    def _waived(self, results: Sequence[Result]) -> tuple[list[Result], list[str]]:
        return apply_waivers(
            results,
            self._waivers,
            backend=self.backend,
            device=report.device_name(self.manifest, self.device),
            known_ids=self._all_ids,
            today=datetime.date.today(),
        )

    def _note(self, line: dict[str, Any]) -> None:
        if self.out is not None:
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(line) + "\n")


def named_backend(argument: str | None) -> str:
    """The backend that was named, by argument or environment: a suite must not choose what it judges."""
    backend = argument or current_policy().backend
    if backend == AUTO:
        names = ", ".join(sorted(registry().manifests))
        raise ConfigError(f"which backend is to be judged? Give --backend NAME or set OSPNEXT_BACKEND; known: {names}")
    return backend


def succeeded(made: dict[str, Any]) -> bool:
    """Whether nothing failed and no waiver is stale."""
    return not made["problems"] and not {"fail", "error"} & made["summary"].keys()


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8)."""
    index, slash, count = text.partition("/")
    if slash and index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count):
        return int(index), int(count)
    raise ConfigError(f"--shard {text!r}: give i/n with 1 <= i <= n, such as 2/8")


def parse_levels(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"--device {text!r}: {str(error).splitlines()[0]}") from None


def _require_present(device: torch.device) -> None:
    """Raise ConfigError if nothing can be put on `device`, rather than let every check say so."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # what PyTorch raises depends on the type
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
