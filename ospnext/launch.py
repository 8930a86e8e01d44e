"""What torchrun tells a process that it starts. Imports no torch: a command asks before it knows what it will need."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """This process among `world` of a job, of which `local_world` run on this host."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def launched() -> Launch | None:
    """None for a process of its own, and for a job of one.

    LOCAL_RANK counts: platforms set RANK and WORLD_SIZE for hosts, too, in which torchrun has yet to start anything.
    """
    if "LOCAL_RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return None
    return Launch(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world=int(os.environ["LOCAL_WORLD_SIZE"]),
    )
