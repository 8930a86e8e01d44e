"""Packed sequences as the host sees them. The vendor's kernels take their ends as Python integers, which are read from
the device in every call; sequences without queries or keys never reach a kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """Where the sequences that are computed lie among the tokens of queries, or of keys."""

    slices: tuple[slice, ...]
    tokens: int

    @property
    def lengths(self) -> list[int]:
        return [s.stop - s.start for s in self.slices]

    @property
    def ends(self) -> list[int]:
        """Cumulative lengths, without the leading 0 that cu_seqlens has."""
        return list(itertools.accumulate(self.lengths))

    @property
    def whole(self) -> bool:
        return sum(self.lengths) == self.tokens

    def take(self, t: Tensor, dim: int = 0) -> Tensor:
        """Tokens of these sequences, side by side."""
        return t if self.whole else torch.cat([t.narrow(dim, s.start, s.stop - s.start) for s in self.slices], dim)

    def put(self, t: Tensor, rest: float = 0.0, dim: int = 0) -> Tensor:
        """The inverse; all other tokens get `rest`."""
        if self.whole:
            return t
        shape = [*t.shape]
        shape[dim] = self.tokens
        out = t.new_full(shape, rest)
        for part, s in zip(t.split(self.lengths, dim), self.slices, strict=True):
            out.narrow(dim, s.start, s.stop - s.start).copy_(part)
        return out


@dataclass(frozen=True)
class Pack:
    """The sequences that have both queries and keys."""

    q: Side
    kv: Side

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """(rows of queries, rows of keys) of each."""
        return zip(self.q.slices, self.kv.slices, strict=True)

    def __len__(self) -> int:
        return len(self.q.slices)


def pack(q: Tensor, k: Tensor, cu_q: Tensor, cu_kv: Tensor) -> Pack:
    """Of packed tokens q and k with their cu_seqlens. Waits for the device in every call: nothing tells that a tensor
    holds what it held before, since writes through `.data` and by collectives leave its version as it is.

    Raises:
        ValueError: cu_seqlens do not start at 0, decrease, or do not end at the number of tokens.
    """
    q_ends = cu_q.tolist()
    kv_ends = q_ends if cu_kv is cu_q else cu_kv.tolist()
    _check(q_ends, q.shape[0], "q")
    _check(kv_ends, k.shape[0], "kv")
    return of_ends(q_ends, kv_ends)


def of_ends(q_ends: Sequence[int], kv_ends: Sequence[int]) -> Pack:
    """From ends that start at 0."""
    spans = zip(itertools.pairwise(q_ends), itertools.pairwise(kv_ends), strict=True)
    both = [(slice(*rows), slice(*keys)) for rows, keys in spans if rows[0] < rows[1] and keys[0] < keys[1]]
    rows, keys = zip(*both, strict=True) if both else ((), ())
    return Pack(Side(rows, q_ends[-1]), Side(keys, kv_ends[-1]))


def _check(ends: Sequence[int], tokens: int, name: str) -> None:
    if ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"attention: cu_seqlens_{name} must start at 0, not decrease and end at the number of tokens, {tokens}; "
            f"got {ends}"
        )
