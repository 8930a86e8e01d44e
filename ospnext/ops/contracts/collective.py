"""The collective family: how ranks exchange tensors. Request type and meaning; kernels and ops come with sequence
parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ospnext.ops.contract import Contract

MEANING = """\
all_to_all      rank r sends its i-th part to rank i; the result holds what rank 0, 1, ... sent, in that order. Parts
                may be uneven; the split sizes of both sides are part of the call, so that no size is exchanged at run
                time. Adjoint: the reverse exchange.
all_gather      concatenation over ranks in rank order. Adjoint: reduce_scatter (sum).
reduce_scatter  sum over ranks, of which rank r keeps its part. Adjoint: all_gather.
all_reduce      sum or maximum over ranks. The adjoint of the sum is the sum; the maximum has no gradient.
broadcast       the tensor of one rank. Adjoint: sum onto that rank.
Every member returns new memory, on one rank too."""


@dataclass(frozen=True)
class CollectiveRequest:
    """What selection knows of a call. `elements` counts what this rank contributes."""

    device_type: str
    dtype: torch.dtype
    operation: Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast"]
    ranks: int
    elements: int
    uneven: bool = False
    reduction: Literal["sum", "max"] = "sum"
    backward: bool = False


#: No contract yet: one is listed only once its op, oracle and cases exist.
CONTRACTS: tuple[Contract, ...] = ()
