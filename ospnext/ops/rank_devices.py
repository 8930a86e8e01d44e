"""Which physical device each rank of the job holds. A process knows the devices that it sees, which may be its own
alone: whether two ranks hold the same one, they tell each other, once, when they make a mesh."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist

from ospnext.errors import CollectiveError, ConfigError
from ospnext.ops.device import Device
from ospnext.ops.group_store import group_of, meet, names_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class _Told:
    """The device of every rank of a job. The job is its default process group: the next one may have other ranks."""

    job: weakref.ref[ProcessGroup]
    devices: list[str]
    #: What was counted before, by group.
    most: weakref.WeakKeyDictionary[ProcessGroup, int] = field(default_factory=weakref.WeakKeyDictionary)

    def holders(self, ranks: Iterable[int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for rank in ranks:
            found.setdefault(self.devices[rank], []).append(rank)
        return found


#: By type of device.
_told: dict[str, _Told] = {}


def tell_devices(device_type: str, timeout: float) -> None:
    """Every rank of the job tells the others which device it holds: the current one of this type. All of them call
    this. It holds until the default process group is gone. Ranks share the CPU, and tell nothing of it.

    Raises:
        CollectiveError: ranks did not come within `timeout` seconds; it names them.
    """
    if device_type != "cpu":
        devices = meet("devices", Device(device_type).identity(), None, timeout)
        _told[device_type] = _Told(weakref.ref(group_of(None)), devices)


def ranks_per_device(device_type: str, group: ProcessGroup | None) -> int | None:
    """How many ranks of the group hold the same device, at most; None where they have not told each other."""
    told = _told_in_this_job(device_type)
    if told is None:
        return None
    group = group_of(group)
    found = told.most.get(group)
    if found is None:
        found = told.most[group] = max(map(len, told.holders(dist.get_process_group_ranks(group)).values()))
    return found


def sharing(device_type: str, ranks: Iterable[int]) -> dict[str, list[int]]:
    """The devices that several of these ranks of the job hold, and who; nothing where no rank has told."""
    told = _told_in_this_job(device_type)
    return {} if told is None else {device: held for device, held in told.holders(ranks).items() if len(held) > 1}


def in_words(shared: Mapping[str, list[int]]) -> str:
    """ "ranks 0, 1 on cuda 5c1f..."."""
    return "; ".join(f"{names_of(ranks)} on {device}" for device, ranks in shared.items())


def require_own_devices(device_type: str, timeout: float) -> None:
    """Refuse two ranks on one device. All ranks of the job call this.

    Raises:
        ConfigError: ranks share a device; the same message on each.
        CollectiveError: ranks did not come within `timeout` seconds; it names them.
    """
    tell_devices(device_type, timeout)
    if shared := sharing(device_type, range(dist.get_world_size())):
        with contextlib.suppress(CollectiveError):  # who has left already, and perhaps taken the store along, knew all
            meet("end of the devices", "", None, timeout)  # no rank may leave before all know
        raise ConfigError(
            f"each rank needs a device of its own, but there are {in_words(shared)}: start no more ranks on a host "
            "(--nproc-per-node) than it has devices, and let each see all of these, or one that no other sees"
        )


def _told_in_this_job(device_type: str) -> _Told | None:
    told = _told.get(device_type)
    return told if told is not None and told.job() is dist.group.WORLD else None
