"""`ascend.hccl`: torch.distributed on the NPUs of the group, each rank with one of its own, and the name by which
fused operators know its communicator. HiF8 codes travel as the uint8 they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

_REDUCTIONS = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}

# The forms of one tensor, since those of a list are copied by HCCL's front end; torch 2.13 gave them other names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class HcclCollectives:
    """Each result is allocated here, and inputs are only read: what PyTorch does in place, it does on a copy. HCCL
    takes contiguous memory only.
    """

    def all_to_all(
        self, x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None
    ) -> Tensor:
        out = x.new_empty(sum(receive_splits), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive_splits), list(send_splits), group=group)
        return out

    def start_all_to_all(
        self, x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None
    ) -> Callable[[], Tensor]:
        out, sent = x.new_empty(sum(receive_splits), *x.shape[1:]), x.contiguous()
        work = dist.all_to_all_single(out, sent, list(receive_splits), list(send_splits), group=group, async_op=True)

        def finish() -> Tensor:
            work.wait()  # of the current stream, for HCCL's own; `work` holds what is sent until then
            return out

        return finish

    def all_gather(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        _all_gather(out, x.contiguous(), group=group)
        return out

    def reduce_scatter(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
        _reduce_scatter(out, x.contiguous(), group=group)
        return out

    def all_reduce(self, x: Tensor, reduction: str, group: ProcessGroup | None) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, _REDUCTIONS[reduction], group=group)
        return out

    def broadcast(self, x: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(out, group=group, group_src=source)
        return out


def communicator_name(group: ProcessGroup | None = None) -> str:
    """The name of the group's HCCL communicator, which vendor operators that communicate take as `hcom`.

    The first call makes the communicator, so that every rank of the group has to make it.

    Raises:
        ValueError: the group has no HCCL communicator, or HCCL gave it no name of 1 to 127 characters.
    """
    group = group or dist.group.WORLD
    try:
        backend: Any = group._get_backend(torch.device("npu"))  # type: ignore[union-attr]
        name = backend.get_hccl_comm_name(dist.get_rank())
    except (RuntimeError, AttributeError) as error:
        raise ValueError(
            f"this process group has no HCCL communicator ({error}): make it with backend 'hccl' or 'cpu:gloo,npu:hccl'"
        ) from error
    if not 0 < len(name) < 128:
        raise ValueError(f"HCCL calls the communicator {name!r}; operators take names of 1 to 127 characters")
    return name


hccl = HcclCollectives()
