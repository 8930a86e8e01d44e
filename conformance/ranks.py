"""Processes that run cases as ranks of one group, and a parent that outlives whatever they do.

A rank that hangs or dies ends its group, is named with the place it was stuck in or its exit code, and costs no other
case its run: the remaining ones go to fresh processes, of which none is left at the end."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ospnext import ops
from ospnext.ops.contract import Case, Contract, as_is
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.policy import PREFIX, use_registry
from ospnext.ops.registry import Manifest, Registry

from .check import CheckFailure
from .layouts import Placed

#: Until the first collective can be called: processes start, import PyTorch and find each other.
START_TIMEOUT = 120.0
#: Time for the processes of a finished or failed group to go by themselves, and then after each signal.
PARTING = 2.0

#: Groups of one size that may break before the rest of its cases fail unrun: a wrong machine breaks every one of them.
MAX_BROKEN = 4

TORCH = str(Path(torch.__file__).parent)
FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


@dataclass(frozen=True)
class Limits:
    """Seconds. PyTorch gives up on a collective before the parent gives up on a rank, so that ranks which merely wait
    for another one can say so.
    """

    group: float = 20.0
    answer: float = 30.0


LIMITS = Limits()


@dataclass(frozen=True)
class Job:
    """What the ranks of a group are to do. It travels to their processes, and so do the backend's declarations."""

    contract: str
    manifest: Manifest
    implementation: str
    device_type: str
    ranks: int
    limits: Limits = LIMITS


@dataclass(frozen=True)
class Answer:
    """Of one rank to one case: a result, or what went wrong. After a `broken` call the group cannot be used again."""

    out: Tensor | None = None
    error: str = ""
    broken: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """The tensor as bytes: torch's own form goes through what packages of vendors make of `torch.save`."""
        if self.out is None:
            return self.__dict__
        data = self.out.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return {**self.__dict__, "out": (self.out.shape, self.out.dtype, data)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["out"] is not None:
            shape, dtype, data = state["out"]
            out = torch.empty(shape, dtype=dtype)
            out.flatten().view(torch.uint8).numpy()[:] = memoryview(data)
            state = {**state, "out": out}
        self.__dict__.update(state)


#: Per case: the results in rank order, or a text on every rank that gave none.
Outcome = list[Tensor] | str


def run_cases(job: Job, cases: Sequence[Case]) -> dict[str, Outcome]:
    """Run every case on every rank, in as many sets of processes as it takes."""
    outcomes: dict[str, Outcome] = {}
    broken = 0
    while remaining := [case for case in cases if case.id not in outcomes]:
        if broken == MAX_BROKEN:
            text = f"not run after {broken} groups broke, the last with: {list(outcomes.values())[-1]}"
            return outcomes | dict.fromkeys((case.id for case in remaining), text)
        outcomes |= _run_in_one_group(job, remaining)
        broken += len(outcomes) < len(cases)
    return outcomes


def _run_in_one_group(job: Job, cases: Sequence[Case]) -> dict[str, Outcome]:
    """Outcomes of the cases up to and including the first that broke the group; of all, if it never stood."""
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="ospnext-ranks-") as folder:
        group = _Group(job, cases, Path(folder))
        try:
            started = group.answers(START_TIMEOUT)
            if any(answer.broken for answer in started):
                return dict.fromkeys((c.id for c in cases), f"the ranks did not start: {_complaint(started)}")
            for case in cases:
                answers = group.answers(job.limits.answer)
                complaint = _complaint(answers)
                outcomes[case.id] = complaint or [a.out for a in answers if a.out is not None]
                if any(answer.broken for answer in answers):
                    break
        finally:
            group.end()
    return outcomes


def _complaint(answers: Sequence[Answer]) -> str:
    return "; ".join(f"rank {rank}: {answer.error}" for rank, answer in enumerate(answers) if answer.error)


class _Group:
    """The parent's side: the processes of one group and a pipe from each."""

    def __init__(self, job: Job, cases: Sequence[Case], folder: Path) -> None:
        self._folder = folder
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        try:
            for rank in range(job.ranks):
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(rank, job, cases, str(folder), theirs), daemon=True)
                self._pipes.append(mine)
                process.start()
                self._processes.append(process)
                theirs.close()  # so that the death of a rank ends its pipe
        except BaseException:
            self.end()
            raise

    def answers(self, timeout: float) -> list[Answer]:
        """The next answer of every rank, in rank order; a rank that gives none is answered for."""
        deadline = time.monotonic() + timeout
        found: dict[int, Answer] = {}
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                found[rank] = self._receive(rank)
                del waiting[rank]
        places = self._where(list(waiting))
        for rank in waiting:
            found[rank] = Answer(error=f"no answer in {timeout:g} s, stuck in {places[rank]}", broken=True)
        return [found[rank] for rank in sorted(found)]

    def _receive(self, rank: int) -> Answer:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(PARTING)
            return Answer(error=f"died with exit code {process.exitcode}", broken=True)

    def _where(self, ranks: Sequence[int]) -> dict[int, str]:
        """Ask processes that do not answer for their stacks: which function each is in."""
        for rank in ranks:
            if self._processes[rank].is_alive() and _stack_file(self._folder, rank).exists():
                os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
        deadline = time.monotonic() + PARTING
        files = {rank: _stack_file(self._folder, rank) for rank in ranks}
        while time.monotonic() < deadline and not all(f.exists() and f.stat().st_size for f in files.values()):
            time.sleep(0.05)
        time.sleep(0.05 if ranks else 0.0)  # the rest of a stack follows its first line
        return {rank: _innermost(f.read_text() if f.exists() else "") for rank, f in files.items()}

    def end(self) -> None:
        """No process is left afterwards, whatever state they are in."""
        for pipe in self._pipes:
            pipe.close()
        for part in (None, BaseProcess.terminate, BaseProcess.kill):
            deadline = time.monotonic() + PARTING
            for process in self._processes:
                if part and process.is_alive():
                    part(process)
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))


def _innermost(stack: str) -> str:
    """The function that the main thread is in; where it is one of PyTorch's, the one that called PyTorch."""
    main = stack.split("\n\n")[-1]  # faulthandler writes the oldest thread last
    frames = FRAME.findall(main)
    own = [frame for frame in frames if not frame[0].startswith(TORCH)]
    if not frames:
        return "an unknown place: it gave no stack"
    file, line, function = (own or frames)[0]
    inside = f", waiting for {frames[0][2]}" if frames[0] != (file, line, function) else ""
    return f"{function} ({Path(file).name}:{line}){inside}"


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.stack"


# ---- the side of a rank


def _serve(rank: int, job: Job, cases: Sequence[Case], folder: str, pipe: Connection) -> None:
    """What the process of one rank does: one answer when the group stands, then one per case, until a call breaks it.

    A rank that leaves a broken group closes its connections, so that the others need not wait for their timeout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    with _stack_file(Path(folder), rank).open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            del os.environ[name]  # the job says all there is to the policy, and its registry knows one backend
        asked = {job.contract: job.implementation}
        try:
            with (
                use_registry(Registry([job.manifest])),
                ops.use_backend(job.manifest.backend, ops=asked, fallback=()),
            ):
                device = _join(rank, job, Path(folder) / "rendezvous")
                pipe.send_bytes(pickle.dumps(Answer()))
                for case in cases:
                    answer = _answer(case, CONTRACTS[job.contract], device, rank)
                    pipe.send_bytes(pickle.dumps(answer))
                    if answer.broken:
                        return
                torch.distributed.destroy_process_group()
        except BrokenPipeError:  # the parent is gone, or has given this group up
            return
        except Exception as error:
            pipe.send_bytes(pickle.dumps(Answer(error=_brief(error), broken=True)))


def _join(rank: int, job: Job, rendezvous: Path) -> torch.device:
    """Choose this rank's device and meet the other ranks."""
    if job.device_type == "cpu":
        device = torch.device("cpu")
        torch.set_num_threads(1)  # the ranks share the machine
        for loopback in [name for _, name in socket.if_nameindex() if name.startswith("lo")]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)  # whatever the host's name resolves to
    else:
        module: Any = torch.get_device_module(job.device_type)
        device = torch.device(job.device_type, rank % module.device_count())
        module.set_device(device)
    transport = torch.distributed.get_default_backend_for_device(job.device_type)
    torch.distributed.init_process_group(
        # A backend may send tensors through the host, too.
        transport if job.device_type == "cpu" else f"cpu:gloo,{job.device_type}:{transport}",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=job.ranks,
        timeout=datetime.timedelta(seconds=job.limits.group),
    )
    return device


def _answer(case: Case, contract: Contract, device: torch.device, rank: int) -> Answer:
    """The case between two calls on zeros: a result must not come from an earlier call, nor change with a later one."""
    placed = Placed(contract.inputs(case)[f"rank{rank}"], case.layout, device)
    x: Tensor = placed.values["x"]
    zeros: Mapping[str, Any] = {
        name: torch.zeros_like(value) if isinstance(value, Tensor) else value for name, value in placed.values.items()
    }
    try:
        contract.call(zeros, as_is)
        out = contract.call(placed.values, as_is)["out"]
        contract.call(zeros, as_is)
        received = out.cpu()
    except Exception as error:
        return Answer(error=_brief(error), broken=True)
    try:
        placed.require_untouched()
        if out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
            raise CheckFailure(f"the result is {out.dtype} on {out.device} with strides {out.stride()}")
        if out.numel() and out.untyped_storage().data_ptr() in placed.storages():
            raise CheckFailure("the result shares memory with the input; it must own its own")
    except CheckFailure as failure:
        return Answer(error=str(failure))
    return Answer(received)


def _brief(error: Exception) -> str:
    """The error, and where in the code under test what caused it was raised."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    frames = [f for f in traceback.extract_tb(root.__traceback__) if not f.filename.startswith(TORCH)]
    place = f" in {frames[-1].name} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{place}: {error}"
