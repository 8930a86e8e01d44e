"""The transcript of what ranks print when something is wrong: as committed, and as its script writes it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "fault_messages.py"
COMMITTED = BENCHMARKS / "results" / "fault_messages.txt"

#: Fault -> what is said of it, and how many ranks say so.
SAID = {
    "Rank 2 is killed in mid-step (SIGKILL)": (r"CollectiveError: \w+ among ranks .*: rank 2 is not in it", 2),
    "Rank 2 raises": ("the first to end was rank 2: ValueError: no such video: clip_17.mp4", 2),
    "Rank 2 hangs outside of collectives": ("rank 2: all_reduce, its collective 9 of the group: left it", 3),
    "Rank 2 is in another collective": ("rank 2: all_gather, its collective 10 of the group: in it", 3),
    "Rank 1 has another OSPNEXT_BACKEND": (r"OSPNEXT_BACKEND\n .* ranks 0, 2: not set\n .* rank 1: reference\n", 3),
    "Rank 1 has another OSPNEXT_OPS": (r"OSPNEXT_OPS\n .* ranks 0, 2: not set\n .* rank 1: attention=", 3),
    "Rank 1 has another model": (r"transformer.num_full_blocks\n .* ranks 0, 2: 4\n .* rank 1: 0\n", 3),
    "Rank 2 does not start": (r"2/3 clients joined|wait timeout", 2),
}
ENDED = re.compile(r"rank (\d) ended after ([\d.]+) s with (.*)")


def sections(text: str) -> dict[str, str]:
    """Body by title."""
    _, *parts = text.split("\n==== ")
    return dict(part.split("\n", 1) for part in parts)


def check(title: str, body: str) -> None:
    pattern, times = SAID[title]
    blocks = re.split(r"\n\n(?=rank)", body)
    saying = [ENDED.findall(block) for block in blocks if re.search(pattern, block)]
    assert sum(map(len, saying)) == times, body
    ended = ENDED.findall(body)
    assert [rank for rank, _, _ in sorted(ended)] == ["0", "1", "2"][: 2 if "start" in title else 3]
    assert {how for _, _, how in ended} <= {"exit code 1", "SIGTERM", "SIGKILL"}
    assert ("SIGKILL" in {how for _, _, how in ended}) is ("SIGKILL" in title)
    last = re.search(r"all had ended after ([\d.]+) s; processes left: (\d+)\n", body)
    assert last and last[2] == "0"
    assert float(last[1]) == max(float(seconds) for _, seconds, _ in ended) < 18
    assert not re.search(r"[\w>]:\d{4,}|/home|/tmp|/root|\.py\b", body)  # ports, paths, frames


@pytest.mark.parametrize("title", SAID)
def test_the_committed_transcript(title: str) -> None:
    check(title, sections(COMMITTED.read_text())[title])


def test_the_committed_transcript_has_every_fault() -> None:
    assert sections(COMMITTED.read_text()).keys() == SAID.keys()


def test_the_script_writes_it(tmp_path: Path) -> None:
    faults = {"raises": "Rank 2 raises", "not_started": "Rank 2 does not start"}
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out.txt"), *(f"--fault={name}" for name in faults)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    found = sections((tmp_path / "out.txt").read_text())
    assert list(found) == list(faults.values())
    for title, body in found.items():
        check(title, body)


def test_what_differs_from_run_to_run_is_a_placeholder() -> None:
    script = runpy.run_path(str(SCRIPT), run_name="fault_messages")
    printed = (
        "Process ForkServerProcess-22:\nTraceback (most recent call last):\n"
        '  File "/somewhere/a.py", line 3, in f\n    call(\n    ^^^^^\n'
        "RuntimeError: [/b/c/pair.cc:553] Connection closed by peer [127.0.0.1]:45678. fd=7, 2000ms\n"
        "[W1130 18:20:01.5 socket.cpp:469] addr=[::1]:4711\n"
    )
    assert script["placeholders"](printed) == (
        "Traceback (most recent call last):\n"
        "RuntimeError: [<path>/pair.cc:553] Connection closed by peer [127.0.0.1]:<port>. fd=<n>, 2000ms\n"
        "[W<clock> socket.cpp:469] addr=[::1]:<port>\n"
    )
