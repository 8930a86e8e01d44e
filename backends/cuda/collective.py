"""`cuda.nccl`: torch.distributed on the GPUs of the group, each rank with one of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

_REDUCTIONS = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}


class NcclCollectives:
    """Each result is allocated here, and inputs are only read: what PyTorch does in place, it does on a copy."""

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
            work.wait()  # of the current stream, for NCCL's own; `work` holds what is sent until then
            return out

        return finish

    def all_gather(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    def reduce_scatter(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out

    def all_reduce(self, x: Tensor, reduction: str, group: ProcessGroup | None) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, _REDUCTIONS[reduction], group=group)
        return out

    def broadcast(self, x: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(out, group=group, group_src=source)
        return out


nccl = NcclCollectives()
