"""Sequence parallelism: ranks that share one sample, by whole subsequences (SSP) and by heads (Ulysses)."""

from ospnext.parallel.exchange import Exchange, Gather
from ospnext.parallel.groups import SequenceParallel
from ospnext.parallel.placement import Placement, Switch, first_placement, switch
from ospnext.parallel.ulysses import Ulysses, arranged

__all__ = [
    "Exchange",
    "Gather",
    "Placement",
    "SequenceParallel",
    "Switch",
    "Ulysses",
    "arranged",
    "first_placement",
    "switch",
]
