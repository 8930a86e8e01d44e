"""What ranks do in tests/test_rank_devices.py: they tell each other devices made up for the test, on a machine where
each sees one GPU, and return what follows. Ranks import this by the names in this file."""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace

import torch
import torch.distributed as dist

from ospnext.backends.cuda import MANIFEST
from ospnext.ops import collective, device, select
from ospnext.ops.policy import use_registry
from ospnext.ops.rank_devices import ranks_per_device, require_own_devices, tell_devices
from ospnext.ops.registry import DeviceInfo, Probe, Registry
from ospnext.parallel import mesh
from ospnext.parallel.config import ParallelConfig

#: All that a collective asks of a tensor until it runs.
X = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, numel=lambda: 64)


class OneGpu(Registry):
    """The backends of a process that sees one."""

    def probe(self, backend):
        return Probe(DeviceInfo("cuda", "a GPU", count=1, capability=(9, 0)))


@contextlib.contextmanager
def holding(held):
    """This rank holds what `held` says of it."""
    identity = device.Device.identity
    device.Device.identity = lambda self: held[dist.get_rank()]
    try:
        with use_registry(OneGpu([MANIFEST])):
            yield
    finally:
        device.Device.identity = identity


def found(group=None):
    """(ranks on one device, what a collective of the group would run)."""
    decisions = []
    select.observers.append(decisions.append)
    collective._decided._kernels.clear()
    collective._kernel("all_reduce", X, group, dist.get_world_size(group))
    select.observers.pop()
    return ranks_per_device("cuda", group), decisions[-1].chosen_id


def told(held, groups=()):
    """What is found before and after telling, for all ranks; then for each group that this rank is in."""
    made = [dist.new_group(ranks) for ranks in groups]
    with holding(held):
        before = found()
        tell_devices("cuda", 30)
        dist.barrier()  # rank 0 takes the store along when it ends
        mine = [one for one, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks]
        return before, found(), [found(one) for one in mine]


def on_hosts(hosts, indices, numbers):
    """What is found where `Device.identity` tells devices apart, by numbers on a host: their driver has no UUIDs."""
    rank = dist.get_rank()
    properties = SimpleNamespace(uuid="00000000-0000-0000-0000-000000000000")
    device._host = lambda: hosts[rank]
    device.torch = SimpleNamespace(
        device=torch.device,
        get_device_module=lambda _: SimpleNamespace(
            current_device=lambda: indices[rank],
            get_device_properties=lambda index: properties,
        ),
    )

    class Numbered(Registry):
        def probe(self, backend):
            return Probe(DeviceInfo("cuda", "a GPU", count=1, capability=(9, 0), numbers=numbers[rank]))

    with use_registry(Numbered([MANIFEST])):
        tell_devices("cuda", 30)
        dist.barrier()
        return found()


def set_up_twice(port, held_then, held_now):
    """What is found in the first set-up, then in the second before and after telling. Each has keys of its own in the
    store: gloo takes those of before for ranks that are there.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("first", store), rank=rank, world_size=ranks)
    _, first, _ = told(held_then)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("second", store), rank=rank, world_size=ranks)
    before, after, _ = told(held_now)
    return first, before, after


def required(held):
    """The error of ranks that each need a device."""
    said = None
    with holding(held):
        try:
            require_own_devices("cuda", 30)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    dist.barrier()
    return said


def meshed(layout, held):
    """(the warnings of a mesh, what is found in the group of a replica)."""
    mesh.transports = lambda device_type: "gloo"
    with holding(held), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = mesh.make_mesh(ParallelConfig(**layout), "cuda", 30)
        dist.barrier()
        return [str(one.message) for one in said], found(made.replica)
