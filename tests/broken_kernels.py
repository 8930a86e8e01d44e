"""Backends that are broken on purpose, each in one way, and the checks that must find each: so the suite itself
is tested by them.
"""

from __future__ import annotations

import mutants_of_attention
import mutants_of_fused
import mutants_of_quantize
import mutants_of_selection
from mutant import Mutant

_FOUND = (
    *mutants_of_attention.MUTANTS,
    *mutants_of_fused.MUTANTS,
    *mutants_of_quantize.MUTANTS,
    *mutants_of_selection.MUTANTS,
)
MUTANTS: dict[str, Mutant] = dict(_FOUND)
assert len(MUTANTS) == len(_FOUND)

#: Found by no check so far.
UNSEEN: dict[str, Mutant] = dict((*mutants_of_attention.UNSEEN, *mutants_of_fused.UNSEEN))
