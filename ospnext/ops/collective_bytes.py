"""How many bytes the collectives of a block of code send. Counting is off unless `count_bytes` is in force, and nothing
here knows of transports.

A rank sends, of its x of B bytes among R ranks, to the others (what stays with it is not counted):

    all_to_all      B without the part for itself
    all_gather      (R - 1) B
    reduce_scatter  B - B / R
    all_reduce      2 (B - B / R), as a reduce_scatter and an all_gather of the parts
    broadcast       (R - 1) B from the source, 0 from the others

That is what the meaning of the call makes necessary where each part travels once; a transport may send more in rounds,
or less where the network copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from ospnext.ops.contracts.collective import Operation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: An operation, and the ranks of its group as the whole job counts them.
Key = tuple[str, tuple[int, ...]]


class Counted:
    """What this rank called and sent, per operation and group. Calls on one rank send nothing and are not counted."""

    def __init__(self) -> None:
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    def total_calls(self, operation: str | None = None) -> int:
        """Calls of one operation, or of all."""
        return sum(n for (name, _), n in self.calls.items() if operation in (None, name))

    def total_bytes(self, operation: str | None = None) -> int:
        """Bytes sent by one operation, or by all."""
        return sum(n for (name, _), n in self.bytes.items() if operation in (None, name))

    def __str__(self) -> str:
        rows = [
            f"{name} on ranks {', '.join(map(str, ranks))}: {calls} calls, {self.bytes[name, ranks]} bytes"
            for (name, ranks), calls in self.calls.items()
        ]
        return "\n".join(rows) or "no collective was called"


#: The counts in force, outermost first; of the whole process, since backward passes run on threads of their own.
counts: list[Counted] = []


@contextmanager
def count_bytes() -> Iterator[Counted]:
    """Count what the collectives send until the end of the block, those of backward passes in it included."""
    counted = Counted()
    counts.append(counted)
    try:
        yield counted
    finally:
        counts.remove(counted)


def add(operation: Operation, group: ProcessGroup | None, sent: int) -> None:
    key = (operation, tuple(dist.get_process_group_ranks(group)))
    for counted in counts:
        counted.calls[key] += 1
        counted.bytes[key] += sent


def sent_bytes(operation: Operation, x: Tensor, ranks: int, *, own_rows: int = 0, is_source: bool = True) -> int:
    """Bytes that a rank with this x sends to others. `own_rows` of an all_to_all stay with it."""
    held = x.numel() * x.itemsize
    if operation == "all_to_all":
        return held - held * own_rows // max(1, len(x))
    if operation == "all_gather":
        return held * (ranks - 1)
    if operation == "broadcast":
        return held * (ranks - 1) if is_source else 0
    parts = held - held // ranks
    return 2 * parts if operation == "all_reduce" else parts
