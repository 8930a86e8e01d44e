"""What the ranks that make one video together must have alike, bit for bit: text, noise, decisions, and at each step
the velocities of both branches of guidance; and what the first of them gets from all. How they share the tokens of a
branch is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ospnext.ops.collective import all_gather, all_reduce, all_to_all, broadcast

if TYPE_CHECKING:
    from ospnext.parallel.mesh import Mesh


class Replica:
    """The ranks of a mesh that make a video with this one; without a mesh, this process alone.

    The first of them has the text encoder, and the others receive what it encoded. It alone gets the video.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self._mesh = mesh

    @property
    def leads(self) -> bool:
        """Whether this is the rank that encodes text and gets the video."""
        return self._mesh is None or self._mesh.leads

    @property
    def ranks(self) -> int:
        return 1 if self._mesh is None else self._mesh.config.replica

    @property
    def rank(self) -> int:
        """Which of them this one is; the first leads."""
        return 0 if self._mesh is None else dist.get_rank(self._mesh.replica)

    @property
    def divides_branches(self) -> bool:
        return self._mesh is not None and self._mesh.config.cfg > 1

    @property
    def branch(self) -> int:
        """Which branch of guidance this rank computes, if they are divided: 0 is the conditional one."""
        return 0 if self._mesh is None else self._mesh.place.cfg

    def from_first(self, x: Tensor) -> Tensor:
        """The x of the first rank. Elsewhere it gives shape and dtype."""
        return x if self._mesh is None or self.ranks == 1 else broadcast(x, 0, self._mesh.replica)

    def to_first(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """On the first rank the x [rows[rank], ...] of all others, in rank order; no rows elsewhere. What the first one
        has does not travel, and nobody holds more than it needs.
        """
        assert self._mesh is not None
        to_others, nothing = [0] * (self.ranks - 1), [0] * self.ranks
        if self.leads:
            return all_to_all(x[:0], nothing, [0, *rows[1:]], self._mesh.replica)
        return all_to_all(x, [len(x), *to_others], nothing, self._mesh.replica)

    def all_agree(self, yes: bool, device: torch.device) -> bool:
        """Whether every rank says yes. What depends on a rank's free memory must not be decided by each alone."""
        if self._mesh is None or self.ranks == 1:
            return yes
        return not all_reduce(torch.tensor([float(not yes)], device=device), "max", self._mesh.replica).item()

    def of_branches(self, velocity_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """(conditional, unconditional), of which this rank has computed one."""
        assert self._mesh is not None
        v_cond, v_uncond = all_gather(velocity_BCTHW, self._mesh.branches).chunk(2)
        return v_cond, v_uncond
