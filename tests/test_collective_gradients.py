"""The gradients of collectives among real ranks, against central differences in fp64; and what of them is counted and
waited for."""

from __future__ import annotations

import gradients_of_collectives as on_a_rank
import pytest
import torch
from rank_processes import results, run_ranks

from ospnext.ops import collective

#: Central differences of sums near 100 with steps of 1e-6 are right to 100 * 2^-53 / 1e-6, with room for ten of these.
DIFFERENCES = 1e-7


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_and_second_gradients_are_those_of_the_total_over_ranks(ranks: int) -> None:
    for found in results(run_ranks(on_a_rank.numeric_and_analytic, ranks)):
        assert list(found) == ["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast"]
        for name, orders in found.items():
            for order, (numeric, analytic) in orders.items():
                assert analytic.shape == numeric.shape
                assert (analytic - numeric).abs().max() < DIFFERENCES, f"{order} gradient of {name}"


def test_bytes_sent_to_others_are_counted_forward_and_backward() -> None:
    """On ranks 0 to 2, which exchange 3, 1, 4 rows from rank 0, 0, 3, 1 from rank 1 and 2, 0, 3 from rank 2."""
    assert on_a_rank.uneven(3) == [[3, 1, 4], [0, 3, 1], [2, 0, 3]]
    row = 4 * 4  # fp32
    expected = {
        "all_to_all": [(5 * row, 2 * row), (1 * row, 1 * row), (2 * row, 5 * row)],
        "all_gather": [(2 * 2 * row, 2 * 2 * row)] * 3,  # backward: two of three parts of two rows
        "reduce_scatter": [(2 * 2 * row, 2 * 2 * row)] * 3,
        "all_reduce": [(2 * 2 * row, 2 * 2 * row)] * 3,  # two of three rows, twice
        "broadcast": [(0, 2 * 2 * row), (0, 2 * 2 * row), (2 * 3 * row, 2 * 2 * row)],
        "pair": [(16, 16), (0, 0), (16, 16)],  # 8 numbers of 2 bytes, half of them twice
    }
    found = results(run_ranks(on_a_rank.counted, 3))
    for name, of_ranks in expected.items():
        for rank, sent in enumerate(of_ranks):
            forward, backward = found[rank][name]
            assert (forward[1], backward[1]) == sent, f"{name} on rank {rank}"
            if name != "pair":
                assert (forward[0], backward[0]) == (1, 1)
    adjoints = [list(found[1][name][1][2]) for name in ("all_to_all", "all_gather", "reduce_scatter", "broadcast")]
    assert adjoints == [[(n, (0, 1, 2))] for n in ("all_to_all", "reduce_scatter", "all_gather", "all_reduce")]
    assert list(found[2]["pair"][0][2]) == [("all_reduce", (0, 2))]


def test_two_exchanges_may_be_on_their_way() -> None:
    for rank, both in enumerate(results(run_ranks(on_a_rank.two_in_flight, 2))):
        assert both == [[10.0, 11.0, 0.0, 1.0]] * 2, f"rank {rank}"


def test_one_rank_has_gradients_and_nothing_to_count() -> None:
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    with collective.count_bytes() as counted:
        for out in (
            collective.all_to_all(x, [3], [3]),
            collective.all_gather(x),
            collective.reduce_scatter(x),
            collective.all_reduce(x),
            collective.broadcast(x, 0),
        ):
            grad_out = torch.rand(3, 2)
            assert torch.equal(torch.autograd.grad(out, x, grad_out)[0], grad_out)
        assert torch.equal(collective.all_to_all(x.detach(), [3], [3], async_op=True).wait(), x)
    assert (counted.total_calls(), str(counted)) == (0, "no collective was called")


def test_what_has_no_gradient_is_refused_on_one_rank_too() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"maximum over ranks has no gradient; give it x\.detach"):
        collective.all_reduce(x, "max")
    with pytest.raises(ValueError, match="async_op has no gradient"):
        collective.all_to_all(x, [3], [3], async_op=True)
    with torch.no_grad():
        assert torch.equal(collective.all_reduce(x, "max"), x)
        assert torch.equal(collective.all_to_all(x, [3], [3], async_op=True).wait(), x)
