"""The collectives that parallel code calls. Their meaning is in contracts/collective.py; each works along dim 0.

Without a group, and without torch.distributed set up, a process is the only rank. One rank gets a copy and chooses no
implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ospnext.ops.contracts.collective import CONTRACT, CollectiveRequest, Operation
from ospnext.ops.library import Decided

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CollectiveKernel(Protocol):
    """What an implementation's `target` provides. Arguments are checked and there are two ranks or more; `x` may have
    any strides, ranks count within `group`, and None is the default group.
    """

    def all_to_all(
        self, x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None
    ) -> Tensor: ...

    def all_gather(self, x: Tensor, group: ProcessGroup | None) -> Tensor: ...

    def reduce_scatter(self, x: Tensor, group: ProcessGroup | None) -> Tensor: ...

    def all_reduce(self, x: Tensor, reduction: str, group: ProcessGroup | None) -> Tensor: ...

    def broadcast(self, x: Tensor, source: int, group: ProcessGroup | None) -> Tensor: ...


def all_to_all(
    x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None = None
) -> Tensor:
    """Send rows of x [sum(send_splits), ...] to each rank, and receive [sum(receive_splits), ...] in rank order.

    `send_splits[i]` is what this rank sends to rank i, and `receive_splits[i]` what it receives from there: rank i must
    say the same in its own `send_splits`.

    Raises:
        ValueError: there is not one split per rank, or the splits do not add up.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, rank = _place(group)
    _check_rows("all_to_all", x)
    for name, splits in (("send_splits", send_splits), ("receive_splits", receive_splits)):
        if len(splits) != ranks or min(splits) < 0:
            raise ValueError(f"all_to_all: {name} must hold {ranks} sizes, one per rank, got {list(splits)}")
    if sum(send_splits) != len(x):
        raise ValueError(f"all_to_all: send_splits {list(send_splits)} must add up to the {len(x)} rows of x")
    if send_splits[rank] != receive_splits[rank]:
        raise ValueError(
            f"all_to_all: rank {rank} sends {send_splits[rank]} rows to itself and expects {receive_splits[rank]}"
        )
    if ranks == 1:
        return _copy(x)
    uneven = len({*send_splits, *receive_splits}) > 1
    return _kernel("all_to_all", x, ranks, uneven=uneven).all_to_all(x, send_splits, receive_splits, group)


def all_gather(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The x [N, ...] of every rank, [ranks * N, ...] in rank order; its shape is the same on each.

    Raises:
        ValueError: x has no rows to put together.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, _ = _place(group)
    _check_rows("all_gather", x)
    return _copy(x) if ranks == 1 else _kernel("all_gather", x, ranks).all_gather(x, group)


def reduce_scatter(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of x [ranks * N, ...] over ranks, of which this rank keeps its part [N, ...].

    Raises:
        ValueError: the rows of x are not divisible by the ranks, or its dtype is not one of numbers.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, _ = _place(group)
    _check_rows("reduce_scatter", x)
    _check_numbers("reduce_scatter", x)
    if len(x) % ranks:
        raise ValueError(f"reduce_scatter: the {len(x)} rows of x are not divisible by {ranks} ranks")
    return _copy(x) if ranks == 1 else _kernel("reduce_scatter", x, ranks).reduce_scatter(x, group)


def all_reduce(x: Tensor, reduction: str = "sum", group: ProcessGroup | None = None) -> Tensor:
    """The sum ("sum") or maximum ("max") of x over ranks, in the shape of x; it is the same on each.

    Raises:
        ValueError: there is no such reduction, or the dtype of x is not one of numbers.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, _ = _place(group)
    if reduction not in ("sum", "max"):
        raise ValueError(f"all_reduce: reduction must be 'sum' or 'max', got {reduction!r}")
    _check_numbers("all_reduce", x)
    if ranks == 1:
        return _copy(x)
    return _kernel("all_reduce", x, ranks, reduction=reduction).all_reduce(x, reduction, group)


def broadcast(x: Tensor, source: int, group: ProcessGroup | None = None) -> Tensor:
    """The x of rank `source` (counted within the group). Elsewhere x gives shape and dtype, its values do not matter.

    Raises:
        ValueError: there is no such rank.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, _ = _place(group)
    if not 0 <= source < ranks:
        raise ValueError(f"broadcast: source must be a rank from 0 to {ranks - 1}, got {source}")
    return _copy(x) if ranks == 1 else _kernel("broadcast", x, ranks).broadcast(x, source, group)


# ---- behind the functions

_decided = Decided(CONTRACT)


def _kernel(operation: Operation, x: Tensor, ranks: int, **features: Any) -> CollectiveKernel:
    """The implementation for a call. The request is all that selection sees, so it is the signature as well."""
    backward = x.requires_grad and torch.is_grad_enabled()
    request = CollectiveRequest(x.device.type, x.dtype, operation, ranks, x.numel(), backward=backward, **features)
    return _decided.get(request) or _decided.decide(request, request)


def _place(group: ProcessGroup | None) -> tuple[int, int]:
    """(number of ranks, this one), counted within the group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a rank of the group it calls a collective on")
    return ranks, rank


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _check_rows(operation: Operation, x: Tensor) -> None:
    if x.ndim == 0:
        raise ValueError(f"{operation}: x must have a dimension 0 to split or join along, got a scalar")


def _check_numbers(operation: Operation, x: Tensor) -> None:
    """A dtype of one byte holds codes or flags: its sum would overflow, or mean nothing."""
    if x.dtype.itemsize == 1 or x.is_complex():
        raise ValueError(f"{operation}: {x.dtype} cannot be reduced; cast to a float or to an int of 16 bits or more")
