"""What torchrun tells a process that it starts. Imports no torch: a command asks before it knows what it will need."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ospnext.errors import ConfigError


_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


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
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ConfigError(
            f"LOCAL_RANK is set, as torchrun sets it, but not {', '.join(missing)}: start ranks with torchrun, or unset "
            "LOCAL_RANK"
        )
    if os.environ["WORLD_SIZE"] == "1":
        return None
    return Launch(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world=int(os.environ["LOCAL_WORLD_SIZE"]),
    )


def on_rank() -> str:
    """ " on rank 3" in a job of several ranks, for an error; empty otherwise, also where the environment is in disorder."""
    try:
        launch = launched()
    except ConfigError:
        return ""
    return "" if launch is None else f" on rank {launch.rank}"
