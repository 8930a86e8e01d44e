"""The shape of a transformer: published sizes, block layouts, refused values, config files, operation counts."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from small_models import SMALL, dense, random_inputs, random_model, sparse
from torch.utils.flop_counter import FlopCounterMode

from ospnext.conformance import oracle_sparse
from ospnext.errors import ConfigError
from ospnext.models import PRESETS, OSPNextTransformer, TransformerConfig, preset
from ospnext.models.attend import Attend
from ospnext.models.config import block_layout
from ospnext.models.flops import attention_pairs, forward_flops

OFFICIAL_14B = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 5120, "eps": 1e-06, "ffn_dim": 13824,
    "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 40, "num_layers": 40, "out_dim": 16,
    "text_len": 512,
}  # fmt: skip
DIFFUSERS_1_3B = {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0", "added_kv_proj_dim": None,
    "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 8960, "freq_dim": 256,
    "image_dim": None, "in_channels": 16, "num_attention_heads": 12, "num_layers": 30, "out_channels": 16,
    "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
SKIPARSE = {"skiparse_model_type": "dual_end", "sparse_ratio": 2, "num_full_blocks": 8}


# ---- sizes
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [("14B", 14_288_491_584), ("1.3B", 1_418_996_800)])
def test_parameter_counts(name, parameters):
    """The published sizes, and what the model really holds."""
    with torch.device("meta"):
        model = OSPNextTransformer(preset(name))
    assert preset(name).parameter_count() == sum(p.numel() for p in model.parameters()) == parameters


def test_parameter_count_of_odd_sizes():
    for config in (preset("tiny"), SMALL, SMALL.replace(patch_size=(1, 1, 4), freq_dim=14)):
        with torch.device("meta"):
            model = OSPNextTransformer(config)
        assert config.parameter_count() == sum(p.numel() for p in model.parameters())


def test_presets_are_the_published_shapes():
    shared = {"freq_dim": 256, "text_dim": 4096, "text_len": 512, "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2),
              "eps": 1e-6, **SKIPARSE}  # fmt: skip
    sizes = {
        "14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
        "1.3B": {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30},
    }
    for name, size in sizes.items():
        found = dataclasses.asdict(PRESETS[name])
        assert {key: found[key] for key in shared | size} == shared | size
        assert PRESETS[name].head_dim == 128


def test_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'15B'.*14B, 1\.3B, tiny"):
        preset("15B")


# ---- block layouts
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full", "token", "group"),
    [
        ("14B", {0, 1, 2, 3, 36, 37, 38, 39}, set(range(4, 35, 2)), set(range(5, 36, 2))),
        ("1.3B", {0, 1, 2, 3, 26, 27, 28, 29}, set(range(4, 25, 2)), set(range(5, 26, 2))),
        ("tiny", {0, 1, 6, 7}, {2, 4}, {3, 5}),
    ],
)
def test_published_block_layouts(name, full, token, group):
    kinds = preset(name).block_kinds
    for kind, expected in (("full", full), ("token", token), ("group", group)):
        assert {i for i, found in enumerate(kinds) if found == kind} == expected


def test_every_valid_layout_starts_sparse_with_token_and_ends_with_group():
    for layers in range(2, 42, 2):
        for full in range(0, layers // 2 + 1, 4):
            kinds = block_layout(layers, full)
            assert list(kinds) == oracle_sparse.block_kinds(layers, full)
            assert kinds.count("full") == full
            sparse_kinds = [kind for kind in kinds if kind != "full"]
            assert sparse_kinds == ["token", "group"] * ((layers - full) // 2)
            assert kinds == TransformerConfig(**{**SKIPARSE, "num_layers": layers, "num_full_blocks": full}).block_kinds


def test_dense_models_have_full_blocks_only():
    assert dense(preset("14B")).block_kinds == ("full",) * 40
    assert not dense(preset("14B")).sparse


# ---- refused values
# ----------------------------------------------------------------------------------------------------

_COUNTS = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "in_dim", "out_dim")
_WRONG = {
    **dict.fromkeys(_COUNTS, (0, -2, 1.5, "8", None, True)),
    "patch_size": ((2, 2, 2), (1, 2), (1, 2, 2, 2), (), (1, 0, 2), (1, 2, 2.0), [1, 2, 2], 2, None),
    "eps": (0, -1e-6, float("nan"), "1e-6", None, True),
    "skiparse_model_type": ("uniform", None),
    "sparse_ratio": (1, 0, -2, 2.0, "2", None),
    "num_full_blocks": (2, 6, 24, -4, 4.0, "8", None),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in _WRONG for value in _WRONG[field]], ids=str)
def test_wrong_values_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"\b{field}\b.*got {re.escape(repr(value))}"):
        TransformerConfig(**SKIPARSE | {field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 5121}, "dim 5121 is not a multiple of num_heads 40"),
        ({"freq_dim": 255}, "freq_dim must be even, got 255"),
        ({"num_layers": 39}, "even num_layers, got 39"),
        ({"num_layers": 14}, "num_full_blocks .* between 0 and num_layers / 2 = 7, got 8"),
        ({"qk_norm": False}, "qk_norm"),
        ({"cross_attn_norm": False}, "cross_attn_norm"),
        # The remaining two keys mean nothing to a dense model, and a leftover would hide a forgotten one.
        ({"skiparse_model_type": "full", "num_full_blocks": 0}, "sparse_ratio=2"),
        ({"skiparse_model_type": "full", "sparse_ratio": 1}, "num_full_blocks=8"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**SKIPARSE | change)


def test_odd_head_dim_is_refused():
    with pytest.raises(ConfigError, match=r"head_dim .* even .* 5"):
        SMALL.replace(dim=10, num_heads=2)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError, match=r"freq_dim.*num_layers.*num_full_blocks"):
        TransformerConfig(**SKIPARSE | {"freq_dim": 3, "num_layers": 5, "num_full_blocks": 3})


# ---- config files
# ------------------------------------------------------------------------------------------------------


def test_official_config_is_read_as_dense():
    assert TransformerConfig.from_dict(OFFICIAL_14B) == dense(preset("14B"))


def test_official_config_with_skiparse_keys_is_osp_next():
    assert TransformerConfig.from_dict(OFFICIAL_14B | SKIPARSE) == preset("14B")


def test_dense_config_ignores_the_other_skiparse_keys():
    found = TransformerConfig.from_dict(OFFICIAL_14B | SKIPARSE | {"skiparse_model_type": "full"})
    assert found == dense(preset("14B"))


def test_diffusers_config_is_read():
    assert TransformerConfig.from_dict(DIFFUSERS_1_3B) == dense(preset("1.3B"))
    assert TransformerConfig.from_dict(DIFFUSERS_1_3B | SKIPARSE) == preset("1.3B")


def test_diffusers_own_config_is_read():
    """What diffusers writes today, sizes unlike any default."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=10, in_channels=5, out_channels=7, text_dim=6, freq_dim=4, ffn_dim=9,
        num_layers=1, eps=1e-5, patch_size=(1, 2, 3),
    )  # fmt: skip
    assert TransformerConfig.from_dict(json.loads(model.to_json_string())) == TransformerConfig(
        dim=30, ffn_dim=9, num_heads=3, num_layers=1, freq_dim=4, text_dim=6, in_dim=5, out_dim=7, eps=1e-5,
        patch_size=(1, 2, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [("image_dim", 1280), ("added_kv_proj_dim", 5120), ("qk_norm", "layer_norm")]
)
def test_other_diffusers_models_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        TransformerConfig.from_dict(DIFFUSERS_1_3B | {key: value})


@pytest.mark.parametrize("config", [*PRESETS.values(), SMALL], ids=lambda config: f"{config.dim}")
def test_json_round_trip(config):
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---- operations
# --------------------------------------------------------------------------------------------------------

GRIDS = {"720P": (21, 45, 80), "768P": (21, 48, 80), "480P": (21, 30, 52)}

# 1e12 operations of a block: linear, text, full attention, sparse attention, cross-attention; then 1e15 of all blocks
# of the dense and of the sparse model.
PUBLISHED = {
    ("14B", "720P"): "45.19 0.054 117.05 29.28 0.79 6.523 3.715",
    ("14B", "768P"): "48.20 0.054 133.18 33.29 0.85 7.291 4.095",
    ("14B", "480P"): "19.58 0.054 21.98 5.5 0.34 1.678 1.151",
    ("1.3B", "720P"): "6.30 0.005 35.12 8.78 0.24 1.250 0.670",
}


@pytest.mark.parametrize(("name", "resolution"), PUBLISHED)
def test_operations_at_the_published_resolutions(name, resolution):
    """To the digits published. What lies outside the blocks is not in those numbers; it is below 1e-3 of the whole."""
    config, grid = preset(name), GRIDS[resolution]
    whole, wan = forward_flops(config, grid), forward_flops(dense(config), grid)
    token_block, group_block = (4 * config.dim * attention_pairs(kind, 2, grid) for kind in ("token", "group"))
    blocks = [
        *(x / config.num_layers / 1e12 for x in (whole.linear, whole.text, wan.attention)),
        token_block / 1e12,
        whole.cross / config.num_layers / 1e12,
    ]
    models = [(flops.total - flops.embeddings) / 1e15 for flops in (wan, whole)]
    for found, published in zip([*blocks, *models], PUBLISHED[name, resolution].split(), strict=True):
        unit = 10.0 ** -len(published.partition(".")[2])
        assert abs(found - float(published)) <= 0.5 * unit, published
    pairs_of_blocks = (config.num_layers - 8) // 2
    assert whole.attention == 8 * wan.attention // config.num_layers + pairs_of_blocks * (token_block + group_block)
    assert whole.embeddings < 1e-3 * whole.total


def plain_attention(q, k, v):
    """Two products that FlopCounterMode sees; it has no formula for ours."""
    weights = torch.softmax(q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1]), -1)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def attend_in_pieces(attend, q, k, v, pieces=None):
    """Dense attention on one piece after the other: a sample has as many as there are lengths."""
    if pieces is None:
        return plain_attention(q, k, v)
    parts = (x.split(pieces.lengths, dim=1) for x in (q, k, v))
    return torch.cat([plain_attention(*part) for part in zip(*parts, strict=True)], dim=1)


@pytest.fixture
def visible_attention(monkeypatch):
    monkeypatch.setattr(Attend, "forward", attend_in_pieces)


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 6), (2, 8, 4)])
@pytest.mark.parametrize("config", [SMALL, sparse(), sparse(k=3, num_full_blocks=0)])
def test_operations_are_those_pytorch_counts(config, grid, visible_attention):
    """Exactly, in all and by parts: without any attention, and of the text alone."""
    model, inputs = random_model(config, dtype=torch.float32), random_inputs(config, grid, dtype=torch.float32)
    flops = forward_flops(config, grid)
    assert counted(lambda: model(*inputs)) == flops.total

    text_mlp = 2 * config.text_len * config.dim * (config.text_dim + config.dim)
    assert counted(lambda: model.encode_text(inputs[2])) == flops.text + text_mlp
    context = model.encode_text(inputs[2])
    assert counted(lambda: model(*inputs[:2], context)) == flops.total - flops.text - text_mlp
    with pytest.MonkeyPatch.context() as patch:
        seen = attend_in_pieces
        patch.setattr(Attend, "forward", lambda _, q, k, v, pieces=None: seen(_, q, k, v, pieces) if pieces else q)
        assert counted(lambda: model(*inputs)) == flops.total - flops.cross
        patch.setattr(Attend, "forward", lambda _, q, k, v, pieces=None: q)
        assert counted(lambda: model(*inputs)) == flops.total - flops.cross - flops.attention


@pytest.mark.parametrize("name", ["14B", "1.3B"])
def test_operations_of_a_published_model_are_those_pytorch_counts(name, visible_attention):
    """720P, on the meta device."""
    config, grid = preset(name), GRIDS["720P"]
    with torch.device("meta"):
        model = OSPNextTransformer(config)
        inputs = torch.empty(1, 16, grid[0], 90, 160), torch.empty(1), torch.empty(1, 512, 4096)
    assert counted(lambda: model(*inputs)) == forward_flops(config, grid).total
