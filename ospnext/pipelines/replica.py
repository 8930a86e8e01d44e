"""What the ranks that make one video together must have alike, bit for bit: text, noise, decisions, and at each step
the velocities of both branches of guidance. How they share the tokens of a branch is not known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ospnext.ops.collective import all_gather, all_reduce, broadcast

if TYPE_CHECKING:
    from ospnext.parallel.mesh import Mesh


class Replica:
    """The ranks of a mesh that make a video with this one; without a mesh, this process alone.

    The first of them has the text encoder and the autoencoder; the others receive what it encoded, and decode nothing.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self._mesh = mesh

    @property
    def leads(self) -> bool:
        """Whether this is the rank that encodes text and decodes latents."""
        return self._mesh is None or self._mesh.leads

    @property
    def divides_branches(self) -> bool:
        return self._mesh is not None and self._mesh.config.cfg > 1

    @property
    def branch(self) -> int:
        """Which branch of guidance this rank computes, if they are divided: 0 is the conditional one."""
        return 0 if self._mesh is None else self._mesh.place.cfg

    def from_first(self, x: Tensor) -> Tensor:
        """The x of the first rank. Elsewhere it gives shape and dtype."""
        return x if self._mesh is None or self._mesh.config.replica == 1 else broadcast(x, 0, self._mesh.replica)

    def all_agree(self, yes: bool, device: torch.device) -> bool:
        """Whether every rank says yes. What depends on a rank's free memory must not be decided by each alone."""
        if self._mesh is None or self._mesh.config.replica == 1:
            return yes
        return not all_reduce(torch.tensor([float(not yes)], device=device), "max", self._mesh.replica).item()

    def of_branches(self, velocity_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """(conditional, unconditional), of which this rank has computed one."""
        assert self._mesh is not None
        v_cond, v_uncond = all_gather(velocity_BCTHW, self._mesh.branches).chunk(2)
        return v_cond, v_uncond
