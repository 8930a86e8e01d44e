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

    def start_all_to_all(self, x, send_splits, receive_splits, group):
        finish = super().start_all_to_all(x, send_splits, receive_splits, group)

        def finish_and_zero():
            out = finish()
            out[sum(receive_splits[:2]) :] = 0
            return out

        return finish_and_zero


class SwappedPeers(HostCollectives):
    """What two ranks sent arrives in the wrong order, which the sizes of even parts do not show."""

    def start_all_to_all(self, x, send_splits, receive_splits, group):
        finish = super().start_all_to_all(x, send_splits, receive_splits, group)

        def finish_and_swap():
            parts = finish().split(list(receive_splits))
            return torch.cat((parts[1], parts[0], *parts[2:]))

        return finish_and_swap


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


class OwnSlice(HostCollectives):
    """A reduce_scatter keeps this rank's part of its own x: the backward of a gather that only slices."""

    def reduce_scatter(self, x, group):
        return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()


class OneBuffer(HostCollectives):
    """Exchanges receive in one buffer per shape: right, as long as one at a time is on its way."""

    def __init__(self):
        self.buffers = {}

    def start_all_to_all(self, x, send_splits, receive_splits, group):
        finish, key = super().start_all_to_all(x, send_splits, receive_splits, group), (sum(receive_splits), x.dtype)
        self.buffers[key] = finish()
        return lambda: self.buffers[key].clone()


class AssumesContiguous(HostCollectives):
    """Sends memory in order, whatever the strides say."""

    def start_all_to_all(self, x, send_splits, receive_splits, group):
        return super().start_all_to_all(in_memory_order(x), send_splits, receive_splits, group)

    def reduce_scatter(self, x, group):
        return super().reduce_scatter(in_memory_order(x), group)


def in_memory_order(x):
    return x.as_strided(x.shape, torch.empty(x.shape).stride())


class Hang(HostCollectives):
    """Rank 1 never enters the even exchange of bytes, which one case has."""

    def all_to_all(self, x, send_splits, receive_splits, group):
        while x.dtype == torch.uint8 and send_splits[0] == send_splits[1] and dist.get_rank(group) == 1:
            time.sleep(1)
        return super().all_to_all(x, send_splits, receive_splits, group)


class Death(HostCollectives):
    """Rank 1 ends its process in the middle of a maximum, which one case has."""

    def all_reduce(self, x, reduction, group):
        if reduction == "max" and dist.get_rank(group) == 1:
            os._exit(7)
        return super().all_reduce(x, reduction, group)


zeros_after_2_ranks = ZerosAfterTwoRanks()
swapped_peers, stale_buffer, in_place = SwappedPeers(), StaleBuffer(), InPlace()
own_slice, one_buffer, assumes_contiguous = OwnSlice(), OneBuffer(), AssumesContiguous()
hang, death = Hang(), Death()
