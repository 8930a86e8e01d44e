"""Meetings of the ranks of a group through its key-value store: no device, no transport and no collective takes part,
so that ranks which could not even exchange a tensor can still tell each other why."""

from __future__ import annotations

import datetime
import time
from collections import Counter
from typing import TYPE_CHECKING

import torch.distributed as dist

from ospnext.errors import CollectiveError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

#: Meetings that this process has called, by ranks, name of the group and topic. Never forgotten: a job that sets up
#: torch.distributed anew meets in the same store, which still has the last keys of before.
_held: Counter[tuple[tuple[int, ...], str, str]] = Counter()


def meet(topic: str, value: str, group: ProcessGroup | None, timeout: float) -> list[str]:
    """Give `value` and wait until every rank of the group has called this; returns the values in rank order.

    Raises:
        CollectiveError: ranks did not come within `timeout` seconds, or the store is gone; it names them.
    """
    group = group_of(group)
    store, rank, ranks = store_of(group), group.rank(), group.size()
    place = (tuple(dist.get_process_group_ranks(group)), group.group_name, topic)
    _held[place] += 1
    keys = [f"ospnext/{topic}/{_held[place]}/{rank}" for rank in range(ranks)]
    started = time.monotonic()
    try:
        if _held[place] > 2:  # everyone came to the last meeting, so all have left the one before: its keys are read
            store.delete_key(f"ospnext/{topic}/{_held[place] - 2}/{rank}")
        store.set(keys[rank], value)
        store.wait(keys, datetime.timedelta(seconds=timeout))
        return [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        raise CollectiveError(_who_is_missing(topic, store, keys, group, time.monotonic() - started, error)) from error


def group_of(group: ProcessGroup | None) -> ProcessGroup:
    """The group itself, where None stands for that of all ranks."""
    found = group or dist.group.WORLD
    if found is None:
        raise ValueError("torch.distributed is not set up: call torch.distributed.init_process_group first")
    return found


def store_of(group: ProcessGroup) -> Store:
    """Through which its ranks found each other. Groups that torch_npu makes do not know it; PyTorch's table does."""
    store = group.get_group_store()
    return dist.distributed_c10d._get_process_group_store(group) if store is None else store


def names_of(ranks: list[int]) -> str:
    """ "rank 1", "ranks 0, 2"."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


def _who_is_missing(
    topic: str, store: Store, keys: list[str], group: ProcessGroup, seconds: float, error: RuntimeError
) -> str:
    everyone, rank = dist.get_process_group_ranks(group), dist.get_rank()
    what = f"{topic} of {names_of(everyone)}: on rank {rank}"
    said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    try:
        missing = [everyone[i] for i, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return f"{what}, the store of the group does not answer after {seconds:.1f} s; its host is gone ({said})"
    if not missing:
        return f"{what}, the store of the group failed after {seconds:.1f} s, though every rank came ({said})"
    return f"{what}, {names_of(missing)} did not come within {seconds:.1f} s"
