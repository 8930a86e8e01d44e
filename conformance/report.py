"""The report of a run: facts as JSON, written whole or not at all. `data/report.schema.json` describes it."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ospnext.ops.explain import as_json
from ospnext.ops.registry import Manifest, registry
from ospnext.ops.select import Decision
from ospnext.ops.tolerance import Verdict
from ospnext.version import __version__

from .check import Result
from .release import HERE, must_pass_hash, suite_hash
from .waivers import Waiver

SCHEMA = 1
#: Versions worth knowing when two reports differ.
PACKAGES = ("torch", "numpy", "triton", "torch_npu", "flash-attn", "flash-attn-4", "nvidia-cudnn-frontend")


class Decisions:
    """Decisions of a run, each distinct one once."""

    def __init__(self) -> None:
        self._index: dict[str, int] = {}

    def add(self, decision: Decision | None) -> int | None:
        if decision is None:
            return None
        return self._index.setdefault(json.dumps(as_json(decision), sort_keys=True), len(self._index))

    def as_list(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self._index]


def build(
    results: Sequence[Result],
    decisions: Decisions,
    *,
    manifest: Manifest,
    device: torch.device,
    asked: dict[str, Any],
    started: datetime.datetime,
    waivers: Iterable[Waiver] = (),
    problems: Sequence[str] = (),
) -> dict[str, Any]:
    """The report as JSON types. `asked` is what the user asked for: levels, patterns, shard."""
    body = {
        "schema": SCHEMA,
        "suite": {
            "version": __version__,
            "hash": suite_hash(),
            "must_pass": {level: must_pass_hash(level) for level in ("required", "optional")},
        },
        "backend": _backend(manifest, device),
        "run": asked
        | {
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.datetime.now(datetime.UTC) - started).total_seconds(), 1),
        },
        "source": source(),
        "environment": environment(),
        "summary": dict(Counter(result.status for result in results)),
        "problems": list(problems),
        "waivers": [_plain(dataclasses.asdict(waiver)) for waiver in waivers],
        "decisions": decisions.as_list(),
        "cases": [_case(result) for result in results],
    }
    return {**body, "digest": digest(body)}


def digest(body: dict[str, Any]) -> str:
    """Over everything else in a report. It finds damage and careless edits; it is no signature."""
    rest = {key: value for key, value in body.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def device_name(manifest: Manifest, device: torch.device) -> str:
    """The name of the device that runs, which for a backend of any device is not the one it probed."""
    info = registry().probe(manifest.backend).device
    if info is not None and info.type == device.type:
        return info.name
    return str(torch.get_device_module(device).get_device_name(device))


def _backend(manifest: Manifest, device: torch.device) -> dict[str, Any]:
    info = registry().probe(manifest.backend).device
    return {
        "name": manifest.backend,
        "description": manifest.description,
        "device": str(device),
        "device_name": device_name(manifest, device),
        "capability": str(info.capability) if info and info.capability is not None else None,
        "versions": dict(info.versions) if info else {},
        "implementations": [{"id": i.id, "contract": i.contract, "note": i.note} for i in manifest.implementations],
    }


def source(root: Path = HERE.parent) -> dict[str, Any]:
    """Commit of the checkout that runs, and whether files differ from it; None for an installed wheel."""
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def environment() -> dict[str, Any]:
    """Versions, processor and the variables that a run may depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": versions,
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("OSPNEXT_")},
    }


def _case(result: Result) -> dict[str, Any]:
    record = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "verdicts"}
    record["reasons"], record["seconds"] = list(result.reasons), round(result.seconds, 4)
    record["results"] = {name: _verdict(verdict) for name, verdict in result.verdicts.items()}
    return record


def _verdict(verdict: Verdict) -> dict[str, Any]:
    numbers = dataclasses.asdict(verdict) | {"ratio": verdict.ratio}
    return {k: v if isinstance(v, bool) or math.isfinite(v) else None for k, v in numbers.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        k: str(v) if isinstance(v, datetime.date) else list(v) if isinstance(v, tuple) else v for k, v in values.items()
    }
