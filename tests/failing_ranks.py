"""What ranks do in tests/test_parallel_faults.py and benchmarks/fault_messages.py, each with one fault; ranks import it
by the names in this file."""

from __future__ import annotations

import os
import signal
import sys
import time
from threading import Timer
from types import SimpleNamespace

import torch
import torch.distributed as dist

from ospnext.errors import CollectiveError
from ospnext.ops import agreement, collective, collective_watch
from ospnext.ops.agreement import check_agreement

#: Steps before the fault, so that it meets ranks at work.
STEPS = 3


def step(x):
    """A step of training in small: an exchange in the forward pass and one in the backward pass, then a sum."""
    ranks = dist.get_world_size()
    weight = torch.ones(x.shape[1], device=x.device, requires_grad=True)
    collective.all_to_all(x * weight, [1] * ranks, [1] * ranks).sum().backward()
    return collective.all_reduce(weight.grad)


def steps(fault, timeout, broken=-1, device="cpu"):
    """Steps under watch, of which that of rank `broken` has a fault; a rank may end by itself or be ended. Each step
    ends when the device is done with it."""
    broken %= dist.get_world_size()
    with collective.watch(timeout=timeout):
        for number in range(1_000_000):
            if dist.get_rank() == broken and number == STEPS:
                FAULTS[fault]()
            step(torch.ones(dist.get_world_size(), 3, device=device)).sum().item()


def done(seconds):
    """Two blocks under watch, in each of which the ranks end at different times, all well."""
    for _ in range(2):
        with collective.watch(timeout=1.0) as watch:
            step(torch.ones(dist.get_world_size(), 3))
            time.sleep(seconds * dist.get_rank())
    assert not watch.reported()
    return "done"


def late_on_its_device(timeout):
    """Rank 0 has queued a collective that its device never finishes, and waits for something else."""
    collective_watch._event_behind = lambda device: SimpleNamespace(query=lambda: False)
    with collective.watch(timeout=timeout) as watch:
        step(torch.ones(dist.get_world_size(), 3))
        if dist.get_rank() == 0:
            watch.enter("0", "all_gather")
            watch.leave("0", torch.device("meta"))
        time.sleep(60)


def late_under_a_watchdog(timeout):
    """The same, where the transport ends the process of rank 0 at its timeout, as NCCL does."""
    if dist.get_rank() == 0:
        Timer(timeout, os.abort).start()
    late_on_its_device(timeout)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stuck():
    while True:
        time.sleep(1)


def raises():
    raise ValueError("no such video: clip_17.mp4")


def other_operation():
    collective.all_gather(torch.ones(2, 3))


def leaves():
    sys.exit(0)


FAULTS = {f.__name__: f for f in (killed, stuck, raises, other_operation, leaves)}


def unwatched(timeout):
    """A hang of the last rank where nobody watches; it is over when the others are."""
    ranks = dist.get_world_size()
    if dist.get_rank() == ranks - 1:
        time.sleep(timeout + 3)
        return "slept"
    try:
        collective.all_reduce(torch.ones(5, 2, dtype=torch.bfloat16))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def meeting(timeout):
    """A barrier to which rank 1 comes late, and others."""
    collective.barrier(timeout=30)
    if dist.get_rank() == 1:
        time.sleep(timeout + 2)
        return "late"
    started = time.monotonic()
    try:
        collective.barrier(timeout=timeout)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "no error"


def meetings():
    """Barriers in a row, of all ranks and of some: each returns after the last rank came."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    some = dist.new_group([0, ranks - 1])
    came, left = [], []
    for number in range(4):
        time.sleep(0.1 * ((rank + number) % ranks))
        came.append(time.time())
        collective.barrier(timeout=30)
        left.append(time.time())
        if rank in (0, ranks - 1):
            collective.barrier(some, timeout=30)
    return came, left


def set_up_twice(port):
    """Seconds that a barrier took for which rank 1 is a second late, after torch.distributed was set up anew with the
    store of before, as the ranks of one torchrun do."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    collective.barrier(timeout=30)
    dist.destroy_process_group()
    _forget_addresses(store, rank, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    if rank == 1:
        time.sleep(1)
    started = time.monotonic()
    collective.barrier(timeout=30)
    return time.monotonic() - started


def _forget_addresses(store, rank, ranks):
    """Else gloo may connect to those that its ranks had before."""
    store.add("taken down", 1)
    if rank == 0:
        while store.add("taken down", 0) < ranks:
            time.sleep(0.01)
        for key in store.list_keys():
            if "cpu" in key:
                store.delete_key(key)
        store.set("forgotten", "")
    store.wait(["forgotten"])


def check(facts_by_rank, timeout=30):
    """An agreement among ranks that have facts of their own."""
    check_agreement(None, facts_by_rank[dist.get_rank()], timeout=timeout)


def agree(facts_by_rank, timeout=30):
    """The error of it."""
    try:
        check(facts_by_rank, timeout)
    except Exception as error:
        return type(error).__name__, str(error), type(error.__cause__).__name__
    return None


def agree_without_store(facts_by_rank):
    """The same; the store is gone for rank 1 when all ranks know that they differ, as rank 0 does not wait for it."""
    meet = agreement.meet

    def gone(topic, *arguments):
        if topic.startswith("end"):
            raise CollectiveError("the store of the group does not answer")
        return meet(topic, *arguments)

    if dist.get_rank() == 1:
        agreement.meet = gone
    return agree(facts_by_rank, timeout=1)
