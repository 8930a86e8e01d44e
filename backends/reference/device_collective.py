"""torch.distributed on tensors where they are, for backends whose devices have a transport of their own: what is alike
for NCCL, HCCL and others. The reference backend itself goes through the host: collective.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

_REDUCTIONS = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}

# The forms of one tensor, since transports copy those of a list; torch 2.13 gave them other names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class DeviceCollectives:
    """Each result is allocated here, and inputs are only read: what PyTorch does in place, it does on a copy.
    Transports take contiguous memory only.
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
            work.wait()  # of the current stream, for the transport's own; `work` holds what is sent until then
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


on_device = DeviceCollectives()
