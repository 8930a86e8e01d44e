"""Packed sequences as the host sees them. The vendor's kernels take their ends as Python integers, so that each tensor
of ends is read once; sequences without queries or keys never reach a kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: cu_seqlens -> (its version, the ends it held then). A model keeps its cu_seqlens, so that only first calls wait.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
    """Of packed tokens q and k with their cu_seqlens. Waits for the device where these were not seen before.

    Raises:
        ValueError: cu_seqlens do not start at 0, decrease, or do not end at the number of tokens.
    """
    return of_ends(_ends(cu_q, q.shape[0], "q"), _ends(cu_kv, k.shape[0], "kv"))


def of_ends(q_ends: Sequence[int], kv_ends: Sequence[int]) -> Pack:
    """From ends that start at 0."""
    spans = zip(itertools.pairwise(q_ends), itertools.pairwise(kv_ends), strict=True)
    both = [(slice(*rows), slice(*keys)) for rows, keys in spans if rows[0] < rows[1] and keys[0] < keys[1]]
    rows, keys = zip(*both, strict=True) if both else ((), ())
    return Pack(Side(rows, q_ends[-1]), Side(keys, kv_ends[-1]))


def _ends(cu_seqlens: Tensor, tokens: int, name: str) -> list[int]:
    ends = _read(cu_seqlens)
    if ends[0] != 0 or ends[-1] != tokens or any(b < a for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"attention: cu_seqlens_{name} must start at 0, not decrease and end at the number of tokens, {tokens}; "
            f"got {ends}"
        )
    return ends


def _read(cu_seqlens: Tensor) -> list[int]:
    """Waits for the device, unless this very tensor was read and not written since."""
    if cu_seqlens.is_inference():  # counts no versions: whether it was written cannot be told
        return cu_seqlens.tolist()
    found = _known.get(cu_seqlens)
    if found is None or found[0] != cu_seqlens._version:
        found = _known[cu_seqlens] = (cu_seqlens._version, cu_seqlens.tolist())
    return found[1]
