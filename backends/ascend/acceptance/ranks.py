"""Processes that work together for one item: how they end, and what they printed. What they compute is in the file of
the item."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import IO

#: Seconds between two looks, and the end of an output that is kept, in characters.
PAUSE, KEPT = 0.1, 500
#: Seconds that others get to end by themselves, and say why, once one has failed.
GRACE = 2.0


def failures(commands: Sequence[Sequence[str]], limit: float) -> dict[str, str]:
    """What was printed, by rank, where one of `commands` fails; nothing where all exit with 0.

    The others wait for one that failed, so that they are ended soon after it.

    Raises:
        RuntimeError: after `limit` seconds one had not ended; the text has what each printed.
    """
    with contextlib.ExitStack() as stack:
        # Files, not pipes: nobody reads meanwhile, and a full pipe would stop a rank.
        files = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        ranks: list[subprocess.Popen[str]] = []
        stack.callback(_end, ranks)
        for command, file in zip(commands, files, strict=True):
            ranks.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True))
        deadline, failed = time.monotonic() + limit, False
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes) and not failed:
                deadline, failed = time.monotonic() + GRACE, True
            if time.monotonic() > deadline:
                if failed:
                    break
                _end(ranks)
                said = "; ".join(f"{who}: {text}" for who, text in _said(codes, files).items())
                raise RuntimeError(f"not all {len(commands)} ranks ended in {limit:.0f} s. {said}")
            time.sleep(PAUSE)
        _end(ranks)
        return _said(codes, files) if any(codes) else {}


def _end(ranks: Sequence[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        rank.kill()
        rank.wait()


def _said(codes: Sequence[int | None], files: Sequence[IO[str]]) -> dict[str, str]:
    found = {}
    for rank, (code, file) in enumerate(zip(codes, files, strict=True)):
        file.seek(0)
        state = "was still at work" if code is None else f"exit code {code}"
        found[f"rank {rank}, {state}"] = file.read().strip()[-KEPT:] or "printed nothing"
    return found
