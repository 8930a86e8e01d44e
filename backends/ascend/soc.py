"""Which generation of NPU a SoC name stands for. Nothing is probed here; limits of kernels are in predicates.py."""

from __future__ import annotations

import re
from typing import Literal

#: As the vendor's documents group them: Atlas A2, Atlas A3 and Ascend 950PR / 950DT.
Generation = Literal["910B", "910C", "950"]

#: Names that the driver tells. Plain "Ascend910B" and "Ascend910A" are chips of the generation before, with other
#: kernels.
_NAMES: tuple[tuple[str, Generation], ...] = (
    (r"Ascend910B\d.*", "910B"),
    (r"Ascend910_93.*", "910C"),
    (r"Ascend950.*", "950"),
)


def generation(soc: str) -> Generation | None:
    """Of a SoC name such as "Ascend910B3", "Ascend910_9382" or "Ascend950PR_9599"; None for any other."""
    return next((found for pattern, found in _NAMES if re.fullmatch(pattern, soc)), None)
