"""Collective backends that are broken on purpose, each in one way. Ranks import them by the names in this file."""

from __future__ import annotations

import dataclasses
import os
import time

import torch
import torch.distributed as dist

from ospnext.backends.reference import MANIFEST
from ospnext.backends.reference.collective import HostCollectives
from ospnext.ops.registry import Manifest


def broken(name: str) -> Manifest:
    """The reference backend with the kernel `name` of this file in the place of its collectives."""
    (honest,) = MANIFEST.offers("collective")
    kernel = dataclasses.replace(honest, id=f"{name}.gloo", target=f"{__name__}:{name}")
    return dataclasses.replace(MANIFEST, backend=name, implementations=(kernel,))


class ZerosAfterTwoRanks(HostCollectives):
    """What ranks 2, 3, ... sent arrives as zeros."""

    def all_gather(self, x, group):
        out = super().all_gather(x, group)
        out[2 * len(x) :] = 0
        return out

    def all_to_all(self, x, send_splits, receive_splits, group):
        out = super().all_to_all(x, send_splits, receive_splits, group)
        out[sum(receive_splits[:2]) :] = 0
        return out


class SwappedPeers(HostCollectives):
    """What two ranks sent arrives in the wrong order, which the sizes of even parts do not show."""

    def all_to_all(self, x, send_splits, receive_splits, group):
        parts = super().all_to_all(x, send_splits, receive_splits, group).split(list(receive_splits))
        return torch.cat((parts[1], parts[0], *parts[2:]))


class StaleBuffer(HostCollectives):
    """A gather returns what the last one of the same shape received."""

    def __init__(self):
        self.last = {}

    def all_gather(self, x, group):
        out = super().all_gather(x, group)
        stale = self.last.get(x.shape, out)
        self.last[x.shape] = out
        return stale


class InPlace(HostCollectives):
    """Reduces into its input, and broadcasts without a copy."""

    def all_reduce(self, x, reduction, group):
        out = super().all_reduce(x, reduction, group)
        x.copy_(out)
        return out

    def broadcast(self, x, source, group):
        out = super().broadcast(x, source, group)
        return x if dist.get_rank(group) == source else out


class Hang(HostCollectives):
    """Rank 1 never enters the uneven exchange of bytes."""

    def all_to_all(self, x, send_splits, receive_splits, group):
        while x.dtype == torch.uint8 and send_splits[0] != send_splits[1] and dist.get_rank(group) == 1:
            time.sleep(1)
        return super().all_to_all(x, send_splits, receive_splits, group)


class Death(HostCollectives):
    """Rank 1 ends its process in the middle of a broadcast."""

    def broadcast(self, x, source, group):
        if dist.get_rank(group) == 1:
            os._exit(7)
        return super().broadcast(x, source, group)


zeros_after_2_ranks = ZerosAfterTwoRanks()
swapped_peers, stale_buffer, in_place = SwappedPeers(), StaleBuffer(), InPlace()
hang, death = Hang(), Death()
