"""Runs checks on a backend: decides which implementations a check concerns, runs it on each, and names what came of it.

A kernel that raises ends its own check and no other."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ospnext.errors import ConfigError, UnsupportedRequestError
from ospnext.ops import use_backend
from ospnext.ops.contract import Contract
from ospnext.ops.policy import COMPOSITE, Policy, require_available
from ospnext.ops.registry import ANY_DEVICE, registry
from ospnext.ops.select import Decision, select

from .check import Check, CheckFailure, Result, Target
from .modes import on_device

#: Lines of a traceback kept in the report: enough to find the place, short enough to read.
TRACEBACK_LINES = 12


@dataclass(frozen=True)
class Step:
    """One check on one implementation (None: on the backend as a whole, or nothing takes the request)."""

    check: Check
    implementation: str | None = None
    chosen: bool = True
    decision: Decision | None = None

    @property
    def label(self) -> str:
        return f"{self.check.id} [{self.implementation}]" if self.implementation else self.check.id


def default_device(backend: str) -> torch.device:
    """The first device of a backend's own type; a backend for any device is tested on the CPU.

    Raises:
        ConfigError: there is no such backend.
        BackendUnavailableError: this machine cannot run it; the message says why.
    """
    with use_backend(backend, fallback=()):
        require_available(backend, registry())
        types = [t for t in registry().manifests[backend].device_types if t != ANY_DEVICE]
    return torch.device(types[0] if types else "cpu")


def check_device(backend: str, device: torch.device) -> None:
    """Raise ConfigError unless `backend` computes on `device`."""
    types = registry().manifests[backend].device_types
    if device.type not in types and ANY_DEVICE not in types:
        raise ConfigError(f"--device {device}: backend {backend} computes on {' or '.join(types)}")


def plan(checks: Iterable[Check], backend: str, device: torch.device) -> list[Step]:
    """Every check with every implementation of the backend that takes its request, best first."""
    steps: list[Step] = []
    for check in checks:
        if check.contract is None:
            steps.append(Step(check))
            continue
        decision = decide(check.contract, check.request, backend, device)
        takers = [c.id for c in decision.candidates if c.status in ("chosen", "eligible")]
        if not takers:
            steps.append(Step(check, decision=decision))
        if check.costly:
            takers = takers[:1]
        steps += [Step(check, taker, taker == decision.chosen_id, decision) for taker in takers]
    return steps


def decide(contract: Contract, request: object, backend: str, device: torch.device) -> Decision:
    """What the policy "this backend, no fallback" chooses for a request on `device`."""
    return select(contract, on_device(request, device), Policy(backend), registry())


def run_step(step: Step, backend: str, device: torch.device) -> Result:
    """Run one step; whatever it raises becomes its result."""
    check = step.check
    result = Result(check.id, check.level, "pass", step.implementation, step.chosen)
    if step.decision is not None and step.implementation is None:
        return _refused(result, step.decision)
    started = time.perf_counter()
    try:
        with use_backend(backend, ops={}, fallback=()):
            verdicts = check.run(Target(backend, device, step.implementation))
        wrong = [f"{name} is {v.ratio:.3g} times its bound" for name, v in verdicts.items() if not v.ok]
        result = replace(result, verdicts=verdicts, status="fail" if wrong else "pass", message="; ".join(wrong))
    except CheckFailure as failure:
        result = replace(result, status="fail", message=str(failure))
    except Exception as error:
        result = _raised(result, error)
    return replace(result, seconds=time.perf_counter() - started)


def not_run(step: Step, lost: str) -> Result:
    """The result of a step that comes after a call which lost the device: nothing can be judged any more."""
    message = f"not run: the device was lost in {lost}; run the rest with --case or --shard"
    return Result(step.check.id, step.check.level, "error", step.implementation, step.chosen, message)


def is_lost(device: torch.device) -> bool:
    """Whether the device takes no work any more, as after a read from an address that does not exist."""
    if device.type == "cpu":
        return False
    try:
        torch.zeros(1, device=device).item()
    except Exception:
        return True
    return False


def _refused(result: Result, decision: Decision) -> Result:
    """Nothing takes the request: a broken promise at level required, an answer at the others."""
    reasons = tuple(f"{c.id}: {r}" for c in decision.candidates if c.status != "not asked" for r in c.reasons)
    if result.level == "required":
        why = "; ".join(reasons) or "the backend declares no implementation"
        return replace(result, status="fail", reasons=reasons, message=f"required, and nothing takes it: {why}")
    return replace(result, status="unsupported", reasons=reasons or ("no_implementation: none declared",))


def _raised(result: Result, error: Exception) -> Result:
    """An error; or an answer, where an optional definition is made of operators of which the backend has not all."""
    refused = isinstance(error, UnsupportedRequestError) and result.implementation == COMPOSITE
    if refused and result.level != "required":
        return replace(result, status="unsupported", reasons=(f"{COMPOSITE}: {str(error).splitlines()[0]}",))
    return replace(result, status="error", message=_tail(traceback.format_exc()))


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TRACEBACK_LINES:])
