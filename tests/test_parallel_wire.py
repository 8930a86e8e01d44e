"""The formulas for what ranks send, against what they do send, and the savings of SSP that follow from them."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from rank_processes import results, run_ranks
from wire_counts import CASES, QUANTIZED, Case, Sent, sent_in_every_case

from ospnext.errors import ConfigError
from ospnext.models.config import preset
from ospnext.models.memory import activation_peak, exchange_peak
from ospnext.models.traffic import (
    Traffic,
    forward_traffic,
    gradient_scales,
    placements,
    published_traffic,
    shared_scales,
    training_traffic,
    without_sparsity,
)
from ospnext.models.weights.quantized import Quantization
from ospnext.parallel.wire import reduced, switch, total_sent, ulysses
from ospnext.sparse.skiparse import cell_size

P14, GRID_720P, GRID_768P = preset("14B"), (21, 45, 80), (21, 48, 80)
EVERY = [pytest.param(world, case, id=case.id) for world, cases in CASES.items() for case in cases]
TRAINED = [parameter for parameter in EVERY if parameter.values[1].training]


@functools.cache
def counted(world: int) -> list[dict[str, Sent]]:
    """By rank. Processes start once for all cases of a size."""
    return results(run_ranks(sent_in_every_case, world, world, limit=120.0))


def quantization(case: Case) -> Quantization:
    return Quantization.of([QUANTIZED] if case.quantized else [], case.config.num_layers)


def formulas(case: Case, training: bool = False) -> Traffic:
    return forward_traffic(
        case.config,
        case.grid,
        case.ssp,
        case.ulysses,
        batch=case.batch,
        dtype=case.dtype,
        payload=case.payload,
        shared_scales=shared_scales(case.config, quantization(case), training=training),
    )


@pytest.mark.parametrize(("world", "case"), EVERY)
def test_bytes_of_each_block_and_of_a_forward_are_those_counted(world: int, case: Case) -> None:
    told = formulas(case)
    blocks = [total_sent(block, world) for block in told.blocks]
    for rank, found in enumerate(of_case[case.id] for of_case in counted(world)):
        assert found.blocks == tuple(block[rank] for block in blocks)
        assert found.forward == told.sent[rank]
        assert found.calls == len(told.transfers)
    assert any(told.sent)


@pytest.mark.parametrize(("world", "case"), TRAINED)
def test_bytes_of_a_training_step_are_those_counted(world: int, case: Case) -> None:
    found = [of_case[case.id] for of_case in counted(world)]
    for checkpointed in (False, True):
        told = training_traffic(
            formulas(case, training=True),
            case.config,
            batch=case.batch,
            dtype=case.dtype,
            checkpointed=checkpointed,
            gradient_scales=gradient_scales(case.config, quantization(case)),
        )
        said = [sent.trained_checkpointed if checkpointed else sent.trained for sent in found]
        assert said == list(total_sent(told, world))


@pytest.mark.parametrize(("world", "case"), [p for p in EVERY if p.values[1].dim > 64])
def test_the_memory_of_an_exchange_is_what_lives_in_a_forward(world: int, case: Case) -> None:
    """Where channels are more than those of a patch, so that blocks are what needs most."""
    held, whole = placements(case.config, case.grid, case.ssp, case.ulysses), math.prod(case.grid)
    for rank, found in enumerate(of_case[case.id] for of_case in counted(world)):
        tokens = max(placement.tokens[rank] for placement in held.values())
        told = exchange_peak(case.config, tokens, whole, case.ssp, case.ulysses, case.dtype)
        assert told > sum(activation_peak(case.config, (1, 1, tokens), 1, case.dtype).values())
        assert told == pytest.approx(found.live, rel=0.01)


# ---- what follows


def v(tokens: int, ranks: int) -> float:
    """s B C (N / R) (1 - 1 / R) of the 14B model in bf16."""
    return 2 * P14.dim * tokens / ranks * (1 - 1 / ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_switch_sends_a_quarter_of_what_ulysses_sends(ranks: int) -> None:
    """The published 75 % of volume, and two exchanges (of q, k and v together, and of the output) against one. On a
    padded grid, where parts are even, it is exact."""
    tokens = 21 * 48 * 80
    qkv, out = ulysses([tokens // ranks] * ranks, P14.num_heads, P14.head_dim * 2)
    held = placements(P14, GRID_768P, ranks, 1)
    one = switch(held["token"], held["group"], P14.dim * 2)
    for a, b, c in zip(qkv.sent, out.sent, one.sent, strict=True):
        assert (a, b, c) == (3 * v(tokens, ranks), v(tokens, ranks), v(tokens, ranks))
        assert 1 - c / (a + b) == 0.75


def test_padding_costs_a_part_of_the_75_percent() -> None:
    told = published_traffic(P14, GRID_720P, 4)
    full, sparse = (sum(t.sent[0] for t in told.blocks[i]) for i in (0, 5))
    assert 1 - sparse / full == pytest.approx(0.733, abs=5e-4)


def test_a_whole_forward_sends_61_percent_less_than_wan() -> None:
    """14B, 720P, four ranks. What was published saves 54 %, more of it in transitions that are none here."""
    wan = forward_traffic(without_sparsity(P14), GRID_720P, 1, 4)
    published = published_traffic(P14, GRID_720P, 4)
    ours, eight_bits = (forward_traffic(P14, GRID_720P, 4, 1, payload=p) for p in ("plain", "hif8"))
    head = 3 * 18900 * 64 * 2  # the output to everyone, which the whole forwards have and the blocks have not
    assert [x.sent[0] - head for x in (wan, published)] == [160 * v(75600, 4), pytest.approx(10.645e9, rel=1e-4)]
    saved = {name: 1 - t.mean_sent / wan.mean_sent for name, t in (("published", published), ("ours", ours))}
    assert saved["published"] == pytest.approx(0.5415, abs=1e-4)
    assert saved["ours"] == pytest.approx(0.6075, abs=1e-4)
    assert 1 - eight_bits.mean_sent / wan.mean_sent == pytest.approx(0.7035, abs=1e-4)
    assert 1 - max(ours.sent) / max(wan.sent) > 0.60  # of the rank that sends most
    assert len(ours.transfers) == 8 * 2 + 31 + 1
    assert len(wan.transfers) == 40 * 2 + 1


def test_training_repeats_ulysses_but_no_switch() -> None:
    """3 x 4 V against 2 V in checkpointed blocks, which is 83 % less."""
    wan = forward_traffic(without_sparsity(P14), GRID_768P, 1, 4)
    ours = forward_traffic(P14, GRID_768P, 4, 1)
    for traffic, block, volumes in ((wan, 0, 12), (ours, 10, 2)):
        one = Traffic(4, (traffic.blocks[block],), ())
        moved = training_traffic(one, P14, checkpointed=True)
        exchanged = [transfer for transfer in moved if not transfer.name.startswith("text")]
        assert total_sent(exchanged, 4) == (volumes * v(80640, 4),) * 4


@pytest.mark.parametrize("grid", [GRID_720P, (21, 30, 52), (3, 7, 9)])
def test_a_switch_sends_the_cells_that_change_rank(grid: tuple[int, int, int]) -> None:
    """Its sizes in closed form: rank s sends rank g the tokens of token subsequence s and group subsequence g."""
    held = placements(P14, grid, 4, 1)
    found = switch(held["token"], held["group"], 1)
    ids = range(4)
    assert found.matrix == tuple(tuple(0 if s == g else cell_size(grid, 2, s, g) for g in ids) for s in ids)
    assert switch(held["group"], held["token"], 1) == found.adjoint.__class__("switch", found.adjoint.matrix)


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4), (4, 2), (4, 4), (1, 8)])
def test_what_is_sent_is_received(layout: tuple[int, int]) -> None:
    told = forward_traffic(P14, GRID_720P, *layout)
    for transfer in told.transfers:
        assert sum(transfer.sent) == sum(transfer.received)
        assert all(transfer.matrix[i][i] == 0 for i in range(told.ranks))
        assert transfer.adjoint.sent == transfer.received
    assert sum(total_sent(block, told.ranks)[0] for block in told.blocks) + told.output[0].sent[0] == told.sent[0]


def test_one_rank_sends_nothing() -> None:
    told = forward_traffic(P14, GRID_720P, 1, 1, shared_scales=6)
    assert told.transfers == ()
    assert told.sent == (0,)
    assert training_traffic(told, P14, checkpointed=True) == ()


@pytest.mark.parametrize(("ranks", "held"), [(2, 4), (3, 4), (4, 4), (7, 1000)])
def test_an_all_reduce_sends_what_the_counter_says(ranks: int, held: int) -> None:
    assert reduced("scale", ranks, held).sent == (2 * (held - held // ranks),) * ranks


@pytest.mark.parametrize(
    ("config", "grid", "layout", "says"),
    [
        (P14, GRID_720P, (3, 1), r"one of \[1, 2, 4\]"),
        (P14, GRID_720P, (1, 41), "41 ranks would share 40 heads"),
        (P14, (1, 2, 2), (4, 1), "leaves rank 1 without any"),
    ],
)
def test_layouts_that_do_not_exist(config, grid, layout, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        forward_traffic(config, grid, *layout)


def test_published_sizes_must_divide() -> None:
    with pytest.raises(ConfigError, match="3 ranks must divide the 4 subsequences"):
        published_traffic(P14, GRID_720P, 3)
    with pytest.raises(ConfigError, match="2 ranks"):
        published_traffic(without_sparsity(P14), GRID_720P, 2)


def test_more_samples_send_more() -> None:
    one, two = (forward_traffic(P14, GRID_720P, 2, 2, batch=b, dtype=torch.float32) for b in (1, 2))
    assert tuple(2 * b for b in one.sent) == two.sent
