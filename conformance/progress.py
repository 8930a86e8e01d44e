"""A progress bar on standard error; nothing at all where that is no terminal."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

WIDTH = 24


class Progress:
    """`with Progress(n) as bar: bar.advance("what comes next")`."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total, self.done, self.wrong = total, 0, 0
        self._stream = sys.stderr if stream is None else stream
        self._shown, self._started = self._stream.isatty(), time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def advance(self, *, ok: bool, label: str) -> None:
        """One step is done; `label` names it."""
        self.done, self.wrong = self.done + 1, self.wrong + (not ok)
        if not self._shown:
            return
        filled = WIDTH * self.done // max(1, self.total)
        failed = f"  {self.wrong} failed" if self.wrong else ""
        bar, seconds = "#" * filled + "." * (WIDTH - filled), time.monotonic() - self._started
        line = f"[{bar}] {self.done}/{self.total}{failed}  {seconds:.0f} s  {label}"
        self._stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
