"""The words of the suite: a check, what it is run on, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ospnext.ops.contract import Contract, Level
from ospnext.ops.tolerance import Verdict

#: "unsupported" exists for optional and extension checks only. There is no skip: what cannot be run is not generated.
Status = Literal["pass", "fail", "unsupported", "waived", "error"]


class CheckFailure(AssertionError):
    """The backend broke its contract; the message says which sentence and how."""


@dataclass(frozen=True)
class Target:
    """What a check is run on. `implementation` is None for checks of the backend as a whole."""

    backend: str
    device: torch.device
    implementation: str | None = None


@dataclass(frozen=True)
class Check:
    """One line of the must-pass list. `run` returns verdicts by name, or raises CheckFailure.

    With a `contract` and a `request`, the check is run on every implementation that takes the request; without, once.
    `group` names what checks next to each other share (an oracle), so that a shard keeps them together."""

    id: str
    level: Level
    run: Callable[[Target], Mapping[str, Verdict]]
    contract: Contract | None = None
    request: Any = None
    group: str = ""
    #: Only the implementation that the backend chooses is run.
    costly: bool = False


@dataclass(frozen=True)
class Result:
    """What came of one check on one implementation. `decision` is an index into the report's decisions."""

    id: str
    level: Level
    status: Status
    implementation: str | None = None
    #: Whether the policy "this backend" takes this implementation, or another check asked for it by name.
    chosen: bool = True
    message: str = ""
    reasons: tuple[str, ...] = ()
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    decision: int | None = None
    seconds: float = 0.0

    @property
    def ratio(self) -> float | None:
        """The worst error over its bound, where the check has bounds."""
        return max((v.ratio for v in self.verdicts.values()), default=None)
