"""The suite is itself tested: a backend that is broken on purpose is found, by the checks that are there to find it,
for the reason that it is broken, and by no check that has nothing to do with the fault.
"""

from __future__ import annotations

import pytest
import torch
from broken_kernels import MUTANTS

from ospnext.conformance.check import Result
from ospnext.conformance.matrix import all_checks
from ospnext.conformance.runner import plan, run_step
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Manifest, Registry

CPU = torch.device("cpu")
CHECKS = {check.id: check for check in all_checks()}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small: on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def results(manifest: Manifest, *ids: str) -> list[Result]:
    with use_registry(Registry([manifest])):
        return [run_step(s, manifest.backend, CPU) for s in plan([CHECKS[i] for i in ids], manifest.backend, CPU)]


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_finds(name):
    mutant = MUTANTS[name]
    for result in results(mutant.manifest, *mutant.kills):
        assert result.status == mutant.status, f"{result.id} lets it pass"
        assert mutant.says in result.message, f"{result.id}: {result.message}"
    for result in results(mutant.manifest, *mutant.spares):
        assert result.status == "pass", f"{result.id} has nothing to do with it: {result.message}"


def test_every_fault_is_said():
    assert [name for name, mutant in MUTANTS.items() if not mutant.fault or not mutant.kills] == []
