"""Questions that only a device can answer: behaviour that a vendor's documents leave open or that was never seen on
hardware, and what each answer means for a backend. The words only; `ospnext.conformance.acceptance` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ospnext.errors import OSPNextError

#: The answer of a device that does not take the call.
REFUSED = "refused"


class RefusedCallError(OSPNextError, RuntimeError):
    """The device refused the call that an item makes, which is an answer; the message is the device's own."""


class CannotAskError(OSPNextError, RuntimeError):
    """Nothing is wrong, but this machine lacks what the question takes; the message says what."""


@dataclass(frozen=True)
class Finding:
    """What a device answered: one of an item's answers, or other words, and the numbers behind it as JSON types."""

    answer: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: "family/question", stable.
        question: one sentence that ends in a question mark.
        why: which implementation or predicate relies on the answer.
        calls: the vendor's operators that are called.
        expected: answers that change nothing -> what they allow ("" where they allow nothing new).
        otherwise: other answers -> what to change in the project: a file, or a setting of OSPNEXT_OPS.
        unforeseen: what to do about any other answer.
        ask: takes the device and finds the answer. Raises RefusedCallError, CannotAskError, or anything that goes
            wrong: the item then could not run.
        seconds: about how long it takes on a device.
        hardware_only: why an emulated device cannot answer; "" where it can.
    """

    id: str
    question: str
    why: str
    calls: tuple[str, ...]
    expected: Mapping[str, str]
    otherwise: Mapping[str, str]
    unforeseen: str
    ask: Callable[[torch.device], Finding]
    seconds: float = 5.0
    hardware_only: str = ""
