"""Index plans of Skiparse-2D against brute force, token by token, from the definitions."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from ospnext.sparse import SkiparsePlan, skiparse_plan
from ospnext.sparse.skiparse import axis_count, cell_size

# Every pair of small sizes, and a few large ragged ones.
SMALL_SIZES = list(itertools.product(range(1, 13), repeat=2))
LARGE_SIZES = [(n, 7 * n % 40 + 1) for n in range(13, 41)]

RESOLUTIONS = {"480P": (21, 30, 52), "720P": (21, 45, 80), "768P": (21, 48, 80)}


def digits(n: int, k: int) -> tuple[int, int]:
    """(token digit d, group digit c) of n = a k^2 + c k + d, by counting."""
    d = c = 0
    for _ in range(n):
        d += 1
        if d == k:
            d, c = 0, c + 1
        if c == k:
            c = 0
    return d, c


DIGITS = {k: [digits(n, k) for n in range(81)] for k in (2, 3, 4)}


def ids(grid: tuple[int, int, int], k: int) -> list[tuple[int, int]]:
    """(token id, group id) of each token in raster order."""
    found = []
    for _, h, w in itertools.product(*map(range, grid)):
        (d_h, c_h), (d_w, c_w) = DIGITS[k][h], DIGITS[k][w]
        found.append((d_h * k + d_w, c_h * k + c_w))
    return found


def runs(values: list) -> list[tuple[object, int]]:
    return [(value, len(list(run))) for value, run in itertools.groupby(values)]


def assert_plan_is_right(plan: SkiparsePlan) -> None:
    k, pair_of = plan.k, ids(plan.grid, plan.k)
    everything = range(k * k)
    sizes = Counter(pair_of)
    assert plan.tokens == len(pair_of)
    assert plan.cell_sizes == tuple(tuple(sizes[s, g] for g in everything) for s in everything)

    for kind, first in (("token", 0), ("group", 1)):
        order = plan.order(kind)
        raster = order.raster.tolist()
        assert order.kind == kind
        # Cell-major: subsequences in turn, in each its cells in turn, in each the tokens in raster order.
        assert raster == sorted(range(len(raster)), key=lambda n: (pair_of[n][first], pair_of[n][1 - first], n))
        members = Counter(pair[first] for pair in pair_of)
        assert order.lengths == tuple(members[i] for i in everything)
        # ... hence each subsequence is one run of the stream, as long as it should be, and so is each cell.
        assert runs([pair_of[n][first] for n in raster]) == [(i, members[i]) for i in everything if members[i]]
        assert len(runs([pair_of[n] for n in raster])) == len(sizes)
        assert order.position[order.raster].tolist() == list(range(len(raster)))

    stream = {kind: plan.order(kind).raster for kind in ("token", "group")}
    for source, target in itertools.product(stream, repeat=2):
        assert torch.equal(stream[source][plan.switch(source, target)], stream[target])
    assert plan.switch("token", "group").tolist() == block_transpose(plan.cell_sizes)
    assert plan.switch("group", "token").tolist() == block_transpose(tuple(zip(*plan.cell_sizes, strict=True)))


def block_transpose(sizes: tuple[tuple[int, ...], ...]) -> list[int]:
    """Gather index from blocks stored row by row, of these sizes, to the same blocks column by column."""
    starts = iter(itertools.accumulate(itertools.chain.from_iterable(sizes), initial=0))
    start_of = [[next(starts) for _ in row] for row in sizes]
    rows, columns = range(len(sizes)), range(len(sizes[0]))
    return [start_of[r][c] + i for c in columns for r in rows for i in range(sizes[r][c])]


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_plans_of_all_small_grids(k, frames):
    for height, width in SMALL_SIZES:
        assert_plan_is_right(skiparse_plan((frames, height, width), k))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_plans_of_large_ragged_grids(k):
    for height, width in LARGE_SIZES:
        assert_plan_is_right(skiparse_plan((1, height, width), k))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_axis_counts(k):
    for n in range(81):
        counted = Counter(DIGITS[k][:n])
        for d, c in itertools.product(range(k), repeat=2):
            assert axis_count(n, d, c, k) == counted[d, c], (n, d, c)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_cell_sizes_are_products_of_axis_counts(k):
    """With the test above: right for every H and W in 1..40."""
    counted = [Counter(DIGITS[k][:n]) for n in range(41)]
    pairs = list(itertools.product(range(k * k), repeat=2))
    for height, width in itertools.product(range(1, 41), (1, 2, 7, 17, 23, 36, 39, 40)):
        for s, g in pairs:
            rows, columns = counted[height][s // k, g // k], counted[width][s % k, g % k]
            assert cell_size((5, height, width), k, s, g) == 5 * rows * columns


@pytest.mark.parametrize("kind", ["token", "group"])
@pytest.mark.parametrize(
    ("resolution", "lengths"),
    [
        ("720P", {"token": (19320, 19320, 18480, 18480), "group": (19320, 19320, 18480, 18480)}),
        ("480P", {"token": (8190,) * 4, "group": (8736, 8736, 7644, 7644)}),
        ("768P", {"token": (20160,) * 4, "group": (20160,) * 4}),
    ],
)
def test_lengths_at_the_published_resolutions(resolution, lengths, kind):
    order = skiparse_plan(RESOLUTIONS[resolution], 2).order(kind)
    assert order.lengths == lengths[kind]
    assert sum(order.lengths) == len(order.raster)


def test_lengths_follow_from_row_and_column_counts():
    """Token subsequences have ceil((n - p) / k) rows; group ones k floor(n / k^2) + clamp(n mod k^2 - p k, 0, k)."""
    for k, (height, width) in itertools.product((2, 3, 4), [(45, 80), (30, 52), (17, 23), (1, 5), (40, 39)]):
        plan = skiparse_plan((2, height, width), k)

        def token(n: int, p: int, k: int = k) -> int:
            return -(-(n - p) // k) if n > p else 0

        def group(n: int, p: int, k: int = k) -> int:
            return k * (n // k**2) + min(max(n % k**2 - p * k, 0), k)

        for count, order in ((token, plan.token), (group, plan.group)):
            expected = [2 * count(height, p) * count(width, q) for p in range(k) for q in range(k)]
            assert list(order.lengths) == expected


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("order", [("token", "group"), ("group", "token")])
def test_two_sparse_blocks_connect_every_pair_of_tokens(k, order):
    """On grids without pads: whatever attends to something that attends to me, in two hops, is everything."""
    for grid in ((1, k**2, k**2), (2, k**2, 2 * k**2)):
        pairs = torch.tensor(ids(grid, k))
        hops = []
        for kind in order:
            ids_N = pairs[:, 0 if kind == "token" else 1]
            hops.append((ids_N[:, None] == ids_N).float())
            assert not hops[-1].all()
        assert (hops[0] @ hops[1] > 0).all()
        # The plan says the same: no cell is empty.
        assert min(map(min, skiparse_plan(grid, k).cell_sizes)) > 0


def test_ratio_one_is_raster_order():
    plan = skiparse_plan((2, 3, 5), 1)
    for kind in ("token", "group"):
        assert plan.order(kind).raster.tolist() == list(range(30))
        assert plan.order(kind).lengths == (30,)
    assert plan.switch("token", "group").tolist() == list(range(30))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rank_spans_share_whole_subsequences(k):
    for grid in ((1, k**2, k**2), (3, 11, 7), (1, 1, 3), (1, 1, 1)):
        for order in (skiparse_plan(grid, k).token, skiparse_plan(grid, k).group):
            ends = [0, *itertools.accumulate(order.lengths)]
            for ranks in (n for n in range(1, k * k + 1) if k * k % n == 0):
                share = k * k // ranks
                expected = tuple((ends[r * share], ends[(r + 1) * share]) for r in range(ranks))
                assert order.rank_spans(ranks) == expected
                assert expected[0][0] == 0
                assert expected[-1][1] == len(order.raster)


@pytest.mark.parametrize(("k", "ranks"), [(2, 3), (2, 8), (2, 0), (2, -2), (3, 2), (3, 6), (4, 3), (4, 32)])
def test_ranks_that_do_not_divide_the_subsequences_are_refused(k, ranks):
    with pytest.raises(ValueError, match=f"{ranks} ranks cannot share {k * k} subsequences"):
        skiparse_plan((1, 8, 8), k).token.rank_spans(ranks)


@pytest.mark.parametrize(("grid", "k"), [((0, 4, 4), 2), ((1, 0, 4), 2), ((1, 4, -1), 2), ((1, 4, 4), 0)])
def test_empty_grids_and_ratios_are_refused(grid, k):
    with pytest.raises(ValueError, match="at least"):
        skiparse_plan(grid, k)


def test_plans_are_kept():
    assert skiparse_plan((1, 6, 5), 2) is skiparse_plan((1, 6, 5), 2)


def test_plans_do_not_depend_on_the_mode_they_are_first_asked_for_in(monkeypatch):
    """A plan serves the whole process, so the first caller's default device and inference mode must not stick to it."""
    monkeypatch.setattr("ospnext.sparse.skiparse._plans", {})
    with torch.device("meta"), torch.inference_mode():
        plan = skiparse_plan((1, 3, 5), 2)
        position = plan.token.position
    assert plan.token.raster.device == position.device == torch.device("cpu")
    assert not plan.token.raster.is_inference()
    assert_plan_is_right(plan)
