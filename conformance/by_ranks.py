"""Contracts that hold among real processes: every case on as many ranks as it says, each rank judged alone.

The cases of one contract and number of ranks share a launch of processes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from ospnext.ops.contract import Case, Contract
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.registry import Manifest, registry
from ospnext.ops.tolerance import Verdict

from .check import Check, CheckFailure, Target
from .ranks import LIMITS, Job, Limits, Outcome, run_cases


def checks(limits: Limits = LIMITS) -> Iterator[Check]:
    for contract in (contract for contract in CONTRACTS.values() if contract.by_ranks):
        for case in contract.cases():
            yield Check(
                id=case.id,
                level=case.level,
                run=functools.partial(_run, contract, case, limits),
                contract=contract,
                request=case.request,
                group=f"{contract.name}-r{case.request.ranks}",
            )


def _run(contract: Contract, case: Case, limits: Limits, target: Target) -> Mapping[str, Verdict]:
    outcome = _outcomes(contract, target, case.request.ranks, limits)[case.id]
    if isinstance(outcome, str):
        raise CheckFailure(outcome)
    expected = contract.expect(contract.inputs(case), exact=True)
    try:
        return expected.judge({f"rank{rank}": out for rank, out in enumerate(outcome)})
    except ValueError as error:
        raise CheckFailure(str(error)) from error


#: The declarations that a launch was made with, and what came of it.
_launched: dict[tuple[str, Target, int, Limits], tuple[Manifest, Mapping[str, Outcome]]] = {}


def _outcomes(contract: Contract, target: Target, ranks: int, limits: Limits) -> Mapping[str, Outcome]:
    manifest, key = registry().manifests[target.backend], (contract.name, target, ranks, limits)
    if key not in _launched or _launched[key][0] != manifest:
        if target.implementation is None:
            raise ValueError("a check by ranks is run on one implementation: the target must name it")
        job = Job(contract.name, manifest, target.implementation, target.device.type, ranks, limits)
        cases = [case for case in contract.cases() if case.request.ranks == ranks]
        _launched[key] = (manifest, run_cases(job, cases))
    return _launched[key][1]
