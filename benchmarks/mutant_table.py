"""Every check on every broken backend: which faults the suite finds, and which checks have never found one.

    .venv/bin/python benchmarks/mutant_table.py [--case GLOB ...] [--mutant GLOB ...] [--contract GLOB ...]
        [--jobs 2] [--long] [--unseen]

A mutant is judged by the checks of its own contract, of the models and of the manifest; collectives have their own
broken backends in tests/test_collective.py. Writes benchmarks/results/mutants.md."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from broken_kernels import MUTANTS, UNSEEN, Mutant  # noqa: E402

from ospnext.conformance.check import Check  # noqa: E402
from ospnext.conformance.matrix import all_checks, select_checks  # noqa: E402
from ospnext.conformance.runner import plan, run_step  # noqa: E402
from ospnext.ops.contracts import CONTRACTS  # noqa: E402
from ospnext.ops.policy import use_registry  # noqa: E402
from ospnext.ops.registry import Registry  # noqa: E402

#: Video-length attention takes most of the time; `--long` asks for it.
LONG = "attention/*k75600*"
#: The whole square of a video is a thousand times more than that, for any mutant; never run here.
NEVER = "attention/*q75600-k75600*"
ALL = MUTANTS | UNSEEN

#: What a mutant of a kernel can be found by, beside its own contract.
SHARED = ("model/", "selection/")
#: No model of the suite is quantized, but contracts of the family are made of each other.
QUANTIZE = (*(f"{c.name}/" for c in CONTRACTS.values() if c.family == "quantize"), "selection/")
BAD = ("fail", "error")


def concerned(mutant: Mutant, checks: list[Check]) -> list[Check]:
    prefixes = QUANTIZE if f"{mutant.contract}/" in QUANTIZE else (f"{mutant.contract}/", *SHARED)
    if any(i.startswith("selection/") for i in mutant.kills):
        prefixes = ("selection/",)
    return [check for check in checks if check.id.startswith(prefixes)]


def chosen(patterns: list[str], long: bool) -> list[Check]:
    checks = select_checks(all_checks(), ("required", "optional"), patterns)
    left_out = (NEVER,) if long else (NEVER, LONG)
    return [c for c in checks if not any(fnmatchcase(c.id, pattern) for pattern in left_out)]


def matches(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def judge(name: str, patterns: list[str], long: bool) -> tuple[str, dict[str, str], float]:
    """Name of the mutant, status by check, seconds. Runs in a process of its own."""
    torch.set_num_threads(1)
    started, mutant = time.perf_counter(), ALL[name]
    backend, device = mutant.manifest.backend, torch.device("cpu")
    statuses: dict[str, str] = {}
    with use_registry(Registry([mutant.manifest])):
        for step in plan(concerned(mutant, chosen(patterns, long)), backend, device):
            result = run_step(step, backend, device)
            if statuses.get(result.id) not in BAD:
                statuses[result.id] = result.status
    return name, statuses, time.perf_counter() - started


def table(found: dict[str, dict[str, str]]) -> list[str]:
    lines = ["| Mutant | Fault | Finds it | of | for example |", "|---|---|---|---|---|"]
    for name, statuses in found.items():
        mutant = ALL[name]
        bad = [i for i, status in statuses.items() if status in BAD]
        examples = "<br>".join(f"`{i}`" for i in _spread(bad)) or "**nothing**"
        lines.append(f"| `{name}` | {mutant.fault} | {len(bad)} | {len(statuses)} | {examples} |")
    return lines


def _spread(ids: list[str], count: int = 3) -> list[str]:
    """The first, a middle and the last one."""
    return ids if len(ids) <= count else [ids[0], ids[len(ids) // 2], ids[-1]]


def idle(found: dict[str, dict[str, str]]) -> list[str]:
    """Checks that were run and found nothing, by contract, with the sentence that the contract begins with."""
    ran, kills = dict[str, int](), set[str]()
    for statuses in found.values():
        for i, status in statuses.items():
            ran[i] = ran.get(i, 0) + 1
            if status in BAD:
                kills.add(i)
    groups: dict[str, list[str]] = defaultdict(list)
    for i in ran:
        if i not in kills:
            groups["/".join(i.split("/")[:2])].append(i)
    if not groups:
        return ["None."]
    lines = []
    for prefix, ids in groups.items():
        contract = CONTRACTS.get(prefix.split("/")[0])
        guarded = f": {' '.join(contract.meaning.split('.')[0].split())}." if contract else ""
        lines += [f"**{prefix}** ({len(ids)}){guarded}", "", *(f"- `{i}` ({ran[i]} mutants)" for i in ids), ""]
    return lines


def markdown(found: dict[str, dict[str, str]], command: str) -> str:
    missed = [n for n, s in found.items() if not any(status in BAD for status in s.values())]
    checks = set(itertools.chain.from_iterable(found.values()))
    head = [
        "# Broken backends and the checks that find them",
        "",
        f"`{command}`: {len(found)} mutants, {len(checks)} checks. Found by no check that was run: "
        f"{', '.join(f'`{n}`' for n in missed) or 'none'}.",
        "",
    ]
    return "\n".join([*head, *table(found), "", "## Checks that found no mutant", "", *idle(found)]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", default=[], help="glob on check ids; may be repeated")
    parser.add_argument("--mutant", action="append", default=[], help="glob on mutants; may be repeated")
    parser.add_argument("--contract", action="append", default=[], help="glob on what mutants break; may be repeated")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--long", action="store_true", help="attention of 75,600 keys, too")
    parser.add_argument("--unseen", action="store_true", help="only those that nothing has found so far")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "mutants.md")
    args = parser.parse_args()
    names = [
        name
        for name, mutant in (UNSEEN if args.unseen else ALL).items()
        if matches(name, args.mutant) and matches(mutant.contract, args.contract)
    ]
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    spawn = get_context("spawn")  # a forked PyTorch may hang in its thread pools
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        tasks = [pool.submit(judge, name, args.case, args.long) for name in names]
        for count, task in enumerate(as_completed(tasks), 1):
            name, found[name], seconds = task.result()
            bad = sum(status in BAD for status in found[name].values())
            line = f"[{count}/{len(names)}] {name}: {bad} of {len(found[name])} checks fail, {seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/mutant_table.py", *sys.argv[1:]])
    args.out.write_text(markdown({n: s for n, s in found.items() if s}, command))
    print(args.out)


if __name__ == "__main__":
    main()
