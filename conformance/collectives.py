"""Collectives among real processes: every case of the contract, on as many ranks as it says, each rank judged alone.

The cases of one number of ranks share a launch of processes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from ospnext.ops.contract import Case
from ospnext.ops.contracts.collective import CONTRACT
from ospnext.ops.registry import Manifest, registry
from ospnext.ops.tolerance import Verdict

from .check import Check, CheckFailure, Target
from .ranks import LIMITS, Job, Limits, Outcome, run_cases


def checks(limits: Limits = LIMITS) -> Iterator[Check]:
    for case in CONTRACT.cases():
        yield Check(
            id=case.id,
            level=case.level,
            run=functools.partial(_run, case, limits),
            contract=CONTRACT,
            request=case.request,
            group=f"collective-r{case.request.ranks}",
        )


def _run(case: Case, limits: Limits, target: Target) -> Mapping[str, Verdict]:
    outcome = _outcomes(target, case.request.ranks, limits)[case.id]
    if isinstance(outcome, str):
        raise CheckFailure(outcome)
    expected = CONTRACT.expect(CONTRACT.inputs(case), exact=True)
    try:
        return expected.judge({f"rank{rank}": out for rank, out in enumerate(outcome)})
    except ValueError as error:
        raise CheckFailure(str(error)) from error


#: The declarations that a launch was made with, and what came of it.
_launched: dict[tuple[Target, int, Limits], tuple[Manifest, Mapping[str, Outcome]]] = {}


def _outcomes(target: Target, ranks: int, limits: Limits) -> Mapping[str, Outcome]:
    manifest, key = registry().manifests[target.backend], (target, ranks, limits)
    if key not in _launched or _launched[key][0] != manifest:
        if target.implementation is None:
            raise ValueError("a collective check is run on one implementation: the target must name it")
        job = Job(CONTRACT.name, manifest, target.implementation, target.device.type, ranks, limits)
        cases = [case for case in CONTRACT.cases() if case.request.ranks == ranks]
        _launched[key] = (manifest, run_cases(job, cases))
    return _launched[key][1]
