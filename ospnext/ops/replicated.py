"""Tensors that several ranks compute alike and use for different things: each has a part of their gradient only."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from ospnext.ops.collective import all_reduce
from ospnext.ops.collective_gradients import wants_gradient, with_adjoint

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def replicated(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, whose gradient becomes the mean of those of all ranks of the group, on each of them.

    What quantizes a gradient on its way back has to see the whole, as one process does.
    """
    return with_adjoint(x, Tensor.clone, partial(_mean, group=group)) if wants_gradient(x) else x


def _mean(grad: Tensor, group: ProcessGroup) -> Tensor:
    return all_reduce(grad, "sum", group) / dist.get_world_size(group)
