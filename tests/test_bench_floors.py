"""Floors of a forward against small cases added up by hand, and operators and their time by part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ospnext import ops
from ospnext.bench import floor, parts, variants
from ospnext.bench.workload import PRESETS
from ospnext.models import TransformerConfig
from ospnext.models.flops import forward_flops
from ospnext.ops import HiF8Recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CPU = torch.device("cpu")
SIZE = ["--preset", "tiny", "--resolution", "64x96", "--frames", "5", "--repeats", "1", "--quiet"]
#: C = 8, F = 20, one layer, patches of 4 channels: all small enough to add up by hand.
HAND = TransformerConfig(dim=8, ffn_dim=20, num_heads=2, num_layers=1, text_len=3, in_dim=1, out_dim=1, freq_dim=2)


# ---- floors


def test_linears_by_hand():
    """10 tokens: 6 products 8 -> 8, 8 -> 20, 20 -> 8, and 4 -> 8 and 8 -> 4 outside."""
    assert floor.block_linears(HAND) == {(8, 8): 6, (8, 20): 1, (20, 8): 1}
    assert floor.outer_linears(HAND) == {(4, 8): 1, (8, 4): 1}
    assert floor.linear_flops(HAND, 10) == 2 * 10 * (6 * 64 + 2 * 160 + 2 * 32)


def test_shapes_that_coincide_are_added_up():
    square = HAND.replace(ffn_dim=8, num_layers=2)
    assert floor.block_linears(square) == {(8, 8): 16}


def test_attention_by_hand():
    """Grid (1, 2, 3), k = 2: token pieces have 2, 1, 2 and 1 tokens."""
    assert floor.attention_flops(HAND, (1, 2, 3)) == 4 * 8 * 6 * 6 + 4 * 8 * 6 * 3
    sparse = HAND.replace(num_layers=2, skiparse_model_type="dual_end", sparse_ratio=2)
    assert floor.self_attention_flops(sparse, "token", (1, 2, 3)) == 4 * 8 * (2**2 + 1 + 2**2 + 1)
    assert floor.cross_attention_flops(sparse, 6) == 4 * 8 * 6 * 3


@pytest.mark.parametrize("preset", PRESETS)
def test_floors_count_what_the_flop_model_counts(preset):
    """All but the embedding of the timestep and the text, which are not floors."""
    config, grid = PRESETS[preset], (5, 6, 7)
    flops, tokens = forward_flops(config, grid), 210
    assert floor.attention_flops(config, grid) == flops.attention + flops.cross
    outer = 2 * tokens * sum(inner * outer for inner, outer in floor.outer_linears(config))
    assert floor.linear_flops(config, tokens) - outer == flops.linear
    assert outer <= flops.embeddings


def test_elementwise_bytes_by_hand():
    """One token, C = 8, F = 20, 2 bytes. Reads 12 C = 96, writes 9 C = 72; the head reads and writes 2 C = 16.

    With codes GELU reads and writes F more, and 3 C + F = 44 of the writes are one byte instead of two; with a scale
    for all, as many elements are read again.
    """
    row = HiF8Recipe(granularity="row")
    assert floor.elementwise_bytes(HAND, 1, 2) == 2 * (96 + 72) + 2 * 16
    assert floor.elementwise_bytes(HAND, 1, 2, row) == 2 * (116 + 92) + 2 * 16 - 44
    assert floor.elementwise_bytes(HAND, 1, 2, HiF8Recipe()) == 2 * (116 + 92) + 2 * 16 - 44 + 2 * 44
    assert floor.elementwise_bytes(HAND.replace(num_layers=3), 5, 2) == 5 * (3 * 336 + 32)


def test_quantize_bytes_by_hand():
    """2 C = 16 elements of attention: 3 bytes each by rows, 5 per tensor."""
    assert floor.quantize_bytes(HAND, 1, 2, None) == 0
    assert floor.quantize_bytes(HAND, 1, 2, HiF8Recipe(granularity="row")) == 16 * 3
    assert floor.quantize_bytes(HAND, 1, 2, HiF8Recipe()) == 16 * 5


def test_elementwise_floor_of_the_large_model():
    """A block of the 14B at 768P, at the 4.15 TB/s that a copy reaches on an H200: about 4 ms if all is fused."""
    config, tokens = variants.dense(PRESETS["14b"]), 80_640
    milliseconds = 1e3 * floor.elementwise_bytes(config, tokens, 2) / config.num_layers / 4.15e12
    assert milliseconds == pytest.approx(4.18, abs=0.05)


# ---- parts


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", "linear"),
        ("aten::_scaled_mm", "linear"),
        ("ospnext::quantized_linear", "linear"),
        ("ospnext::linear_gelu_tanh", "linear"),
        ("ospnext::attention", "attention"),
        ("ospnext::native_attention", "attention"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("ospnext::hif8_quantize", "quantize"),
        ("ospnext::hif8_fake_quantize", "quantize"),
        ("ospnext::layer_norm_modulate", "elementwise"),
        ("ospnext::layer_norm_modulate_quantize", "elementwise"),
        ("aten::mul_", "elementwise"),
        ("aten::native_layer_norm", "elementwise"),
        ("acme::mul", "other"),
        ("aten::copy_", "other"),
    ],
)
def test_an_operator_belongs_to_its_part(name, part):
    assert parts.part_of(name) == part


@torch.no_grad()
def test_time_of_parts_is_that_of_the_operators():
    x, weight = torch.randn(256, 256), torch.randn(256, 256)
    found = parts.timed_parts(lambda: (torch.mm(x, weight), x.clone(), x.view(-1)), CPU)
    assert set(found) == set(parts.PARTS)
    assert found["linear"] > 0 < found["other"]
    assert found["attention"] == found["quantize"] == found["elementwise"] == 0
    assert parts.timed_parts(lambda: torch.nn.functional.gelu(x), CPU)["elementwise"] > 0


@torch.no_grad()
def test_what_an_operator_calls_belongs_to_it():
    q = torch.randn(1, 64, 2, 32)
    found = parts.timed_parts(lambda: ops.attention(q, q, q), CPU)
    assert found["attention"] > 0 == sum(found.values()) - found["attention"]
