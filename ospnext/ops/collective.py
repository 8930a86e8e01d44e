"""The collectives that parallel code calls. Their meaning is in contracts/collective.py; each works along dim 0.

Without a group, and without torch.distributed set up, a process is the only rank. One rank gets a copy and chooses no
implementation. Each but the maximum has a gradient: its adjoint, called through the functions of this file again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ospnext.launch import launched
from ospnext.ops import collective_bytes
from ospnext.ops.collective_bytes import count_bytes
from ospnext.ops.collective_errors import guarded
from ospnext.ops.collective_gradients import wants_gradient, with_adjoint
from ospnext.ops.collective_watch import watch
from ospnext.ops.contracts.collective import CONTRACT, CollectiveRequest, Operation
from ospnext.ops.group_store import meet
from ospnext.ops.library import Decided
from ospnext.ops.rank_devices import ranks_per_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "CollectiveKernel",
    "Pending",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "count_bytes",
    "reduce_scatter",
    "watch",
]


class CollectiveKernel(Protocol):
    """What an implementation's `target` provides. Arguments are checked and there are two ranks or more; `x` may have
    any strides, ranks count within `group`, and None is the default group. It is called without gradients: those are
    given to every implementation by collective.py, which calls it for the adjoint as well.

    It may also have `start_all_to_all`, with the arguments of `all_to_all`: it returns at once a function that waits
    for the exchange and returns its result. One without it is called when the exchange starts, and is done by then.
    """

    def all_to_all(
        self, x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None
    ) -> Tensor: ...

    def all_gather(self, x: Tensor, group: ProcessGroup | None) -> Tensor: ...

    def reduce_scatter(self, x: Tensor, group: ProcessGroup | None) -> Tensor: ...

    def all_reduce(self, x: Tensor, reduction: str, group: ProcessGroup | None) -> Tensor: ...

    def broadcast(self, x: Tensor, source: int, group: ProcessGroup | None) -> Tensor: ...


class Pending:
    """An exchange on its way. What it sends must stay as it is until `wait` has returned."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """The result, once it is there for what the current stream does next; the same tensor each time.

        Raises:
            CollectiveError: the exchange failed.
        """
        if self._result is None:
            if self._finish is None:
                raise RuntimeError("this exchange has failed before")
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result


@overload
def all_to_all(
    x: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: ProcessGroup | None = None,
    *,
    async_op: Literal[False] = False,
) -> Tensor: ...
@overload
def all_to_all(
    x: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: ProcessGroup | None = None,
    *,
    async_op: Literal[True],
) -> Pending: ...
def all_to_all(
    x: Tensor,
    send_splits: Sequence[int],
    receive_splits: Sequence[int],
    group: ProcessGroup | None = None,
    *,
    async_op: bool = False,
) -> Tensor | Pending:
    """Send rows of x [sum(send_splits), ...] to each rank, and receive [sum(receive_splits), ...] in rank order.

    `send_splits[i]` is what this rank sends to rank i, and `receive_splits[i]` what it receives from there: rank i must
    say the same in its own `send_splits`. With `async_op` it returns at once what can be waited for; x may then have no
    gradient.

    Raises:
        ValueError: there is not one split per rank, the splits do not add up, or `async_op` with a gradient.
        CollectiveError: a rank is late or gone.
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
    if async_op and wants_gradient(x):  # on one rank, too: what runs there must run on more
        raise ValueError("all_to_all: async_op has no gradient; give it x.detach(), or leave async_op out")
    if ranks == 1:
        return _done(_copy(x)) if async_op else _copy(x)
    sent, received = tuple(send_splits), tuple(receive_splits)  # the caller may go on to change its lists
    if wants_gradient(x):
        there = partial(all_to_all, send_splits=sent, receive_splits=received, group=group)
        back = partial(all_to_all, send_splits=received, receive_splits=sent, group=group)
        return with_adjoint(x, there, back)
    kernel = _kernel("all_to_all", x, group, ranks, uneven=len({*sent, *received}) > 1)
    if collective_bytes.counts:
        _count("all_to_all", x, group, ranks, own_rows=sent[rank])
    start = getattr(kernel, "start_all_to_all", None) if async_op else None
    if start is not None:
        finish = guarded("all_to_all", x, group, start, x, sent, received, group)
        return Pending(partial(guarded, "wait for all_to_all", x, group, finish))
    out = guarded("all_to_all", x, group, kernel.all_to_all, x, sent, received, group)
    return _done(out) if async_op else out


def all_gather(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The x [N, ...] of every rank, [ranks * N, ...] in rank order; its shape is the same on each.

    Raises:
        ValueError: x has no rows to put together.
        CollectiveError: a rank is late or gone.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, _ = _place(group)
    _check_rows("all_gather", x)
    if ranks == 1:
        return _copy(x)
    if wants_gradient(x):
        return with_adjoint(x, partial(all_gather, group=group), partial(reduce_scatter, group=group))
    kernel = _kernel("all_gather", x, group, ranks)
    if collective_bytes.counts:
        _count("all_gather", x, group, ranks)
    return guarded("all_gather", x, group, kernel.all_gather, x, group)


def reduce_scatter(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of x [ranks * N, ...] over ranks, of which this rank keeps its part [N, ...].

    Raises:
        ValueError: the rows of x are not divisible by the ranks, or its dtype is not one of numbers.
        CollectiveError: a rank is late or gone.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, _ = _place(group)
    _check_rows("reduce_scatter", x)
    _check_numbers("reduce_scatter", x)
    if len(x) % ranks:
        raise ValueError(f"reduce_scatter: the {len(x)} rows of x are not divisible by {ranks} ranks")
    if ranks == 1:
        return _copy(x)
    if wants_gradient(x):
        return with_adjoint(x, partial(reduce_scatter, group=group), partial(all_gather, group=group))
    kernel = _kernel("reduce_scatter", x, group, ranks)
    if collective_bytes.counts:
        _count("reduce_scatter", x, group, ranks)
    return guarded("reduce_scatter", x, group, kernel.reduce_scatter, x, group)


def all_reduce(x: Tensor, reduction: str = "sum", group: ProcessGroup | None = None) -> Tensor:
    """The sum ("sum") or maximum ("max") of x over ranks, in the shape of x; it is the same on each.

    Raises:
        ValueError: there is no such reduction, the dtype of x is not one of numbers, or a maximum with a gradient.
        CollectiveError: a rank is late or gone.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, _ = _place(group)
    if reduction not in ("sum", "max"):
        raise ValueError(f"all_reduce: reduction must be 'sum' or 'max', got {reduction!r}")
    _check_numbers("all_reduce", x)
    if reduction == "max" and wants_gradient(x):  # on one rank, too: what runs there must run on more
        raise ValueError("all_reduce: the maximum over ranks has no gradient; give it x.detach()")
    if ranks == 1:
        return _copy(x)
    if wants_gradient(x):
        total = partial(all_reduce, group=group)
        return with_adjoint(x, total, total)
    kernel = _kernel("all_reduce", x, group, ranks, reduction=reduction)
    if collective_bytes.counts:
        _count("all_reduce", x, group, ranks)
    return guarded("all_reduce", x, group, kernel.all_reduce, x, reduction, group)


def broadcast(x: Tensor, source: int, group: ProcessGroup | None = None) -> Tensor:
    """The x of rank `source` (counted within the group). Elsewhere x gives shape and dtype, its values do not matter.

    Raises:
        ValueError: there is no such rank.
        CollectiveError: a rank is late or gone.
        UnsupportedRequestError: no implementation that the policy allows takes the call.
    """
    ranks, rank = _place(group)
    if not 0 <= source < ranks:
        raise ValueError(f"broadcast: source must be a rank from 0 to {ranks - 1}, got {source}")
    if ranks == 1:
        return _copy(x)
    if wants_gradient(x):
        return with_adjoint(
            x, partial(broadcast, source=source, group=group), partial(_sum_onto, source=source, group=group)
        )
    kernel = _kernel("broadcast", x, group, ranks)
    if collective_bytes.counts:
        _count("broadcast", x, group, ranks, is_source=rank == source)
    return guarded("broadcast", x, group, kernel.broadcast, x, source, group)


def barrier(group: ProcessGroup | None = None, *, timeout: float = 600.0) -> None:
    """Return once every rank of the group has called this. It waits for the ranks, not for what their devices still do.

    Raises:
        CollectiveError: ranks did not come within `timeout` seconds; it names them.
    """
    if _place(group)[0] > 1:
        meet("barrier", "", group, timeout)


# ---- behind the functions

_decided = Decided(CONTRACT)


def _kernel(
    operation: Operation, x: Tensor, group: ProcessGroup | None, ranks: int, **features: Any
) -> CollectiveKernel:
    """The implementation for a call. The request is all that selection sees, so it is the signature as well."""
    request = CollectiveRequest(
        x.device.type,
        x.dtype,
        operation,
        ranks,
        x.numel(),
        local_ranks=_local_ranks(ranks),
        ranks_per_device=ranks_per_device(x.device.type, group),
        **features,
    )
    return _decided.get(request) or _decided.decide(request, request)


def _count(operation: Operation, x: Tensor, group: ProcessGroup | None, ranks: int, **known: Any) -> None:
    collective_bytes.add(operation, group, collective_bytes.sent_bytes(operation, x, ranks, **known))


def _sum_onto(x: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
    """The sum of x over ranks on rank `source`, and zeros elsewhere: what was given to a broadcast there was not used.

    Zeros stay a function of x: a gradient of theirs must call on every rank what it calls on the source."""
    total, (_, rank) = all_reduce(x, "sum", group), _place(group)
    return total if rank == source else total.masked_fill(torch.ones((), dtype=torch.bool, device=x.device), 0)


def _local_ranks(ranks: int) -> int | None:
    """How many of them are on this host, at most; None where all may be."""
    launch = launched()
    return None if launch is None or ranks <= launch.local_world else launch.local_world


def _place(group: ProcessGroup | None) -> tuple[int, int]:
    """(number of ranks, this one), counted within the group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a rank of the group it calls a collective on")
    return ranks, rank


def _done(out: Tensor) -> Pending:
    return Pending(lambda: out)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _check_rows(operation: Operation, x: Tensor) -> None:
    if x.ndim == 0:
        raise ValueError(f"{operation}: x must have a dimension 0 to split or join along, got a scalar")


def _check_numbers(operation: Operation, x: Tensor) -> None:
    """A dtype of one byte holds codes or flags: its sum would overflow, or mean nothing."""
    if x.dtype.itemsize == 1 or x.is_complex():
        raise ValueError(f"{operation}: {x.dtype} cannot be reduced; cast to a float or to an int of 16 bits or more")
