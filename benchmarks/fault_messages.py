"""What ranks print when something is wrong, and how long it takes until all have ended.

    python benchmarks/fault_messages.py --out benchmarks/results/fault_messages.txt
    python benchmarks/fault_messages.py --fault raises
    python benchmarks/fault_messages.py --device cuda --ranks 2 --timeout 15 --fault killed --fault stuck

Ranks are processes of this machine, over gloo or the transport of their devices, and the faults those of
tests/test_parallel_faults.py. Frames of tracebacks are left out; paths, ports and clocks are placeholders. The first
collective on devices sets up their transport, which takes seconds: give it more time than gloo needs."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import failing_ranks  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from rank_processes import LIMIT, Ended, run_ranks  # noqa: E402

from ospnext.models import preset  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """`timeout` is how many seconds a collective may take; 1800 in `ospnext generate` (`parallel.timeout`)."""

    ranks: int = 3
    timeout: float = 2.0
    device: str = "cpu"

    def run(self, function: Callable[..., Any], *arguments: Any, missing: int = 0, **options: Any) -> list[Ended]:
        options = {"timeout": self.timeout, "limit": LIMIT + 4 * self.timeout, "device_type": self.device} | options
        return run_ranks(function, self.ranks - missing, *arguments, missing=missing, **options)

    @property
    def facts(self) -> list[dict[str, str]]:
        return [{}] * self.ranks


def at_work(fault: str, of: Setting) -> list[Ended]:
    """Ranks that watch each other, in the middle of steps; the last one has the fault."""
    return of.run(failing_ranks.steps, fault, of.timeout, -1, of.device)


def started_with(of: Setting, **variables: str) -> list[Ended]:
    """Rank 1 alone has these."""
    return of.run(failing_ranks.check, of.facts, environ={1: variables}, timeout=30.0)


def other_model(of: Setting) -> list[Ended]:
    configs = [preset("tiny"), preset("tiny").replace(num_full_blocks=0), *[preset("tiny")] * (of.ranks - 2)]
    facts = [{f"transformer.{k}": str(v) for k, v in dataclasses.asdict(config).items()} for config in configs]
    return of.run(failing_ranks.check, facts, timeout=30.0)


def not_started(of: Setting) -> list[Ended]:
    return of.run(failing_ranks.check, of.facts, missing=1)


#: `{last}` is the last rank.
FAULTS: dict[str, tuple[str, Callable[[Setting], list[Ended]]]] = {
    "killed": ("Rank {last} is killed in mid-step (SIGKILL)", partial(at_work, "killed")),
    "raises": ("Rank {last} raises", partial(at_work, "raises")),
    "stuck": ("Rank {last} hangs outside of collectives", partial(at_work, "stuck")),
    "other_operation": ("Rank {last} is in another collective", partial(at_work, "other_operation")),
    "backend": ("Rank 1 has another OSPNEXT_BACKEND", partial(started_with, OSPNEXT_BACKEND="reference")),
    "ops": ("Rank 1 has another OSPNEXT_OPS", partial(started_with, OSPNEXT_OPS="attention=reference.math")),
    "config": ("Rank 1 has another model", other_model),
    "not_started": ("Rank {last} does not start", not_started),
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
    (r"\b0x[0-9a-f]{6,}", "0x<n>"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--ranks", type=int, default=3, help="(default: 3)")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds that a collective may take (default: 2)")
    parser.add_argument("--device", default="cpu", help="type of device, of which each rank has one (default: cpu)")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    setting = Setting(arguments.ranks, arguments.timeout, arguments.device)
    text = "\n".join(report(arguments.fault or list(FAULTS), setting)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(faults: list[str], of: Setting) -> Iterator[str]:
    versions = f"torch {torch.__version__}, python {platform.python_version()}"
    transport = dist.get_default_backend_for_device(of.device)
    yield f"{of.ranks} ranks over {transport}, {versions}; a collective may take {of.timeout:g} s."
    yield "Seconds count from when the ranks have found each other, or where they do not, from their start."
    for fault in faults:
        title, provoke = FAULTS[fault]
        yield from ("", f"==== {title.format(last=of.ranks - 1)}", *transcript(provoke(of)))


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
