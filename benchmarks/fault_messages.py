"""What ranks print when something is wrong, and how long it takes until all have ended.

    python benchmarks/fault_messages.py --out benchmarks/results/fault_messages.txt
    python benchmarks/fault_messages.py --fault raises

Ranks are processes of this machine over gloo, and the faults those of tests/test_parallel_faults.py. Frames of
tracebacks are left out; paths, ports and clocks are placeholders."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import failing_ranks  # noqa: E402
import torch  # noqa: E402
from rank_processes import Ended, run_ranks  # noqa: E402

from ospnext.models import preset  # noqa: E402

#: Seconds that a collective may take; 1800 in `ospnext generate` (`parallel.timeout`).
TIMEOUT = 2.0
RANKS = 3


def at_work(fault: str) -> list[Ended]:
    """Ranks that watch each other, in the middle of steps; the last one has the fault."""
    return run_ranks(failing_ranks.steps, RANKS, fault, TIMEOUT, timeout=TIMEOUT)


def started_with(**variables: str) -> list[Ended]:
    """Rank 1 alone has these."""
    return run_ranks(failing_ranks.check, RANKS, [{}] * RANKS, environ={1: variables})


def other_model() -> list[Ended]:
    configs = [preset("tiny"), preset("tiny").replace(num_full_blocks=0), preset("tiny")]
    facts = [{f"transformer.{k}": str(v) for k, v in dataclasses.asdict(config).items()} for config in configs]
    return run_ranks(failing_ranks.check, RANKS, facts)


def not_started() -> list[Ended]:
    return run_ranks(failing_ranks.check, RANKS - 1, [{}] * RANKS, timeout=TIMEOUT, missing=1)


FAULTS: dict[str, tuple[str, Callable[[], list[Ended]]]] = {
    "killed": ("Rank 2 is killed in mid-step (SIGKILL)", lambda: at_work("killed")),
    "raises": ("Rank 2 raises", lambda: at_work("raises")),
    "stuck": ("Rank 2 hangs outside of collectives", lambda: at_work("stuck")),
    "other_operation": ("Rank 2 is in another collective", lambda: at_work("other_operation")),
    "backend": ("Rank 1 has another OSPNEXT_BACKEND", lambda: started_with(OSPNEXT_BACKEND="reference")),
    "ops": ("Rank 1 has another OSPNEXT_OPS", lambda: started_with(OSPNEXT_OPS="attention=reference.math")),
    "config": ("Rank 1 has another model", other_model),
    "not_started": ("Rank 2 does not start", not_started),
}

#: What differs from run to run, and what stands for it.
PLACEHOLDERS = (
    (r"(?m)^  File .*\n(    .*\n)*", ""),  # frames of Python
    (r"(?m)^(Exception raised from|frame #).*\n", ""),  # and of C++
    (r"(?m)^(Process ForkServerProcess-|<omitting python frames>).*\n", ""),
    (r"\bfd=\d+", "fd=<n>"),
    (r"\[([WEI])\d{4} [\d:.]+ ", r"[\1<clock> "),
    (r"/[\w.+/-]+/([\w.-]+)", r"<path>/\1"),
    (r"\]:\d+\b", "]:<port>"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    text = "\n".join(report(arguments.fault or list(FAULTS))) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(faults: list[str]) -> Iterator[str]:
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    yield f"{RANKS} ranks over gloo, {versions}; a collective may take {TIMEOUT:g} s."
    yield "Seconds count from when the ranks have found each other, or where they do not, from their start."
    for fault in faults:
        title, provoke = FAULTS[fault]
        yield from ("", f"==== {title}", *transcript(provoke()))


def transcript(ended: list[Ended]) -> Iterator[str]:
    """Ranks that print the same are told together."""
    said: dict[str, list[int]] = {}
    for rank, one in enumerate(ended):
        said.setdefault(placeholders(one.stderr), []).append(rank)
    for text, ranks in said.items():
        yield ""
        for rank in ranks:
            yield f"rank {rank} ended after {ended[rank].seconds:.1f} s with {_code(ended[rank].exit_code)}"
        yield from (f"  | {line}".rstrip() for line in text.splitlines() or ["(nothing)"])
    yield ""
    left = sum(one.exit_code is None for one in ended)
    yield f"all had ended after {max(one.seconds for one in ended):.1f} s; processes left: {left}"


def placeholders(text: str) -> str:
    for pattern, instead in PLACEHOLDERS:
        text = re.sub(pattern, instead, text)
    return text


def _code(code: int | None) -> str:
    if code is None:
        return "no exit code: it had to be killed"
    return f"exit code {code}" if code >= 0 else f"{signal.Signals(-code).name}"


if __name__ == "__main__":
    main()
