"""Whether collectives go another way than the one that their backend prefers. On a device that is through the host:
slow, and without a difference in any result, so that nobody would notice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ospnext.ops.contracts.collective import CONTRACT, CollectiveRequest
from ospnext.ops.policy import current_policy
from ospnext.ops.rank_devices import in_words, sharing
from ospnext.ops.registry import registry
from ospnext.ops.select import select


def detour(device_type: str, groups: Sequence[Sequence[int]]) -> str:
    """What takes the collectives of these groups (ranks of the job, as many in each) under the policy in force, why
    that is not what comes first in the backend, and what to do. Empty where it is, or where the policy names an
    implementation. Ranks have told each other their devices.
    """
    if device_type == "cpu" or len(groups[0]) == 1:
        return ""
    shared = [sharing(device_type, group) for group in groups]
    most = max((len(ranks) for devices in shared for ranks in devices.values()), default=1)
    request = CollectiveRequest(device_type, torch.bfloat16, "all_to_all", len(groups[0]), 1, ranks_per_device=most)
    decision = select(CONTRACT, request, current_policy(), registry())
    before = list(itertools.takewhile(lambda candidate: candidate.status != "chosen", decision.candidates))
    better = [candidate for candidate in before if candidate.status in ("rejected", "not loaded")]
    if decision.chosen is None or not better:
        return ""
    reasons = "; ".join(f"{one.id} ({'; '.join(map(str, one.reasons))})" for one in better)
    said = f"ranks exchange tensors by {decision.chosen.id} ({decision.chosen.note}) instead of {reasons}"
    holders = "; ".join(filter(None, map(in_words, shared)))
    return f"{said}. {holders}: choose another device for each before the mesh is made" if holders else said
