"""What a backend says of itself: its predicates, its reasons and its manifest. No kernel is judged here."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ospnext.errors import UnsupportedRequestError
from ospnext.ops import use_backend
from ospnext.ops.contract import Contract, Reason
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.policy import Policy
from ospnext.ops.registry import ANY_DEVICE, Implementation, Manifest, load, registry
from ospnext.ops.select import select
from ospnext.ops.tolerance import Verdict

from .check import Check, CheckFailure, Target
from .layouts import Placed
from .modes import on_device

CODE = re.compile(r"[a-z][a-z0-9_]*")


def checks() -> Iterator[Check]:
    for examine in EXAMINATIONS:
        name = examine.__name__.replace("_", "-")
        yield Check(id=f"selection/required/{name}", level="required", run=_run(examine))


def _run(examine: Callable[[Target, Manifest], Iterator[str]]) -> Callable[[Target], Mapping[str, Verdict]]:
    def run(target: Target) -> Mapping[str, Verdict]:
        complaints = list(examine(target, registry().manifests[target.backend]))
        if complaints:
            raise CheckFailure("; ".join(complaints))
        return {}

    return run


def refusals_give_their_code(target: Target, manifest: Manifest) -> Iterator[str]:
    """Each declared refusal is refused with its code, and what it differs from is not."""
    for implementation, taken in _taken_requests(target, manifest):
        for refusal in implementation.refusals:
            unusual = dataclasses.replace(taken, **refusal.request)
            codes = {r.code for r in _predicate(implementation, manifest, unusual, refusal.device, met=False)}
            if refusal.code not in codes:
                yield f"{implementation.id}: {dict(refusal.request)} {dict(refusal.device)} must be refused with " + (
                    f"{refusal.code!r}, got {sorted(codes) or 'no reason'}"
                )


def codes_have_a_refusal(target: Target, manifest: Manifest) -> Iterator[str]:
    """Every code that a predicate knows is lower_snake and has an example in the manifest."""
    for implementation, taken in _taken_requests(target, manifest):
        known = {r.code for r in _predicate(implementation, manifest, taken, {}, met=None)}
        examples = {refusal.code for refusal in implementation.refusals}
        for code in sorted(known - examples):
            yield f"{implementation.id}: the predicate knows {code!r}, `refusals` in the manifest has no example of it"
        for code in sorted(known | examples):
            if not CODE.fullmatch(code):
                yield f"{implementation.id}: reason code {code!r} is not lower_snake"


def unknown_fields_are_refused(target: Target, manifest: Manifest) -> Iterator[str]:
    """A feature that a later version of ospnext may invent is refused, not ignored."""
    for implementation, taken in _taken_requests(target, manifest):
        contract = CONTRACTS[implementation.contract]
        novel = dataclasses.make_dataclass("Novel", [("novel", bool, False)], bases=(type(taken),), frozen=True)
        fields = {f.name: getattr(taken, f.name) for f in dataclasses.fields(taken)}
        if "novel" not in _refused(contract, implementation, manifest, novel(**fields, novel=True)):
            yield f"{implementation.id} takes a request with a field it cannot know"


def unhandled_features_are_refused(target: Target, manifest: Manifest) -> Iterator[str]:
    """A feature that `handles` does not list is a reason by itself; one that no request has is a mistake."""
    for implementation, taken in _taken_requests(target, manifest):
        contract = CONTRACTS[implementation.contract]
        options = contract.options(taken)
        for name in sorted(implementation.handles - options.keys()):
            yield f"{implementation.id} handles {name!r}, which {contract.name} does not have"
        for name, value in options.items():
            if isinstance(value, bool) and name not in implementation.handles:
                request = dataclasses.replace(taken, **{name: True})
                if name not in _refused(contract, implementation, manifest, request):
                    yield f"{implementation.id} takes {name}, which it does not handle"


def refused_calls_raise_their_reason(target: Target, manifest: Manifest) -> Iterator[str]:
    """Through the public function: a call that an implementation refuses raises, with every reason in the message."""
    for implementation, _ in _taken_requests(target, manifest):
        contract = CONTRACTS[implementation.contract]
        if contract.by_ranks:
            continue
        for case in contract.cases():
            codes = _refused(contract, implementation, manifest, on_device(case.request, target.device))
            if not codes or case.layout != "contiguous" or getattr(case.request, "deterministic", False):
                continue
            values = Placed(contract.inputs(case), "contiguous", target.device).values
            with use_backend(target.backend, ops={contract.name: implementation.id}, fallback=()):
                try:
                    contract.call(values, lambda function: function)
                except UnsupportedRequestError as error:
                    missing = [code for code in codes if code not in str(error)]
                    if missing:
                        yield f"{implementation.id}: the error for {case.id} does not name {missing}"
                else:
                    yield f"{implementation.id} was to refuse {case.id}; another kernel ran, or it did"
            break


def predicates_are_pure(target: Target, manifest: Manifest) -> Iterator[str]:
    """The same request and device give the same reasons, time after time."""
    for implementation, taken in _taken_requests(target, manifest):
        answers = [list(_predicate(implementation, manifest, taken, {}, met=None)) for _ in range(3)]
        if any(answer != answers[0] for answer in answers):
            yield f"{implementation.id}: the predicate answers one request in several ways"


def manifest_loads_no_vendor_package(target: Target, manifest: Manifest) -> Iterator[str]:
    """Importing a manifest costs nothing: packages that kernels need are imported when a kernel is chosen."""
    modules = {i.target.partition(":")[0] for i in manifest.implementations} | {manifest.probe.partition(":")[0]}
    requires = {name for i in manifest.implementations for name in i.requires}
    code = (
        "import sys; from ospnext.ops.registry import registry; manifests = registry().manifests; "
        f"print(*sorted({modules | requires!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        yield f"discovery fails in a fresh process: {done.stderr.strip().splitlines()[-1]}"
    elif done.stdout.strip():
        yield f"discovering backends imports {done.stdout.strip()}: import inside the probe or the kernel module"


EXAMINATIONS: tuple[Callable[[Target, Manifest], Iterator[str]], ...] = (
    refusals_give_their_code,
    codes_have_a_refusal,
    unknown_fields_are_refused,
    unhandled_features_are_refused,
    refused_calls_raise_their_reason,
    predicates_are_pure,
    manifest_loads_no_vendor_package,
)


def _taken_requests(target: Target, manifest: Manifest) -> Iterator[tuple[Implementation, Any]]:
    """Every implementation whose packages are installed, with the plainest request that it takes: on the device under
    test, or else on another type of device that the backend names.
    """
    types = [target.device.type, *(t for t in manifest.device_types if t not in (target.device.type, ANY_DEVICE))]
    for implementation in manifest.implementations:
        contract = CONTRACTS[implementation.contract]
        if registry().missing_packages(implementation):
            continue
        requests = (on_device(case.request, torch.device(t)) for t in types for case in contract.cases())
        plain = (request for request in requests if not contract.features(request))
        taken = next((r for r in plain if not _refused(contract, implementation, manifest, r)), None)
        if taken is None:
            continue  # nothing here is for it, as on a card too old for a kernel, or on one for a rank each
        yield implementation, taken


def _refused(contract: Contract, implementation: Implementation, manifest: Manifest, request: Any) -> set[str]:
    """Codes of the reasons that selection gives against an implementation."""
    policy = Policy(manifest.backend, ops=((contract.name, implementation.id),))
    decision = select(contract, request, policy, registry())
    return {r.code for c in decision.candidates if c.id == implementation.id for r in c.reasons}


def _predicate(
    implementation: Implementation, manifest: Manifest, request: Any, device: Mapping[str, Any], *, met: bool | None
) -> Iterator[Reason]:
    """Reasons of the implementation's own predicate: those met, not met, or (None) all."""
    info = registry().probe(manifest.backend).device
    if implementation.supports and info is not None:
        for line in load(implementation.supports)(request, dataclasses.replace(info, **device)):
            if met is None or line.met == met:
                yield line.reason
