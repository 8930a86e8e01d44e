"""How the stream is laid out for a grid: orders of blocks, pieces, rotary tables, switches, and their memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import SMALL, random_inputs, random_model, relative_error, sparse

from ospnext import ops
from ospnext.conformance import oracle_dense
from ospnext.models import PRESETS, OSPNextTransformer
from ospnext.models.attend import Attend
from ospnext.models.layout import StreamLayout, block_orders, stream_layout
from ospnext.models.rope import rope_tables
from ospnext.sparse import skiparse_plan

GRID = (2, 7, 6)


def layout_of(config, grid=GRID, batch=1, dtype=torch.float64) -> StreamLayout:
    return stream_layout(
        config.block_kinds, config.sparse_ratio, grid, batch, config.rope_pairs, dtype, torch.device("cpu")
    )


# ---- orders and switches
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "switches"), [("14B", 31), ("1.3B", 21), ("tiny", 3)])
def test_number_of_switches_and_orders_of_full_blocks(name, switches):
    kinds = PRESETS[name].block_kinds
    orders = block_orders(kinds)
    assert sum(a != b for a, b in itertools.pairwise(orders)) == switches
    assert all(order == kind for order, kind in zip(orders, kinds, strict=True) if kind != "full")
    # Full blocks in front wait in token order, those behind stay in group order: neither moves the stream.
    first, last = kinds.index("token"), len(kinds) - kinds[::-1].index("group")
    assert set(orders[:first]) == {"token"}
    assert set(orders[last:]) == {"group"}


def test_every_switch_is_there_without_full_blocks():
    config = PRESETS["14B"].replace(num_full_blocks=0)
    assert block_orders(config.block_kinds) == config.block_kinds
    layout = layout_of(config.replace(dim=48, num_heads=2))
    assert [block.switch is not None for block in layout.blocks] == [True] * 39 + [False]


@pytest.mark.parametrize(("name", "switches"), [("14B", 31), ("1.3B", 21)])
def test_layout_switches_between_blocks_of_different_order_only(name, switches):
    config = PRESETS[name]
    layout, plan, orders = layout_of(config), skiparse_plan(GRID, 2), block_orders(config.block_kinds)
    found = [block.switch for block in layout.blocks]
    assert sum(switch is not None for switch in found) == switches
    for (a, b), switch in zip(itertools.pairwise(orders), found, strict=False):
        expected = None if a == b else plan.switch(a, b)
        assert (switch is None) == (expected is None)
        assert switch is None or torch.equal(switch, expected)
    assert found[-1] is None


@pytest.mark.parametrize("config", [sparse(), sparse(k=3, num_full_blocks=0)])
def test_what_enters_leaves_at_its_place(config):
    """Follow the raster indices through all blocks: each sees its own order, and raster order comes out."""
    layout, plan = layout_of(config), skiparse_plan(GRID, config.sparse_ratio)
    stream = torch.arange(plan.tokens)[layout.enter]
    for block, kind in zip(layout.blocks, config.block_kinds, strict=True):
        if kind != "full":
            assert torch.equal(stream, plan.order(kind).raster)
        if block.switch is not None:
            stream = stream[block.switch]
    assert torch.equal(stream[layout.leave], torch.arange(plan.tokens))


def test_dense_model_stays_in_raster_order():
    layout = layout_of(SMALL)
    assert layout.enter is layout.leave is None
    assert all(block.switch is None for block in layout.blocks)


# ---- pieces
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(2, 7, 6), (1, 3, 2), (1, 1, 2)])
def test_pieces_are_the_subsequences_of_each_sample(grid, batch):
    """Odd grids leave some subsequences empty; those are left out."""
    config = sparse(k=3)
    plan = skiparse_plan(grid, 3)
    for block, kind in zip(layout_of(config, grid, batch).blocks, config.block_kinds, strict=True):
        lengths = (plan.tokens,) if kind == "full" else tuple(n for n in plan.order(kind).lengths if n)
        pieces = block.subsequences
        assert pieces.lengths == lengths
        if len(set(lengths)) == 1:
            assert pieces.cu_seqlens is None
        else:
            assert pieces.cu_seqlens.dtype == torch.int32
            assert pieces.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths * batch)]


@pytest.mark.parametrize("grid", [(2, 8, 4), (1, 7, 6)])
def test_attention_stays_inside_a_piece(grid):
    """Equal pieces go as a plain batch, ragged ones packed: the same masked attention either way."""
    generator = torch.Generator().manual_seed(0)
    for block, kind in zip(layout_of(sparse(), grid, 2).blocks, sparse().block_kinds, strict=True):
        order = skiparse_plan(grid, 2).order("token" if kind == "full" else kind)
        piece_N = (
            torch.zeros(len(order.raster))
            if kind == "full"
            else torch.repeat_interleave(torch.arange(4), torch.tensor(order.lengths))
        )
        q, k, v = (torch.randn(2, len(piece_N), 2, 4, dtype=torch.float64, generator=generator) for _ in range(3))
        logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / 2
        logits = logits.masked_fill(piece_N[:, None] != piece_N, float("-inf"))
        expected = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
        assert relative_error(Attend()(q, k, v, block.subsequences), expected) <= 1e-14


# ---- rotary tables
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [2, 8, 12, 16, 128])
def test_rotary_tables_are_complex_numbers_of_the_tokens_place(head_dim):
    """Tables in a sparse order are the raster table, reordered; head_dim below 6 leaves only the time axis."""
    config = sparse(SMALL.replace(dim=2 * head_dim), k=2, num_full_blocks=0)
    expected = oracle_dense.rotation(GRID, head_dim).flatten(0, 2)
    assert expected.shape[1] == sum(config.rope_pairs) == head_dim // 2
    for block, kind in zip(layout_of(config).blocks, config.block_kinds, strict=True):
        turn = torch.complex(block.cos, block.sin)
        # Positions are below 8: fp64 angles are within a few roundings of each other.
        assert (turn - expected[skiparse_plan(GRID, 2).order(kind).raster]).abs().max() <= 1e-14


def test_rotary_pairs_of_wan():
    assert PRESETS["14B"].rope_pairs == PRESETS["1.3B"].rope_pairs == (22, 21, 21)


def test_rotary_tables_are_rounded_once():
    """An angle of up to 1023 radians held in fp32 would be off by 3e-5; the tables are off by half an fp32 ulp."""
    grid, pairs = (1, 1, 1024), PRESETS["14B"].rope_pairs
    wide = rope_tables(grid, torch.arange(1024), pairs, torch.float64)
    narrow = rope_tables(grid, torch.arange(1024), pairs)
    for a, b in zip(wide, narrow, strict=True):
        assert b.dtype == torch.float32
        assert (a - b.double()).abs().max() <= 2.0**-25


def test_attention_sees_relative_positions_only():
    """The reason for RoPE: <q at x, k at y> depends on y - x alone, on each axis."""
    generator = torch.Generator().manual_seed(0)
    grid, config = (4, 5, 6), SMALL
    q, k = (torch.randn(1, 1, 1, 12, dtype=torch.float64, generator=generator) for _ in range(2))
    cos, sin = rope_tables(grid, torch.arange(120), config.rope_pairs, torch.float64)
    q_THWD, k_THWD = (ops.rope(x.expand(1, 120, 1, 12), cos, sin).view(*grid, 12) for x in (q, k))
    for dt, dh, dw in [(1, 0, 0), (0, 2, 0), (0, 0, 3), (1, 1, 2)]:
        later = k_THWD[dt:, dh:, dw:]
        scores = (q_THWD[: 4 - dt, : 5 - dh, : 6 - dw] * later).sum(-1)
        assert (scores - scores[0, 0, 0]).abs().max() <= 1e-13
        assert (scores[0, 0, 0] - (q * k).sum()).abs() > 1e-2


# ---- memory
# ------------------------------------------------------------------------------------------------------------


def test_layouts_are_kept_by_grid_batch_and_dtype():
    model = random_model(sparse())
    first = model.layout((1, 4, 5), 2)
    assert model.layout((1, 4, 5), 2) is first
    assert model.layout((1, 4, 5), 1) is not first
    assert model.layout((1, 5, 4), 2) is not first
    assert first.blocks[0].cos.dtype == torch.float64
    assert model.float().layout((1, 4, 5), 2).blocks[0].cos.dtype == torch.float32


def test_layouts_do_not_pile_up():
    model = random_model(sparse())
    for width in range(1, 60):
        model.layout((1, 1, width), 1)
        assert len(model._layouts) <= 16


def test_a_layout_first_built_in_inference_mode_serves_training(monkeypatch):
    monkeypatch.setattr("ospnext.sparse.skiparse._plans", {})
    model = random_model(sparse())
    inputs = random_inputs(model.config, (1, 3, 5))
    with torch.inference_mode():
        expected = model(*inputs)
    out = model(*inputs)
    out.sum().backward()
    assert torch.equal(out.detach(), expected)


def test_a_layout_first_built_on_the_meta_device_serves_others(monkeypatch):
    """Counting shapes on the meta device must leave nothing behind that a later real forward trips over."""
    monkeypatch.setattr("ospnext.sparse.skiparse._plans", {})
    config, inputs = sparse(), random_inputs(sparse(), (1, 3, 5))
    with torch.device("meta"):
        meta = OSPNextTransformer(config)
        out = meta(*(x.to("meta") for x in inputs))
    assert out.shape == (1, config.out_dim, 1, 6, 10)
    assert random_model(config)(*inputs).isfinite().all()
