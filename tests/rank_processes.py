"""Real processes as the ranks of a gloo group, for tests: what each returned, wrote to stderr, and how it ended. None
is left, whatever they do.

They are forked from a server that has imported PyTorch, so that a start costs no import."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Seconds until ranks that have not ended are killed, and said to have been.
LIMIT = 60.0


@dataclass(frozen=True)
class Ended:
    """How one rank ended. `exit_code` is None where it had to be killed; `seconds` count from when the group stood, or
    where it never did from the start."""

    result: Any
    stderr: str
    exit_code: int | None
    seconds: float


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float = 30.0,
    limit: float = LIMIT,
    environ: Mapping[int, Mapping[str, str]] | None = None,
    missing: int = 0,
    device_type: str = "cpu",
) -> list[Ended]:
    """Call `function(*arguments)` on each rank of a group whose collectives give up after `timeout` seconds.

    Each has a device of its own, of another type than "cpu". `environ` holds further variables by rank. The group has
    `missing` more ranks, which are not started. Both `function` and what it
    returns travel between processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "ospnext.ops", "rank_processes"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = ranks + missing
    with tempfile.TemporaryDirectory(prefix="ospnext-test-ranks-") as folder:
        processes = [
            context.Process(
                target=_serve,
                args=(
                    *(folder, rank, world, port, timeout, device_type),
                    *(dict((environ or {}).get(rank, {})), function, arguments),
                ),
                daemon=True,
            )
            for rank in range(ranks)
        ]
        started, ended = time.monotonic(), {}
        try:
            for process in processes:
                process.start()
            while len(ended) < ranks and time.monotonic() < started + limit:
                for rank, process in enumerate(processes):
                    process.join(0.02)
                    if process.exitcode is not None and rank not in ended:
                        ended[rank] = (process.exitcode, time.monotonic())
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        stood = max((float(file.read_text()) for file in Path(folder).glob("*.stood")), default=started)
        return [
            _ended(Path(folder), rank, *ended.get(rank, (None, started + limit)), stood=stood) for rank in range(ranks)
        ]


def results(ended: list[Ended]) -> list[Any]:
    """What the ranks returned; each must have."""
    for rank, one in enumerate(ended):
        assert one.exit_code == 0, f"rank {rank} ended with {one.exit_code}:\n{one.stderr}"
    return [one.result for one in ended]


def _ended(folder: Path, rank: int, exit_code: int | None, when: float, stood: float) -> Ended:
    written, result = folder / f"{rank}.stderr", folder / f"{rank}.result"
    return Ended(
        pickle.loads(result.read_bytes()) if result.exists() else None,
        written.read_text(errors="replace") if written.exists() else "",
        exit_code,
        when - stood,
    )


def _serve(
    folder: str,
    rank: int,
    world: int,
    port: int,
    timeout: float,
    device_type: str,
    environ: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.dup2(os.open(f"{folder}/{rank}.stderr", os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (it is this process's for good)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", **environ}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo" if device_type == "cpu" else _transport_of_own_device(device_type, rank),
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    Path(f"{folder}/{rank}.stood").write_text(str(time.monotonic()))  # one clock for all processes of a machine
    try:
        result = function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    Path(f"{folder}/{rank}.result").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def _transport_of_own_device(device_type: str, rank: int) -> str:
    from ospnext.ops.device import device_of_rank
    from ospnext.parallel.mesh import transports

    device_of_rank(torch.device(device_type), rank)
    return transports(device_type)
