"""`watch`: a job of several ranks ends as a whole, and every rank says why. A thread per rank tells the store of the
job that the rank lives and which collective it is in; nothing is added to a collective but a note of its name.

    with collective.watch(timeout=600):
        train()

What ends a job: a collective that fails, one that is not done in time on its device, a rank that leaves the block by
an exception, and one that gives no sign of life. Each rank is then given a moment to end by itself, and ended as a
launcher would: SIGTERM, then SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ospnext.errors import CollectiveError
from ospnext.ops.group_store import group_of, meet, names_of, store_of

_STORE_IS_GONE = "the store of the job, in the process of rank 0 or of the launcher, does not answer"

#: Seconds between two looks at the store while nothing else is to be done.
_MOMENT = 0.05

_in_force: watch | None = None


def watch_in_force() -> watch | None:
    return _in_force


class Place(NamedTuple):
    """Where this rank is in the collectives of one group: at its `number`-th, since `since` (monotonic seconds)."""

    number: int
    operation: str
    inside: bool
    since: float

    def as_text(self) -> str:
        seconds = time.monotonic() - self.since
        state = f"in it for {seconds:.1f} s" if self.inside else f"left it {seconds:.1f} s ago"
        return f"{self.operation}, its collective {self.number} of the group: {state}"


class watch:
    """While the block runs, the ranks of the job watch each other. On one rank it does nothing.

    Args:
        timeout: seconds that a collective may take and a rank may be silent. The process groups have the same as their
            own timeout, `init_process_group(timeout=...)`.
        period: seconds between two signs of life.

    Raises:
        CollectiveError: at the end of the block, where other ranks fail before they reach it. A rank that is done waits
            for those that live, however long they take.
        RuntimeError: another watch is in force.
    """

    #: Blocks that this process has entered: each has keys of its own in the store.
    _entered = 0

    def __init__(self, timeout: float, *, period: float | None = None) -> None:
        self.timeout = timeout
        self.period = min(1.0, timeout / 10) if period is None else period
        #: Seconds that a rank is given to end by itself.
        self.parting = min(5.0, timeout)
        #: Seconds that a device may take. Then there is time to find out who is where, and to say so, before the
        #: watchdog of its transport, whose timeout is the same, ends the process.
        self.on_device = max(0.5 * timeout, timeout - max(0.1 * timeout, 5 * self.period))
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
            watch._entered += 1
            store = store_of(group_of(None)).clone()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore(f"ospnext/watch/{watch._entered}", store)
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
                self._leave_together()
            else:
                self._leave_by(error)
        finally:
            _in_force = None
            self._stop.set()

    def _leave_together(self) -> None:
        try:
            self._store.add("done", 1)
            while self._store.add("done", 0) < self._ranks:
                if reported := self.reported():
                    raise CollectiveError(f"rank {self._rank} was done, but the job cannot go on. {reported}")
                time.sleep(_MOMENT)
            self._leave()
        except CollectiveError:
            raise
        except RuntimeError as error:
            raise CollectiveError(f"rank {self._rank} was done, but {_STORE_IS_GONE}: {_first_line(error)}") from error

    def _leave_by(self, error: BaseException) -> None:
        self._stop.set()
        self._thread.join()
        self.report(str(error) if isinstance(error, CollectiveError) else f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the store may be gone; this rank has its error already
            self._beat(ended=True)
            self._leave()

    def _leave(self) -> None:
        """The store may be in the process of rank 0, which leaves last: others may have to read it."""
        self._store.add("left", 1)
        last = time.monotonic() + self.parting
        while self._rank == 0 and self._store.add("left", 0) < self._ranks and time.monotonic() < last:
            time.sleep(_MOMENT)

    # ---- what the collectives tell

    def enter(self, group: str, operation: str) -> None:
        """This rank is in its next collective of the group."""
        last = self._places.get(group)
        self._places[group] = Place(last.number + 1 if last else 1, operation, True, time.monotonic())

    def leave(self, group: str, device: torch.device) -> None:
        """It is out of it; a device may have to finish it still."""
        last = self._places[group]
        self._places[group] = Place(last.number, last.operation, False, time.monotonic())
        if device.type != "cpu" and (event := _event_behind(device)) is not None:
            self._queued.append((last, group, event))

    # ---- what the ranks tell each other

    def report(self, cause: str) -> None:
        """Tell all ranks why this one ends, unless one has told them before."""
        try:
            if not self._store.check(["ended"]):
                self._store.set("ended", f"rank {self._rank}: {cause}")
        except RuntimeError:
            pass  # the store is gone: then nobody is left to be told

    def reported(self) -> str:
        """Which rank ended first and why, or "" as far as can be told."""
        try:
            return self._store.get("ended").decode() if self._store.check(["ended"]) else ""
        except RuntimeError:  # the store is gone, which the next sign of life finds out
            return ""

    def whereabouts(self, group: str, ranks: list[int]) -> tuple[list[int], list[str]]:
        """The ranks that this one waits for in a collective of the group, as far as they can be told, and a line for
        each rank: the collective of the group that it is in, or that it gives no sign of life.
        """
        try:
            first = {rank: self._heard(rank)["beat"] for rank in ranks}
            time.sleep(2.5 * self.period)
            second = {rank: self._heard(rank) for rank in ranks}
        except RuntimeError as error:
            return [], [f"where the ranks are is not known: {_STORE_IS_GONE} ({_first_line(error)})"]
        mine = self._places[group]
        missing, lines = [], []
        for rank, heard in second.items():
            place = heard["places"].get(
                group, {"number": 0, "operation": "", "text": "in no collective of the group yet"}
            )
            silent = heard["beat"] == first[rank] and not heard["ended"] and rank != self._rank
            state = "has ended; " if heard["ended"] else "no sign of life; last heard: " if silent else ""
            lines.append(f"rank {rank}: {state}{place['text']}")
            reached = (place["number"], place["operation"]) == (mine.number, mine.operation)
            if rank != self._rank and (silent or not (reached or place["number"] > mine.number)):
                missing.append(rank)
        return missing, lines

    def _beat(self, *, ended: bool = False) -> None:
        self._beats += 1
        places = {
            group: {"number": place.number, "operation": place.operation, "text": place.as_text()}
            for group, place in list(self._places.items())
        }
        said = {"beat": self._beats, "ended": ended, "places": places}
        self._store.set(f"alive/{self._rank}", json.dumps(said))

    def _heard(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(f"alive/{rank}"))

    # ---- the thread

    def _run(self) -> None:
        while not self._stop.wait(self.period):
            try:
                self._beat()
                cause = self._late() or self._silent() or self.reported()
            except RuntimeError as error:
                cause = f"{_STORE_IS_GONE}: {_first_line(error)}"
            if cause:
                return self._end(cause)
        return None

    def _late(self) -> str:
        """A collective that should be done, with where every rank is."""
        while self._queued and self._queued[0][2].query():
            self._queued.popleft()
        now = time.monotonic()
        # On a device, before the watchdog of its transport ends the process; on the host, after the transport raised.
        late = [(place, group) for place, group, _ in list(self._queued)[:1] if now - place.since > self.on_device]
        late += [
            (place, group)
            for group, place in list(self._places.items())
            if place.inside and now - place.since > self.timeout + self.parting
        ]
        for place, group in late:
            missing, lines = self.whereabouts(group, list(range(self._ranks)))
            lasted = f"{now - place.since:.1f} s"
            what = f"{place.operation}, collective {place.number} of its group, is not done after {lasted}"
            self.report("\n  ".join([what + waits_for(missing), *lines]))
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
        """The end of this process, unless it comes by itself. It still lives until then, and says so."""
        text = f"ospnext: rank {self._rank} is ended, since the job cannot go on. {cause}"
        waits_for_device = bool(self._queued)
        if waits_for_device:  # it has no error of its own to print, and its transport may end it at any moment
            print(text, file=sys.stderr, flush=True)
        last = time.monotonic() + self.parting
        while time.monotonic() < last:
            if self._stop.wait(self.period):
                return
            with contextlib.suppress(RuntimeError):  # the store may be what is gone
                self._beat()
        if not waits_for_device:
            print(text, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.parting)
        os.kill(os.getpid(), signal.SIGKILL)


def waits_for(missing: list[int]) -> str:
    """The end of a sentence on a collective."""
    return f": {names_of(missing)} {'is' if len(missing) == 1 else 'are'} not in it" if missing else ""


def _event_behind(device: torch.device) -> Any:
    """An event behind the work that is queued on the current stream; none while that is only recorded in a graph."""
    module: Any = torch.get_device_module(device)
    capturing = getattr(module, "is_current_stream_capturing", None)
    if capturing is not None and capturing():
        return None
    event = module.Event()
    event.record(module.current_stream(device))
    return _AskedElsewhere(event, device)


class _AskedElsewhere(NamedTuple):
    """An event that another thread asks, which has no device yet: on the first one it would take memory."""

    event: Any
    device: torch.device

    def query(self) -> bool:
        module: Any = torch.get_device_module(self.device)
        with getattr(module, "device", contextlib.nullcontext)(self.device):
            return self.event.query()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
