"""`reference.gloo`: torch.distributed on the group it is given; on CPUs that is gloo, which needs no device.

The forms that take lists of tensors are used: those of one tensor change their names between versions of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

_REDUCTIONS = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}


class TorchCollectives:
    """Each result is allocated here, and inputs are only read: what PyTorch does in place, it does on a copy."""

    def all_to_all(
        self, x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None
    ) -> Tensor:
        out = x.new_empty(sum(receive_splits), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive_splits), list(send_splits), group=group)
        return out

    def all_gather(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        out = x.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
        return out.flatten(0, 1)

    def reduce_scatter(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ranks = dist.get_world_size(group)
        parts = x.contiguous().view(ranks, len(x) // ranks, *x.shape[1:])
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, list(parts.unbind()), group=group)
        return out

    def all_reduce(self, x: Tensor, reduction: str, group: ProcessGroup | None) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, _REDUCTIONS[reduction], group=group)
        return out

    def broadcast(self, x: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(out, group=group, group_src=source)
        return out


gloo = TorchCollectives()
