"""A Decision as text and as JSON. The same text is the body of the error when nothing takes a request."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from ospnext.ops.select import Candidate, Decision


def as_text(decision: Decision) -> str:
    """Every implementation on its own line, with what became of it and why; those of a backend that cannot run here on
    one.
    """
    contract = decision.contract
    lines = [
        f"{contract.name}.v{contract.version}  {describe_request(decision.request)}",
        f"  policy: {decision.policy}",
    ]
    lines.append(f"  asked: {decision.asked}")
    lines += candidate_lines(decision)
    if not decision.candidates:
        lines.append("    no backend declares an implementation of this operator")
    if decision.chosen is None:
        lines.insert(0, f"no implementation takes this {contract.name} request")
        if contract.family not in decision.policy.fallback:
            lines.append(f"  OSPNEXT_FALLBACK={contract.family} would allow implementations that were not asked for.")
        lines.append("  `ospnext doctor` shows every backend; OSPNEXT_BACKEND=reference runs anywhere PyTorch does.")
    return "\n".join(lines)


def candidate_lines(decision: Decision, *, unavailable: bool = True) -> list[str]:
    """The lines of the implementations alone; without those of backends that cannot run here if asked."""
    rows: list[tuple[str, str, str]] = []
    for backend, group in itertools.groupby(decision.candidates, key=lambda c: c.id.partition(".")[0]):
        candidates = list(group)
        missing = [c for c in candidates if c.status == "unavailable"]
        if not missing or (len(missing) == 1 and unavailable):
            rows += [(c.id, c.status, _why(c)) for c in candidates]
        elif unavailable:
            why = "; ".join(map(str, missing[0].reasons))
            rows.append((f"{backend} ({len(missing)} kernels)", "unavailable", why))
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"    {name:<{width}}  {status:<11}  {why}".rstrip() for name, status, why in rows]


def as_json(decision: Decision) -> dict[str, Any]:
    """The decision as JSON types; `request` holds every field."""
    return {
        "contract": decision.contract.name,
        "version": decision.contract.version,
        "request": {k: _plain(v) for k, v in dataclasses.asdict(decision.request).items()},
        "policy": {
            "backend": decision.policy.backend,
            "ops": dict(decision.policy.ops),
            "fallback": sorted(decision.policy.fallback),
            "tuning": decision.policy.tuning.path if decision.policy.tuning else None,
        },
        "asked": decision.asked,
        "chosen": decision.chosen_id,
        "fell_back": decision.fell_back,
        "candidates": [
            {"id": c.id, "status": c.status, "note": c.note, "reasons": [dataclasses.asdict(r) for r in c.reasons]}
            for c in decision.candidates
        ],
    }


def describe_request(request: Any) -> str:
    """Fields as name=value; defaults are left out."""
    words = []
    for f in dataclasses.fields(request):
        value = getattr(request, f.name)
        if f.default is dataclasses.MISSING or value != f.default:
            words.append(f"{f.name}={_plain(value)}")
    return " ".join(words)


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _why(candidate: Candidate) -> str:
    return "; ".join([*map(str, candidate.reasons), *([candidate.note] if candidate.note else [])])
