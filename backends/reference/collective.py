"""`reference.gloo`: torch.distributed on the host. Tensors of a device travel through the CPU, so that any number of
ranks can share one; the group needs a backend for CPU tensors, such as "gloo" or "cpu:gloo,cuda:nccl".

The forms that take lists of tensors are used: those of one tensor change their names between versions of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

_REDUCTIONS = {"sum": ReduceOp.SUM, "max": ReduceOp.MAX}


class HostCollectives:
    """Each result is allocated here, and inputs are only read: what PyTorch does in place, it does on a copy."""

    def all_to_all(
        self, x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None
    ) -> Tensor:
        return self.start_all_to_all(x, send_splits, receive_splits, group)()

    def start_all_to_all(
        self, x: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], group: ProcessGroup | None
    ) -> Callable[[], Tensor]:
        sent = x.cpu().contiguous()
        out = sent.new_empty(sum(receive_splits), *x.shape[1:])
        work = dist.all_to_all_single(out, sent, list(receive_splits), list(send_splits), group=group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return out.to(x.device)

        return finish

    def all_gather(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        sent = x.cpu().contiguous()
        out = sent.new_empty(dist.get_world_size(group), *x.shape)
        dist.all_gather(list(out.unbind()), sent, group=group)
        return out.flatten(0, 1).to(x.device)

    def reduce_scatter(self, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ranks = dist.get_world_size(group)
        parts = x.cpu().contiguous().view(ranks, len(x) // ranks, *x.shape[1:])
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, list(parts.unbind()), group=group)
        return out.to(x.device)

    def all_reduce(self, x: Tensor, reduction: str, group: ProcessGroup | None) -> Tensor:
        out = _host_copy(x)
        dist.all_reduce(out, _REDUCTIONS[reduction], group=group)
        return out.to(x.device)

    def broadcast(self, x: Tensor, source: int, group: ProcessGroup | None) -> Tensor:
        out = _host_copy(x)
        dist.broadcast(out, group=group, group_src=source)
        return out.to(x.device)


def _host_copy(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype).copy_(x)


gloo = HostCollectives()
