"""Every check there is, in order, with an id that never changes: cases of contracts crossed with layouts and modes,
invariants, refusals, ranks and whole models. `data/must_pass.txt` lists the ids; a test holds the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

from ospnext.errors import ConfigError
from ospnext.ops.contract import Case, Contract
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.registry import Manifest, load

from . import by_ranks, invariants, models, modes, selection
from .check import Check
from .layouts import LAYOUTS, changes_values

LEVELS = ("required", "optional", "extension")


def all_checks(manifest: Manifest | None = None) -> list[Check]:
    """Every check, those of the backend's own extension cases included."""
    found = [check for contract in CONTRACTS.values() for check in _of_contract(contract, contract.cases())]
    found += [*invariants.checks(), *selection.checks(), *by_ranks.checks(), *models.checks()]
    if manifest is not None and manifest.cases:
        found += _extensions(manifest)
    ids = [check.id for check in found]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"two checks share an id: {sorted({i for i in ids if ids.count(i) > 1})}")
    return found


def select_checks(checks: Iterable[Check], levels: Iterable[str], patterns: Iterable[str]) -> list[Check]:
    """Those of the given levels whose id matches one of the shell-style patterns (none: all).

    Raises:
        ConfigError: a level is unknown, or a pattern matches nothing.
    """
    checks, levels, patterns = list(checks), list(levels), list(patterns)
    for level in levels or [""]:
        if level not in LEVELS:
            raise ConfigError(f"unknown level {level!r}; levels: {', '.join(LEVELS)}")
    for pattern in patterns:
        if not any(fnmatchcase(check.id, pattern) for check in checks):
            raise ConfigError(f"no check matches {pattern!r}; `ospnext conformance list` prints all {len(checks)}")
    return [
        check
        for check in checks
        if check.level in levels and (not patterns or any(fnmatchcase(check.id, p) for p in patterns))
    ]


def shard(checks: list[Check], index: int, count: int) -> list[Check]:
    """Part `index` (from 1) of `count`. Checks that share an oracle stay together."""
    groups = list(dict.fromkeys(check.group or check.id for check in checks))
    mine = set(groups[index - 1 :: count])
    return [check for check in checks if (check.group or check.id) in mine]


def _of_contract(contract: Contract, cases: Iterable[Case]) -> Iterator[Check]:
    """Each case eagerly; a crossed one in every layout and mode as well."""
    if contract.by_ranks:
        return  # run by several processes: see by_ranks.py
    for case in cases:
        yield _check(contract, case, "", modes.eager)
        if getattr(case.request, "deterministic", False):
            yield _check(contract, case, "repeated", modes.repeated)
        if not case.crossed:
            continue
        for name, mode in modes.MODES.items():
            if mode is modes.opcheck and contract.library_calls is None:
                continue  # a composition of other contracts, whose ops are checked there
            yield _check(contract, case, name, mode)
        for layout in LAYOUTS:
            if layout == "expanded_grad" and not _has_gradient(case):
                continue
            yield _check(contract, replace(case, layout=layout), layout, modes.eager)


def _has_gradient(case: Case) -> bool:
    """Asked for by the request; or by the case alone, where gradients are no matter of kernels."""
    return getattr(case.request, "backward", case.options.get("backward", False))


def _check(contract: Contract, case: Case, suffix: str, mode) -> Check:
    identifier = f"{case.id}-{suffix}" if suffix else case.id
    if changes_values(case.layout):
        case = replace(case, id=identifier)  # other values: an expectation of its own
    return Check(
        id=identifier,
        level=case.level,
        run=functools.partial(mode, contract, case),
        contract=contract,
        request=case.request,
        group=case.id,
        costly=case.costly,
    )


def _extensions(manifest: Manifest) -> Iterator[Check]:
    for case in load(manifest.cases)():
        contract = CONTRACTS.get(case.id.split("/")[0])
        if contract is None or case.level != "extension" or case.id.split("/")[1] != "extension":
            raise ConfigError(
                f"{manifest.cases} yields {case.id!r}: an extension case has level 'extension' and an id "
                f"'<contract>/extension/<name>' with one of the contracts {', '.join(CONTRACTS)}"
            )
        yield from _of_contract(contract, [case])
