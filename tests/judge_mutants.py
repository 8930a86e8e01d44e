"""Judges mutants in a process of its own, where their kernels can be loaded: python judge_mutants.py MODULE NAME...

MODULE has dictionaries NAME of mutants. Prints one JSON object: name of a mutant -> id of a check -> [status, message].
"""

from __future__ import annotations

import importlib
import json
import sys

import torch
from mutant import Mutant

from ospnext.conformance.matrix import all_checks
from ospnext.conformance.runner import default_device, plan, run_step
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry

CHECKS = {check.id: check for check in all_checks()}


def judge(mutant: Mutant) -> dict[str, tuple[str, str]]:
    backend = mutant.manifest.backend
    checks = [CHECKS[i] for i in (*mutant.kills, *mutant.spares)]
    with use_registry(Registry([mutant.manifest])):
        device = default_device(backend)
        results = [run_step(step, backend, device) for step in plan(checks, backend, device)]
    return {result.id: (result.status, result.message) for result in results}


if __name__ == "__main__":
    torch.set_num_threads(1)
    module = importlib.import_module(sys.argv[1])
    mutants = {name: mutant for group in sys.argv[2:] for name, mutant in getattr(module, group).items()}
    print(json.dumps({name: judge(mutant) for name, mutant in mutants.items()}))
