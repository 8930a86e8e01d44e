"""The mesh over which parameters are sharded: all ranks of a job, however they divide its samples. Which parameters
are sharded together is decided in models/sharding.py.
"""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ospnext.errors import ConfigError
from ospnext.parallel.mesh import transports


def fsdp_mesh(device_type: str, timeout: float, *, replicas: int = 1) -> DeviceMesh:
    """Of all ranks of the job; each of them must call this.

    It does not depend on how the ranks share samples: all of them compute a loss, and the mean of their gradients is
    the gradient of the mean loss, whatever the number of ranks of a sample.

    Args:
        timeout: seconds after which a collective of one of the groups fails.
        replicas: of the parameters. With more than one, each is sharded over world / replicas ranks that are next to
            each other, and only gradients go from one to the other (HSDP).

    Raises:
        ConfigError: the ranks cannot be divided by `replicas`.
    """
    world = dist.get_world_size()
    if replicas < 1 or world % replicas:
        raise ConfigError(f"replicas must divide the {world} ranks of the job, got {replicas}")
    grid = torch.arange(world, device="cpu").view(replicas, -1)
    sharded = _mine(grid, device_type, timeout)
    if replicas == 1:
        return DeviceMesh.from_group(sharded, device_type, mesh_dim_names=("shard",))
    return DeviceMesh.from_group(
        [_mine(grid.T, device_type, timeout), sharded], device_type, grid, mesh_dim_names=("replicate", "shard")
    )


def _mine(rows: torch.Tensor, device_type: str, timeout: float) -> dist.ProcessGroup:
    """The group of this rank, of one for each row. All ranks make all groups."""
    mine = None
    for ranks in rows.tolist():
        made = dist.new_group(ranks, datetime.timedelta(seconds=timeout), transports(device_type))
        mine = made if dist.get_rank() in ranks else mine
    assert mine is not None
    return mine
