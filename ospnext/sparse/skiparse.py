"""Skiparse-2D index plans: which token belongs to which subsequence, and in which order the stream holds them. Integers
only.

Write a coordinate in base k, h = a k^2 + c k + d. Its *token* digit is d = h mod k, its *group* digit c = (h // k) mod
k; w likewise. Tokens with equal token digits (d_h, d_w) form a token subsequence (a dilated grid), tokens with equal
group digits (c_h, c_w) a group subsequence (k x k tiles). The time axis is never split. Source: arXiv 2605.28691,
section on Skiparse-2D.

Order. cell(s, g) holds the tokens of token subsequence s and group subsequence g, in raster order. The token order
lists the cells s-major, the group order g-major. So each subsequence is contiguous, nothing is padded whatever H and W
are, and going from one order to the other is a transpose of k^2 x k^2 blocks. Inside a subsequence the order does not
matter to attention, because RoPE travels with the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

OrderKind = Literal["token", "group"]
Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Order:
    """One order of the stream. `raster[i]` is the raster index t H W + h W + w of the token at position i, int64 [N] on
    the CPU.
    """

    kind: OrderKind
    raster: Tensor
    #: Tokens of each of the k^2 subsequences, in stream order. Grids smaller than k leave some empty.
    lengths: tuple[int, ...]

    @property
    def position(self) -> Tensor:
        """int64 [N]: where each token, by raster index, stands in the stream; stream[position] is in raster order."""
        positions = torch.empty_like(self.raster)
        positions[self.raster] = torch.arange(len(self.raster), device=self.raster.device)
        return positions

    def rank_spans(self, ranks: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) of the stream held by each rank, when each holds the same number of whole subsequences."""
        if ranks < 1 or len(self.lengths) % ranks:
            raise ValueError(
                f"{ranks} ranks cannot share {len(self.lengths)} subsequences evenly: choose a divisor of that number"
            )
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        share = len(self.lengths) // ranks
        return tuple((ends[r * share], ends[(r + 1) * share]) for r in range(ranks))


@dataclass(frozen=True, eq=False)
class SkiparsePlan:
    """The orders of one token grid (T, H, W) with ratio k, and the way between them. k = 1 is the raster order
    itself.
    """

    grid: Grid
    k: int
    token: Order
    group: Order
    #: cell_sizes[s][g] = tokens shared by token subsequence s and group subsequence g.
    cell_sizes: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    def order(self, kind: OrderKind) -> Order:
        return self.token if kind == "token" else self.group

    def switch(self, source: OrderKind, target: OrderKind) -> Tensor:
        """int64 [N]: position in the `source` order of each token of the `target` order, so that target =
        source[switch].
        """
        return self.order(source).position[self.order(target).raster]


def subsequence_ids(grid: Grid, k: int) -> tuple[Tensor, Tensor]:
    """(token id, group id) of every token in raster order, int64 [N]: d_h k + d_w and c_h k + c_w."""
    _, height, width = grid
    h_N = torch.arange(height, device="cpu")[:, None].expand(grid).flatten()
    w_N = torch.arange(width, device="cpu").expand(grid).flatten()
    return h_N % k * k + w_N % k, h_N // k % k * k + w_N // k % k


def axis_count(n: int, token_digit: int, group_digit: int, k: int) -> int:
    """How many of the coordinates 0..n-1 have these two digits: ceil(max(0, n - d - c k) / k^2)."""
    return -(-max(0, n - token_digit - group_digit * k) // k**2)


def cell_size(grid: Grid, k: int, token_id: int, group_id: int) -> int:
    """Tokens shared by a token and a group subsequence, in closed form."""
    t, height, width = grid
    return t * axis_count(height, token_id // k, group_id // k, k) * axis_count(width, token_id % k, group_id % k, k)


_plans: dict[tuple[Grid, int], SkiparsePlan] = {}


def skiparse_plan(grid: Grid, k: int) -> SkiparsePlan:
    """The plan of a token grid (T, H, W) after patching; built once. Raises ValueError for an empty grid or k < 1."""
    # A plain dictionary: torch.compile traces through it, and not through functools.lru_cache.
    if (grid, k) not in _plans:
        # What is built here outlives the caller's mode: tensors of inference mode could never serve in training.
        with torch.inference_mode(False):
            _plans[grid, k] = _build(grid, k)
    return _plans[grid, k]


def _build(grid: Grid, k: int) -> SkiparsePlan:
    if k < 1 or min(grid) < 1:
        raise ValueError(f"a Skiparse plan needs a grid of at least (1, 1, 1) and k >= 1; got grid {grid}, k {k}")
    token_N, group_N = subsequence_ids(grid, k)
    count = k * k
    sizes = tuple(tuple(cell_size(grid, k, s, g) for g in range(count)) for s in range(count))
    token_lengths, group_lengths = (tuple(sum(row) for row in rows) for rows in (sizes, zip(*sizes, strict=True)))
    return SkiparsePlan(
        grid=grid,
        k=k,
        token=Order("token", torch.argsort(token_N * count + group_N, stable=True), token_lengths),
        group=Order("group", torch.argsort(group_N * count + token_N, stable=True), group_lengths),
        cell_sizes=sizes,
    )
