"""A command in the processes that torchrun starts: they meet, check in step, and the first of them speaks. In a process
of its own a command does all of this alone, and nothing here imports torch.
"""

from __future__ import annotations

import datetime
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ospnext.cli import EXIT_ERROR
from ospnext.errors import CollectiveError, OSPNextError
from ospnext.launch import Launch, launched, meeting_point

if TYPE_CHECKING:
    import torch

    from ospnext.parallel.config import ParallelConfig
    from ospnext.parallel.exchange import Payload
    from ospnext.parallel.mesh import Mesh

#: Seconds for all ranks to have started, and for each to have read its settings and the headers of a checkpoint.
START_TIMEOUT = 600.0

#: Seconds that a rank may wait for others that still work: a watch is in force meanwhile, and ends the job with them.
WORK = 30 * 24 * 3600.0


@dataclass(frozen=True)
class Ranks:
    """The ranks of this command; `launch` is None in a process of its own."""

    launch: Launch | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints."""
        return self.launch is None or self.launch.rank == 0

    @property
    def world(self) -> int | None:
        """Number of ranks; None in a process of its own."""
        return None if self.launch is None else self.launch.world

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def device(self, device: torch.device) -> torch.device:
        """The one of this kind that is this rank's, as far as it can tell alone: see `agree`."""
        from ospnext.ops.device import device_of_rank

        return device if self.launch is None else device_of_rank(device, self.launch.local_rank)

    def mesh(self, layout: ParallelConfig, device: torch.device, timeout: float, payload: Payload) -> Mesh | None:
        """Of all ranks, made together; None in a process of its own.

        A rank that leads no replica writes nothing, and from here on ends at once by Ctrl-C, even inside a collective,
        which Python would wait for: those that wait for it then fail, and can clean up.
        """
        if self.launch is None:
            return None
        from ospnext.parallel.mesh import make_mesh

        made = make_mesh(layout, device.type, timeout, payload)
        if not made.leads:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        elif not self.first:
            warnings.simplefilter("default")  # of its own prompts
        return made

    @contextmanager
    def in_step(self, timeout: float = START_TIMEOUT) -> Iterator[None]:
        """What every rank does for itself, such as checking its settings: if one finds an error, the command ends on
        all, and the error is printed once. Ranks wait for each other at the end.
        """
        if self.launch is None:
            yield
            return
        said = ""
        try:
            yield
        except OSPNextError as error:
            said = str(error) or type(error).__name__
        found = self._meet("errors", said, timeout)
        if not any(found):
            return
        if self.launch.rank == next(rank for rank, text in enumerate(found) if text):
            _print_errors(found)
        with suppress(CollectiveError):  # who has ended by now, and perhaps taken the store along, has printed
            self._meet("end", "", timeout)  # an end makes torchrun end the others, the one that prints among them
        raise SystemExit(EXIT_ERROR)

    def agree(self, facts: Mapping[str, str], device: torch.device) -> None:
        """Refuse ranks that differ in `facts`, or in what decides which kernels run, and two that hold one device. All
        of them call this in a step of its own.
        """
        if self.launch is not None:
            from ospnext.ops.agreement import check_agreement
            from ospnext.ops.rank_devices import require_own_devices

            check_agreement(None, facts, device_type=device.type, timeout=START_TIMEOUT)
            require_own_devices(device.type, START_TIMEOUT)

    def watched(self, timeout: float) -> AbstractContextManager[Any]:
        """While the block runs, a rank that fails or hangs ends the job, and says why."""
        if self.launch is None:
            return nullcontext()
        from ospnext.ops.collective_watch import watch

        return watch(timeout)

    def wait_for_all(self) -> None:
        """Until every rank has done its work, however long that takes; only while they are watched."""
        if self.launch is not None:
            self._meet("work", "", WORK)

    def ended(self, code: int) -> int:
        """The exit code of a command that could not go on. Among ranks the process ends here: taking its groups down
        would wait for others, which may be in a collective.
        """
        if self.launch is None:
            return code
        raise SystemExit(code)

    def _meet(self, topic: str, value: str, timeout: float) -> list[str]:
        from ospnext.ops.group_store import meet

        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is half done, and Python would wait
        try:
            return meet(topic, value, None, timeout)
        finally:
            signal.signal(signal.SIGINT, before)


@contextmanager
def ranks_of_command() -> Iterator[Ranks]:
    """The ranks that torchrun has started with this one, which can reach each other from here on.

    Raises:
        CollectiveError: they did not find each other.
    """
    launch = launched()
    if launch is None:
        yield Ranks()
        return
    import torch.distributed as dist

    # Ranks find each other on the host; the groups in which tensors travel are made with the mesh.
    transport = dist.get_default_backend_for_device("cpu")
    try:
        dist.init_process_group(transport, timeout=datetime.timedelta(seconds=START_TIMEOUT))
    except (dist.DistError, ValueError) as error:
        raise CollectiveError(_not_found(launch, error)) from error
    if launch.rank > 0:
        warnings.simplefilter("ignore")  # they would be those of the first rank again
    yield Ranks(launch)
    dist.destroy_process_group()  # not after an error, when others may be in a collective


def _not_found(launch: Launch, error: Exception) -> str:
    first_line, *_ = str(error).splitlines() or [type(error).__name__]
    return (
        f"{launch.world} ranks did not find each other at {meeting_point()} within {START_TIMEOUT:.0f} s "
        f"({first_line}): start all of them, on hosts that reach this address"
    )


def _print_errors(found: list[str]) -> None:
    """Each error once, with the ranks that have it unless all do."""
    for text in dict.fromkeys(filter(None, found)):
        having = [str(rank) for rank, said in enumerate(found) if said == text]
        where = "" if len(having) == len(found) else f" on rank{'s' * (len(having) > 1)} {', '.join(having)}"
        print(f"error{where}: {text}", file=sys.stderr, flush=True)
