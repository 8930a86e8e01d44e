"""Which implementations ran: every decision that selection made while a variant ran, with the manifests' own notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ospnext.ops import use_backend
from ospnext.ops.registry import COMPOSITE
from ospnext.ops.select import Decision, observers

#: Contract -> implementation id -> its note, such as "emulates HiF8 on ...".
Kernels = dict[str, dict[str, str]]


@contextmanager
def kernels_chosen() -> Iterator[Kernels]:
    """What is chosen inside the block, in order of first use. Decisions made before are forgotten and made again."""
    found: Kernels = {}

    def tell(decision: Decision) -> None:
        if decision.chosen_id is not None:
            note = next((c.note for c in decision.candidates if c.id == decision.chosen_id), "")
            found.setdefault(decision.contract.name, {})[decision.chosen_id] = note

    observers.append(tell)
    try:
        with use_backend():
            yield found
    finally:
        observers.remove(tell)
    if not any(name.startswith("fused.") for name in found):  # definitions are called without any decision
        found["fused"] = {COMPOSITE: "plain PyTorch"}
