"""The name by which the vendor's operators that communicate know a group. Collectives themselves are PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


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
