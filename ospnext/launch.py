"""What torchrun tells a process that it starts. Imports no torch: a command asks before it knows what it will need."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ospnext.errors import ConfigError


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

    Raises:
        ConfigError: only some of torchrun's variables are set.
    """
    if "LOCAL_RANK" not in os.environ:
        return None
    found = {
        "RANK": os.environ.get("RANK"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK"),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE"),
    }
    if missing := [name for name, value in found.items() if value is None]:
        raise ConfigError(
            f"LOCAL_RANK is set, as torchrun sets it, but not {', '.join(missing)}: start ranks with torchrun, or "
            "unset LOCAL_RANK"
        )
    rank, world, local_rank, local_world = (int(value) for value in found.values() if value is not None)
    return None if world == 1 else Launch(rank, world, local_rank, local_world)


def meeting_point() -> str:
    """ "HOST:PORT" where the ranks of the job find each other."""
    unknown = "(not set)"
    return f"{os.environ.get('MASTER_ADDR', unknown)}:{os.environ.get('MASTER_PORT', unknown)}"


def on_rank() -> str:
    """ " on rank 3" in a job of several ranks, for an error; empty otherwise, also in half an environment."""
    try:
        launch = launched()
    except ConfigError:
        return ""
    return "" if launch is None else f" on rank {launch.rank}"
