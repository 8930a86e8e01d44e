"""What is done around every call of a collective's implementation: the watch, where there is one, is told of it, and a
failure becomes an error that names the operation, its ranks and what is known of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ospnext.errors import CollectiveError, OSPNextError
from ospnext.ops.collective_watch import waits_for, watch_in_force
from ospnext.ops.group_store import group_of, names_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Result = TypeVar("Result")


def guarded(
    operation: str, x: Tensor, group: ProcessGroup | None, call: Callable[..., Result], *arguments: object
) -> Result:
    """`call(*arguments)`, which is a part of `operation` on this rank's x.

    Raises:
        CollectiveError: it raised a RuntimeError, as transports do when a rank is late or gone. Being out of memory, or
            refused by PyTorch as not implemented, stays what it is.
    """
    watching, name = watch_in_force(), ""
    if watching is not None:
        name = group_of(group).group_name
        watching.enter(name, operation)
    started = time.monotonic()
    try:
        result = call(*arguments)
    except (OSPNextError, NotImplementedError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise CollectiveError(_failure(operation, x, group, time.monotonic() - started, error)) from error
    if watching is not None:
        watching.leave(name, x.device)
    return result


def _failure(operation: str, x: Tensor, group: ProcessGroup | None, seconds: float, error: RuntimeError) -> str:
    ranks, watching = dist.get_process_group_ranks(group), watch_in_force()
    dtype = str(x.dtype).removeprefix("torch.")
    what = f"{operation} among {names_of(ranks)} failed on rank {dist.get_rank()} after {seconds:.1f} s"
    sent = f"with {dtype} {list(x.shape)} on {x.device}; transport: {str(error).strip()}"
    if watching is None:
        unknown = "where the other ranks are is not known; `with ops.collective.watch(timeout):` around the job tells"
        return "\n  ".join([what, sent, unknown])
    missing, lines = watching.whereabouts(group_of(group).group_name, ranks)
    text = "\n  ".join([what + waits_for(missing), sent, *lines])
    reported = watching.reported()
    return f"{text}\n  the first to end was {reported.splitlines()[0]}" if reported else text
