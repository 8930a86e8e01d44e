"""Which implementation takes a request, and why not the others: a pure function, testable without hardware."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ospnext.errors import UnsupportedRequestError
from ospnext.ops.contract import Contract, Reason
from ospnext.ops.policy import AUTO, COMPOSITE, Policy, current_policy
from ospnext.ops.registry import ANY_DEVICE, Implementation, Manifest, Registry, load, registry
from ospnext.ops.tuning import Tuning

Status = Literal["chosen", "eligible", "rejected", "not loaded", "unavailable", "not asked"]


@dataclass(frozen=True)
class Candidate:
    """One implementation as the decision saw it."""

    id: str
    status: Status
    reasons: tuple[Reason, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Decision:
    """The outcome of a selection. `chosen` is None when nothing that the policy allows takes the request."""

    contract: Contract
    request: Any
    policy: Policy
    asked: str
    candidates: tuple[Candidate, ...]
    chosen: Implementation | None
    fell_back: bool = False

    @property
    def chosen_id(self) -> str | None:
        return self.chosen.id if self.chosen else None


def select(contract: Contract, request: Any, policy: Policy, known: Registry) -> Decision:
    """Decide by policy and predicates alone. No kernel module is imported and nothing is tried out.

    The policy names one backend, one implementation, or "auto": the available backend of highest priority that claims
    the device of the request and declares the contract. Other backends are looked at only where the policy allows their
    family to fall back. Inside a backend, manifests say the order, or measured times that the policy holds."""
    wanted, source = policy.wanted(contract.name, contract.family)
    backend, only = _asked(contract, request, wanted, known)
    asked = f"{wanted} ({source})" + (f" -> {backend or 'no backend'}" if wanted == AUTO else "")

    candidates: list[Candidate] = []
    chosen: Implementation | None = None
    for manifest in known.ordered():
        for implementation in manifest.offers(contract.name):
            if contract.always_composed:
                why = "not called: this contract is always made of others"
                candidates.append(Candidate(implementation.id, "not asked", note=why))
                continue
            if manifest.backend != backend or (only and implementation.id != only):
                candidates.append(_not_asked(manifest, implementation, wanted, known))
                continue
            candidate = _examine(contract, implementation, manifest, request, known)
            if candidate.status == "eligible" and chosen is None:
                chosen, candidate = implementation, _with(candidate, "chosen")
            candidates.append(candidate)

    if chosen is not None and only is None and policy.tuning is not None:
        chosen, candidates = _by_tuning(contract, request, policy.tuning, known, chosen, candidates)

    composite = _composite(contract)
    fell_back = False
    if composite is not None:
        offers = () if backend is None or contract.always_composed else known.manifests[backend].offers(contract.name)
        declared = bool(offers)
        if chosen is not None:
            candidates.append(Candidate(COMPOSITE, "not asked", note="a kernel of the backend takes this request"))
        elif wanted == COMPOSITE or not declared:
            why = (
                "asked for by name"
                if wanted == COMPOSITE
                else "on every backend"
                if contract.always_composed
                else f"{backend or 'the backends here'} declare{'s' if backend else ''} no kernel for this operator"
            )
            chosen = composite
            candidates.append(Candidate(COMPOSITE, "chosen", note=f"{_what_runs(contract)}: {why}"))
        elif contract.family in policy.fallback:
            chosen, fell_back = composite, True
            candidates.append(Candidate(COMPOSITE, "chosen", note=f"fallback, allowed for {contract.family}"))
        else:
            candidates.append(Candidate(COMPOSITE, "not asked", note=_how_to_allow(contract)))
    elif chosen is None and contract.family in policy.fallback:
        chosen, candidates = _fall_back(contract, request, known, candidates)
        fell_back = chosen is not None
    return Decision(contract, request, policy, asked, tuple(candidates), chosen, fell_back)


def auto_backend(device_type: str, known: Registry, contract: str = "attention") -> str | None:
    """The backend "auto" stands for on tensors of `device_type`: available, declaring `contract`, claiming the device,
    best first.
    """
    for claimed in (device_type, ANY_DEVICE):
        for manifest in known.ordered():
            if (
                claimed in manifest.device_types
                and manifest.offers(contract)
                and known.probe(manifest.backend).available
            ):
                return manifest.backend
    return None


def _asked(contract: Contract, request: Any, wanted: str, known: Registry) -> tuple[str | None, str | None]:
    """(backend, the one implementation id if one was named)."""
    if wanted == AUTO:
        decisive = contract.composed_of[0] if contract.composed_of else contract.name
        return auto_backend(request.device_type, known, decisive), None
    if wanted == COMPOSITE:
        return None, None
    if wanted in known.manifests:
        return wanted, None
    return wanted.partition(".")[0], wanted


def _examine(
    contract: Contract, implementation: Implementation, manifest: Manifest, request: Any, known: Registry
) -> Candidate:
    probe = known.probe(manifest.backend)
    if not probe.available:
        return Candidate(implementation.id, "unavailable", probe.reasons, implementation.note)
    missing = known.missing_packages(implementation)
    if missing:
        reasons = tuple(
            Reason("package", f"{name} not installed", implementation.install or f"pip install {name}")
            for name in missing
        )
        return Candidate(implementation.id, "not loaded", reasons, implementation.note)
    reasons = tuple(_reasons(contract, implementation, manifest, request, probe.device))
    note = implementation.note
    if implementation.id in known.failures:  # it stays the one to use: the next call raises the same error again
        note = f"failed to load: {known.failures[implementation.id].strip().splitlines()[-1]}"
    return Candidate(implementation.id, "rejected" if reasons else "eligible", reasons, note)


def _reasons(
    contract: Contract, implementation: Implementation, manifest: Manifest, request: Any, device: Any
) -> Iterable[Reason]:
    if request.device_type not in manifest.device_types and ANY_DEVICE not in manifest.device_types:
        yield Reason("device", f"tensors on {request.device_type}", " or ".join(manifest.device_types))
    for name, value in contract.features(request).items():
        if name not in implementation.handles:
            yield Reason(name, str(value), "default (this implementation does not handle the feature)")
    if implementation.supports:
        yield from (line.reason for line in load(implementation.supports)(request, device) if not line.met)


def _not_asked(manifest: Manifest, implementation: Implementation, wanted: str, known: Registry) -> Candidate:
    probe = known.probe(manifest.backend)
    if not probe.available:
        return Candidate(implementation.id, "unavailable", probe.reasons, implementation.note)
    return Candidate(implementation.id, "not asked", note=f"the policy asks for {wanted}")


def _by_tuning(
    contract: Contract,
    request: Any,
    tuning: Tuning,
    known: Registry,
    chosen: Implementation,
    candidates: list[Candidate],
) -> tuple[Implementation, list[Candidate]]:
    """The fastest of those that take the request, where the tuning measured this very request; else as it was."""
    ranked = tuning.ranked(contract, request, (c.id for c in candidates if c.status in ("chosen", "eligible")))
    if not ranked:
        return chosen, candidates
    (ms, first), others = ranked[0], ranked[1:]
    against = f" against {others[0][0]:.4g} ms of {others[0][1]}" if others else ", none other measured"
    why = f"first by tuning file {tuning.path} ({ms:.4g} ms{against})"
    result = []
    for candidate in candidates:
        if candidate.id == first:
            note = "; ".join(filter(None, (candidate.note, why)))
            candidate = Candidate(candidate.id, "chosen", candidate.reasons, note)
        elif candidate.status == "chosen":
            candidate = _with(candidate, "eligible")
        result.append(candidate)
    offers = known.manifests[first.partition(".")[0]].offers(contract.name)
    return next(i for i in offers if i.id == first), result


def _with(candidate: Candidate, status: Status) -> Candidate:
    return Candidate(candidate.id, status, candidate.reasons, candidate.note)


def _composite(contract: Contract) -> Implementation | None:
    return None if contract.composite is None else Implementation(COMPOSITE, contract.name, target="")


def _what_runs(contract: Contract) -> str:
    parts = " and ".join(contract.composed_of)
    return f"made of {parts}" if parts else "plain PyTorch definition of the contract"


def _how_to_allow(contract: Contract) -> str:
    return f"fallback is not allowed; set OSPNEXT_FALLBACK={contract.family} to allow it"


def _fall_back(contract: Contract, request: Any, known: Registry, candidates: list[Candidate]):
    """Among the implementations not asked for, the first that takes the request; the policy has allowed it."""
    chosen: Implementation | None = None
    result = []
    for candidate in candidates:
        if candidate.status == "not asked":
            manifest = known.manifests[candidate.id.partition(".")[0]]
            implementation = next(i for i in manifest.offers(contract.name) if i.id == candidate.id)
            candidate = _examine(contract, implementation, manifest, request, known)
            if candidate.status == "eligible" and chosen is None:
                chosen = implementation
                candidate = Candidate(candidate.id, "chosen", note=f"fallback, allowed for {contract.family}")
        result.append(candidate)
    return chosen, result


# ---- the registry and policy in force
# ------------------------------------------------------------------------------------------

_log = logging.getLogger("ospnext")

#: (contract, implementation) -> how many decisions fell back to it (equal calls share one); reports print this.
fallbacks: Counter[tuple[str, str]] = Counter()
#: Told every decision that `resolve` makes, chosen or not: reports name the kernels that ran.
observers: list[Callable[[Decision], object]] = []


def resolve(contract: Contract, request: Any) -> Any:
    """The kernel object for `request` under the policy in force.

    Raises:
        UnsupportedRequestError: nothing that the policy allows takes the request; the message is the explained
            decision.
    """
    decision = select(contract, request, current_policy(), registry())
    for tell in observers:
        tell(decision)
    if decision.chosen is None:
        from ospnext.ops.explain import as_text

        raise UnsupportedRequestError(as_text(decision))
    if decision.fell_back:
        key = (contract.name, decision.chosen.id)
        if not fallbacks[key]:
            reasons = "; ".join(
                f"{c.id}: {', '.join(map(str, c.reasons))}" for c in decision.candidates if c.status == "rejected"
            )
            _log.warning(
                "%s falls back to %s (%s)", contract.name, decision.chosen.id, reasons or "nothing else takes it"
            )
        fallbacks[key] += 1
    if decision.chosen.id == COMPOSITE:
        return contract.composite
    return registry().kernel(decision.chosen)
