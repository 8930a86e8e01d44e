"""The mesh of a job: which ranks do what, and the process groups in which they exchange. Sizes are in config.py; what
travels is decided by those who are given a group.
"""

from __future__ import annotations

import datetime
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ospnext.ops.collective_detour import detour
from ospnext.ops.rank_devices import tell_devices
from ospnext.parallel.config import DIMENSIONS, ParallelConfig
from ospnext.parallel.exchange import Payload
from ospnext.parallel.groups import SequenceParallel


class Place(NamedTuple):
    """Where a rank is in the mesh."""

    dp: int
    cfg: int
    ssp: int
    ulysses: int


@dataclass(frozen=True, eq=False)
class Mesh:
    """The job as one of its ranks sees it.

    `replica` are the ranks that make a video with this one, `branches` those that hold the same tokens, one for each
    branch of guidance; `sequence` is None where this rank holds all tokens. `devices` has the dimensions of
    `DIMENSIONS`, for what takes a DeviceMesh.
    """

    config: ParallelConfig
    place: Place
    devices: DeviceMesh
    replica: ProcessGroup
    branches: ProcessGroup
    sequence: SequenceParallel | None

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its replica: the first of it."""
        return not any(self.place[1:])


def make_mesh(config: ParallelConfig, device_type: str, timeout: float, payload: Payload = "plain") -> Mesh:
    """The mesh of all ranks of the job; each of them must call this. The default process group may be of any transport.

    A rank must have made its device the current one: ranks tell each other here which physical device that is. Where
    those of a sample share one, so that they cannot exchange the way their backend prefers, the first rank warns.

    Args:
        timeout: seconds after which a collective of one of the groups fails.

    Raises:
        ValueError: the job has another number of ranks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if config.world != world:
        raise ValueError(f"{config} is a mesh of {config.world} ranks, the job has {world}")
    tell_devices(device_type, timeout)
    grid = torch.arange(world, device="cpu").view(config.sizes)
    if rank == 0 and (said := detour(device_type, grid.flatten(1).tolist())):
        warnings.warn(said, stacklevel=2)
    place = Place(*(int(i) for i in (grid == rank).nonzero()[0]))
    groups = {name: _group_along(grid, (i,), device_type, timeout) for i, name in enumerate(DIMENSIONS)}
    replica = _group_along(grid, (1, 2, 3), device_type, timeout)
    sequence = None
    if config.sequence > 1:
        together = _group_along(grid, (2, 3), device_type, timeout)
        sequence = SequenceParallel(
            config.ssp, config.ulysses, dist.get_rank(together), together, groups["ulysses"], payload
        )
    # Not `init_device_mesh`: the groups that it makes have PyTorch's timeout, whatever the job's is.
    devices = DeviceMesh.from_group(list(groups.values()), device_type, grid, mesh_dim_names=DIMENSIONS)
    return Mesh(config, place, devices, replica, groups["cfg"], sequence)


def _group_along(grid: torch.Tensor, dimensions: tuple[int, ...], device_type: str, timeout: float) -> ProcessGroup:
    """The group of this rank, of those that differ in these dimensions only. All ranks make all groups."""
    others = [i for i in range(grid.ndim) if i not in dimensions]
    mine = None
    for ranks in (
        grid.permute(*others, *dimensions).reshape(-1, *(grid.shape[i] for i in dimensions)).flatten(1).tolist()
    ):
        made = dist.new_group(ranks, datetime.timedelta(seconds=timeout), transports(device_type))
        mine = made if dist.get_rank() in ranks else mine
    assert mine is not None
    return mine


def transports(device_type: str) -> str:
    """What carries tensors of a device, and beside it those of the CPU: a backend may send through the host."""
    own = dist.get_default_backend_for_device(device_type)
    return own if device_type == "cpu" else f"cpu:{dist.get_default_backend_for_device('cpu')},{device_type}:{own}"
