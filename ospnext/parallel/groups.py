"""The ranks that share one sample, as a model is told of them. Process groups are made elsewhere: see mesh.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ospnext.parallel.exchange import Payload

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """`ssp` groups own whole subsequences, the `ulysses` ranks of a group even parts of each. This is `rank` of the
    ssp x ulysses ranks of `group`, of which `ulysses_group` holds those that share its subsequences.
    """

    ssp: int
    ulysses: int
    rank: int
    group: ProcessGroup | None
    ulysses_group: ProcessGroup | None
    #: How tokens travel from one sparse block to the next.
    payload: Payload = "plain"

    @property
    def ranks(self) -> int:
        return self.ssp * self.ulysses

    @property
    def peers(self) -> range:
        """Ranks of `group` that share the subsequences of this one, itself among them."""
        first = self.rank - self.rank % self.ulysses
        return range(first, first + self.ulysses)
