"""`watch`: a job of several ranks ends as a whole, and every rank says why. A thread per rank tells the store of the job
that the rank lives and which collective it is in; nothing is added to a collective but a note of its name.

    with collective.watch(timeout=600):
        train()

What ends a job: a collective that fails, one that is not done in time on its device, a rank that leaves the block by an
exception, and one that gives no sign of life. Each rank is then given a moment to end by itself, and ended as a launcher
would: SIGTERM, then SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ospnext.ops.group_store import meet

_in_force: watch | None = None


def watch_in_force() -> watch | None:
    return _in_force


@dataclass(frozen=True)
class Place:
    """Where this rank is in the collectives of one group: the `count`-th, since `since` (monotonic seconds)."""

    count: int
    operation: str
    inside: bool
    since: float

    def as_text(self) -> str:
        seconds = time.monotonic() - self.since
        state = f"in it for {seconds:.1f} s" if self.inside else f"left it {seconds:.1f} s ago"
        return f"{self.operation}, its collective {self.count} of the group: {state}"


class watch:
    """While the block runs, the ranks of the job watch each other. On one rank it does nothing.

    Args:
        timeout: seconds that a collective may take and a rank may be silent. The process groups have the same as their
            own timeout, `init_process_group(timeout=...)`.
        period: seconds between two signs of life.

    Raises:
        CollectiveError: at the end of the block, if other ranks do not reach its end within `timeout`.
        RuntimeError: another watch is in force.
    """

    def __init__(self, timeout: float, *, period: float | None = None) -> None:
        self.timeout = timeout
        self.period = min(1.0, timeout / 10) if period is None else period
        #: Seconds that a rank is given to end by itself.
        self.parting = min(5.0, timeout)
        self.active = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._places: dict[str, Place] = {}
        #: Calls on a device that it had not finished when last asked: (place, group, event behind it).
        self._queued: deque[tuple[Place, str, Any]] = deque()
        self._stop = threading.Event()

    def __enter__(self) -> watch:
        global _in_force
        if _in_force is not None:
            raise RuntimeError("a watch is in force already; one watches all groups of the job")
        if self.active:
            self._store = dist.group.WORLD.get_group_store().clone()  # type: ignore[union-attr]
            self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
            self._beats, self._seen = 0, (0, time.monotonic())
            self._beat()
            meet("start of the watch", "", None, self.timeout)
            self._thread = threading.Thread(target=self._run, name="ospnext-watch", daemon=True)
            self._thread.start()
            _in_force = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        global _in_force
        if not self.active:
            return
        try:
            if error is None or (isinstance(error, SystemExit) and not error.code):
                meet("end of the watch", "", None, self.timeout)
            else:
                self.report(f"{type(error).__name__}: {error}")
        finally:
            _in_force = None
            self._stop.set()

    # ---- what the collectives tell

    def enter(self, group: str, operation: str) -> None:
        """This rank is in its next collective of the group."""
        last = self._places.get(group)
        self._places[group] = Place(last.count + 1 if last else 1, operation, True, time.monotonic())

    def leave(self, group: str, device: torch.device) -> None:
        """It is out of it; a device may have to finish it still."""
        last = self._places[group]
        self._places[group] = Place(last.count, last.operation, False, time.monotonic())
        if device.type != "cpu" and (event := _event_behind(device)) is not None:
            self._queued.append((last, group, event))

    # ---- what the ranks tell each other

    def report(self, cause: str) -> None:
        """Tell all ranks why this one ends, unless one has told them before."""
        try:
            if not self._store.check(["ospnext/ended"]):
                self._store.set("ospnext/ended", f"rank {self._rank}: {cause}")
        except RuntimeError:
            pass  # the store is gone: then nobody is left to be told

    def reported(self) -> str:
        """Which rank ended first and why, or "" as far as can be told."""
        try:
            return self._store.get("ospnext/ended").decode() if self._store.check(["ospnext/ended"]) else ""
        except RuntimeError:  # the store is gone, which the next sign of life finds out
            return ""

    def whereabouts(self, group: str, ranks: list[int]) -> list[str]:
        """A line per rank: the collective of the group that it is in, or that it gives no sign of life."""
        try:
            first = {rank: self._heard(rank) for rank in ranks}
            time.sleep(2.5 * self.period)
            second = {rank: self._heard(rank) for rank in ranks}
        except RuntimeError as error:
            return [f"not known: the store of the job, on the host of rank 0, does not answer ({_first_line(error)})"]
        lines = []
        for rank in ranks:
            said = second[rank]["places"].get(group, "no collective of the group yet")
            silent = second[rank]["beat"] == first[rank]["beat"] and rank != self._rank
            lines.append(f"rank {rank}: {'no sign of life; last heard: ' if silent else ''}{said}")
        return lines

    def _beat(self) -> None:
        self._beats += 1
        places = {group: place.as_text() for group, place in list(self._places.items())}
        self._store.set(f"ospnext/alive/{self._rank}", json.dumps({"beat": self._beats, "places": places}))

    def _heard(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(f"ospnext/alive/{rank}"))

    # ---- the thread

    def _run(self) -> None:
        while not self._stop.wait(self.period):
            try:
                self._beat()
                cause = self._late() or self._silent() or self.reported()
            except RuntimeError as error:
                cause = f"the store of the job, on the host of rank 0, does not answer: {_first_line(error)}"
            if cause:
                return self._end(cause)
        return None

    def _late(self) -> str:
        """A collective that should be done, with where every rank is."""
        while self._queued and self._queued[0][2].query():
            self._queued.popleft()
        now = time.monotonic()
        # On a device, before the watchdog of its transport ends the process; on the host, after the transport raised.
        late = [(place, group) for place, group, _ in list(self._queued)[:1] if now - place.since > 0.9 * self.timeout]
        late += [
            (place, group)
            for group, place in list(self._places.items())
            if place.inside and now - place.since > self.timeout + self.parting
        ]
        for place, group in late:
            self.report(
                f"{place.operation}, collective {place.count} of its group, is not done after {now - place.since:.1f} s"
                + "".join(f"\n  {line}" for line in self.whereabouts(group, list(range(self._ranks))))
            )
            return self.reported()
        return ""

    def _silent(self) -> str:
        """The next rank, if it has given no sign of life for too long: each rank listens to one other."""
        neighbour = (self._rank + 1) % self._ranks
        beat, (last, since) = self._heard(neighbour)["beat"], self._seen
        if beat != last:
            self._seen = (beat, time.monotonic())
        elif (seconds := time.monotonic() - since) > self.timeout:
            self.report(f"rank {neighbour} has given no sign of life for {seconds:.1f} s: its process is gone or stuck")
            return self.reported()
        return ""

    def _end(self, cause: str) -> None:
        """The end of this process, unless it comes by itself."""
        if self._stop.wait(self.parting):
            return
        print(f"ospnext: rank {self._rank} is ended, since the job cannot go on. {cause}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.parting)
        os.kill(os.getpid(), signal.SIGKILL)


def _event_behind(device: torch.device) -> Any:
    """An event behind the work that is queued on the current stream; none while that is only recorded in a graph."""
    module: Any = torch.get_device_module(device)
    capturing = getattr(module, "is_current_stream_capturing", None)
    if capturing is not None and capturing():
        return None
    event = module.Event()
    event.record(module.current_stream(device))
    return event


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
