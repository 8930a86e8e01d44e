"""Ranks agree before they work together: each tells what it would do and with what, and a difference ends all of them
with the same list. What a caller knows beyond operators (its model, its mesh, its seed) it adds as facts of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist

from ospnext.errors import CollectiveError, DisagreementError
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.device import default_device
from ospnext.ops.group_store import meet, names_of
from ospnext.ops.policy import AUTO, VARIABLES, Policy, current_policy, variables_set
from ospnext.ops.registry import registry
from ospnext.ops.select import auto_backend, select
from ospnext.ops.tuning import machine_of
from ospnext.version import __version__

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: The fact of a rank that could not even tell its facts.
ERROR = "error at start-up"
_NOT_THERE = "(nothing said)"
#: Characters of a value that are printed; its digest tells the rest apart.
_PRINTED = 300


def check_agreement(
    group: ProcessGroup | None, facts: Mapping[str, str], *, device_type: str | None = None, timeout: float = 300.0
) -> None:
    """Compare `facts` and what selection depends on among the ranks of a group. One rank has nothing to compare.

    Compared are the OSPNEXT_* variables, the policy, versions, device, and for every contract the implementations that
    its cases get on `device_type` (default: that of the policy's backend). No collective is called.

    Raises:
        DisagreementError: a fact differs; the same message on every rank. A rank whose policy is wrong, or whose
            backend cannot run, counts as one that differs; where that is so on all, they raise that error.
        CollectiveError: ranks did not come within `timeout` seconds; it names them.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    failure: Exception | None = None
    try:
        mine = dict(facts_of_this_rank(device_type)) | dict(facts)
    except Exception as error:  # raised below, on every rank
        failure, mine = error, {ERROR: f"{type(error).__name__}: {error}"}
    text = json.dumps(mine, sort_keys=True)
    if len(set(meet("agreement", _digest(text), group, timeout))) == 1:
        if failure is not None:
            raise failure
        return
    everyone = [json.loads(one) for one in meet("disagreement", text, group, timeout)]
    with contextlib.suppress(CollectiveError):  # who has left already, and perhaps taken the store along, knew all
        meet("end of the disagreement", "", group, timeout)  # no rank may leave before all know
    raise DisagreementError(_differences(everyone, dist.get_process_group_ranks(group))) from failure


def facts_of_this_rank(device_type: str | None = None) -> Iterator[tuple[str, str]]:
    """What selection and results depend on, as (name, value)."""
    policy, known, variables = current_policy(), registry(), variables_set()
    for name in VARIABLES:
        yield name, variables.get(name, "not set")
    yield "policy", str(policy)
    if policy.tuning is not None:
        yield "times of the tuning file", _digest(json.dumps(policy.tuning.requests, sort_keys=True, default=dict))
    available = [f"{m.backend}{'' if known.probe(m.backend).available else ' (cannot run)'}" for m in known.ordered()]
    yield "backends", ", ".join([*available, *(f"{name} (did not load)" for name in sorted(known.failures))])
    device_type = device_type or default_device().type
    yield "device type", device_type
    yield "version of ospnext", __version__
    yield "version of python", platform.python_version()
    backend = auto_backend(device_type, known) if policy.backend == AUTO else policy.backend
    machine = machine_of(backend, known) if backend else None
    if machine is not None:
        # A CPU's description counts threads, on which no result may depend.
        yield "device", platform.machine() if device_type == "cpu" else machine.device
        for name, version in sorted(machine.versions.items()):
            yield f"version of {name}", version
    for contract in CONTRACTS:
        yield f"implementations of {contract}", _decisions(contract, device_type, policy)


def _decisions(name: str, device_type: str, policy: Policy) -> str:
    """Which implementation takes how many of the contract's cases, and a digest of which takes which."""
    contract = CONTRACTS[name]
    chosen = [
        str(select(contract, dataclasses.replace(case.request, device_type=device_type), policy, registry()).chosen_id)
        for case in contract.cases()
    ]
    counted = ", ".join(f"{one} for {n}" for one, n in Counter(chosen).most_common())
    return f"{counted} of {len(chosen)} cases ({_digest(' '.join(chosen))[:8]})"


def _differences(everyone: list[dict[str, str]], ranks: list[int]) -> str:
    """A line per value of every fact that is not the same on all. Facts of a rank that failed are not missed."""
    lines = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        holders: dict[str, list[int]] = {}
        for rank, facts in zip(ranks, everyone, strict=True):
            if name == ERROR or ERROR not in facts:
                holders.setdefault(facts.get(name, _NOT_THERE), []).append(rank)
        if name == ERROR:
            holders.pop(_NOT_THERE, None)
        elif len(holders) == 1:
            continue
        lines += [f"  {name}", *(f"    {names_of(held)}: {_shortened(value)}" for value, held in holders.items())]
    return "\n".join(
        [
            f"{names_of(ranks)} do not agree, and would compute different things or wait for each other forever:",
            *lines,
            "Start every rank with the same environment, packages and configuration.",
        ]
    )


def _shortened(value: str) -> str:
    line = " | ".join(value.splitlines())
    return line if len(line) <= _PRINTED else f"{line[:_PRINTED]}... ({_digest(value)[:8]})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
