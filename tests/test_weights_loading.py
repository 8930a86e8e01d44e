"""Transformer checkpoints that load: names, detection, configs, dtypes."""

from __future__ import annotations

import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import (
    DENSE,
    TINY,
    WEIGHTS,
    as_diffusers,
    assert_same,
    diffusers_model,
    random_state,
    tiny_folder,  # noqa: F401  (a fixture)
)

from ospnext.errors import ConfigError
from ospnext.models.config import PRESETS, TransformerConfig
from ospnext.models.loading import inspect_checkpoint, keeps_fp32, load_transformer
from ospnext.models.transformer import OSPNextTransformer
from ospnext.models.weights.config_files import config_json, infer_config, override_config
from ospnext.models.weights.keymaps import detect, diffusers_to_official, official_to_diffusers
from ospnext.models.weights.shapes import parameter_shapes

# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, TINY.replace(num_layers=10, in_dim=8, out_dim=12, ffn_dim=80, text_dim=24)])
def test_key_map_is_a_bijection_onto_the_parameters_of_diffusers(config):
    ours = parameter_shapes(config)
    theirs = {name: tuple(p.shape) for name, p in diffusers_model(config).state_dict().items()}
    assert {official_to_diffusers(name): shape for name, shape in ours.items()} == theirs
    assert [diffusers_to_official(official_to_diffusers(name)) for name in ours] == list(ours)


@pytest.mark.parametrize("name", ["tiny", "1.3B", "14B"])
def test_shapes_are_those_of_the_model(name):
    with torch.device("meta"):
        model = OSPNextTransformer(PRESETS[name])
    assert parameter_shapes(PRESETS[name]) == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert sum(map(math.prod, parameter_shapes(PRESETS[name]).values())) == PRESETS[name].parameter_count()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.0",
        "blocks.x.modulation",
        "blocks.01.modulation",
        "blocks.0.norm3",
        "head.modulation.weight",
        "xblocks.0.modulation",
    ],
)
def test_other_names_are_not_translated(name):
    assert official_to_diffusers(name) is None
    assert diffusers_to_official(name) is None


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module.", "model."])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_naming_is_detected_by_names(naming, prefix):
    state = random_state() if naming == "official" else as_diffusers(random_state())
    keys = detect(prefix + name for name in state)
    assert keys is not None
    assert (keys.naming, keys.prefix, keys.unknown) == (naming, prefix, ())
    assert set(keys.official.values()) == set(parameter_shapes(TINY))
    stored = {official: name for name, official in keys.official.items()}
    assert all(keys.stored(official) == name for official, name in stored.items())


# --- loading ---------------------------------------------------------------------------------------------------------


def write_file(path, state):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pt"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_every_format_and_naming_gives_the_same_model(tmp_path, naming, prefix, kind):
    state = random_state()
    named = state if naming == "official" else as_diffusers(state)
    path = tmp_path / f"w.{kind}"
    write_file(path, {prefix + name: tensor for name, tensor in named.items()})
    overrides = {
        "num_heads": TINY.num_heads,
        "text_len": TINY.text_len,
        "skiparse_model_type": "dual_end",
        "sparse_ratio": 2,
        "num_full_blocks": 4,
    }
    model = load_transformer(path, config_overrides=overrides)
    assert model.config == TINY
    assert_same(model.state_dict(), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {}},
        lambda s: {"state_dict": {"model": s, "step": 1}},
    ],
)
def test_state_dicts_are_found_inside_what_trainers_save(folder, wrap):
    path = folder / "trained.pth"
    torch.save(wrap(random_state()), path)
    assert_same(load_transformer(path).state_dict(), random_state())


def test_pipeline_folder_loads_its_transformer(tmp_path, folder):
    shutil.move(folder, tmp_path / "pipeline" / "transformer")
    assert_same(load_transformer(tmp_path / "pipeline").state_dict(), random_state())


def test_the_model_owns_its_tensors(folder):
    """A file that changes after loading, as when a checkpoint is saved over, must not change the model."""
    model = load_transformer(folder)
    data = (folder / WEIGHTS).read_bytes()
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(bytes(len(data)))
    assert_same(model.state_dict(), random_state())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_sensitive_parameters_in_fp32(folder, dtype):
    loaded = load_transformer(folder, dtype=dtype).state_dict()
    fp32 = {name for name, tensor in loaded.items() if tensor.dtype == torch.float32}
    blocks = [
        "modulation",
        "norm3.weight",
        "norm3.bias",
        "self_attn.norm_q.weight",
        "self_attn.norm_k.weight",
        "cross_attn.norm_q.weight",
        "cross_attn.norm_k.weight",
    ]
    time = ("time_embedding.0", "time_embedding.2", "time_projection.1")
    outer = [f"{module}.{x}" for module in time for x in ("weight", "bias")]
    inner = [f"blocks.{i}.{name}" for i in range(TINY.num_layers) for name in blocks]
    assert fp32 == {"head.modulation", *outer, *inner}
    assert_same(loaded, {n: t if n in fp32 else t.to(dtype) for n, t in random_state().items()})
    assert {name for name in loaded if keeps_fp32(name)} == fp32


@pytest.mark.parametrize(
    ("large", "small", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_stored_dtype_is_kept(tmp_path, folder, large, small, expected):
    state = {n: t.to(small if keeps_fp32(n) else large) for n, t in random_state().items()}
    save_file(state, folder / WEIGHTS)
    loaded = load_transformer(folder).state_dict()
    kept = expected if expected == torch.float64 else torch.float32
    assert_same(loaded, {n: t.to(kept if keeps_fp32(n) else expected) for n, t in state.items()})
    assert inspect_checkpoint(folder).dtype == expected


def test_mixed_large_tensors_take_the_widest_dtype(folder):
    state = random_state(dtype=torch.bfloat16)
    state["head.head.weight"] = random_state()["head.head.weight"]
    save_file(state, folder / WEIGHTS)
    assert_same(load_transformer(folder).state_dict(), {n: t.float() for n, t in state.items()})


def test_dtype_that_is_no_float_is_refused(folder):
    with pytest.raises(ConfigError, match=r"float32, bfloat16, float16, float64 or None.*got torch.int8"):
        load_transformer(folder, dtype=torch.int8)


def test_report_and_log_line_say_what_was_loaded(folder, caplog):
    with caplog.at_level(logging.INFO, logger="ospnext"):
        load_transformer(folder, dtype=torch.bfloat16)
    report = inspect_checkpoint(folder, dtype=torch.bfloat16)
    assert [record.getMessage() for record in caplog.records] == [f"loaded {report}"]
    assert (report.tensors, report.parameters) == (len(parameter_shapes(TINY)), TINY.parameter_count())
    assert (report.naming, report.prefix, report.stored_dtypes, report.dtype) == (
        "official",
        "",
        ("float32",),
        torch.bfloat16,
    )
    for part in (str(folder), "official Wan names", "used as bfloat16", "dual_end (ratio 2, 4 of 8 blocks full)"):
        assert part in str(report)


def test_config_without_skiparse_keys_is_dense_and_says_so(folder):
    config = json.loads((folder / "config.json").read_text())
    for key in DENSE:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    report = inspect_checkpoint(folder)
    assert report.config == TINY.replace(**DENSE)
    assert "full (dense Wan2.1: nothing sets skiparse_model_type" in str(report)
    chosen = inspect_checkpoint(folder, config_overrides={"skiparse_model_type": "full"})
    assert "attention full (dense)," in str(chosen)
    sparse = {"skiparse_model_type": "dual_end", "sparse_ratio": 2, "num_full_blocks": 4}
    assert load_transformer(folder, config_overrides=sparse).config == TINY


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1.3B", "14B"])
def test_known_sizes_are_inferred_from_shapes(name):
    expected = PRESETS[name]
    assert infer_config(parameter_shapes(expected), {}) == expected.replace(**DENSE)
    sparse = {"skiparse_model_type": "dual_end", "sparse_ratio": 2, "num_full_blocks": 8}
    assert infer_config(parameter_shapes(expected), sparse) == expected


def test_number_of_heads_has_to_be_given_for_other_sizes(tmp_path):
    save_file(random_state(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"dim 48 is no multiple .*config_overrides=\{'num_heads': ...\}"):
        load_transformer(tmp_path / "w.safetensors")
    report = inspect_checkpoint(tmp_path / "w.safetensors", config_overrides={"num_heads": 2, "text_len": 64})
    assert report.config == TINY.replace(**DENSE)
    assert "inferred from tensor shapes, overridden: num_heads, text_len" in str(report)


def test_unusual_channels_and_patches_are_inferred():
    config = TINY.replace(**DENSE, in_dim=12, out_dim=12, patch_size=(1, 4, 2), text_len=512)
    assert infer_config(parameter_shapes(config), {"num_heads": 2}) == config


def test_unknown_override_names_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"no config field 'sparse_ration'; did you mean 'sparse_ratio'"):
        load_transformer(folder, config_overrides={"sparse_ration": 2})
    with pytest.raises(ConfigError, match=r"'zzz'; fields: dim, ffn_dim"):
        override_config(TINY, {"zzz": 1})


def test_skiparse_is_never_turned_on_by_halves():
    dense = TINY.replace(**DENSE)
    with pytest.raises(ConfigError, match="also needs sparse_ratio and num_full_blocks"):
        override_config(dense, {"skiparse_model_type": "dual_end"})
    with pytest.raises(ConfigError, match="only mean something with"):
        override_config(dense, {"sparse_ratio": 2})
    assert override_config(TINY, {"skiparse_model_type": "full"}) == dense
    assert override_config(TINY, {"num_full_blocks": 0}).num_full_blocks == 0


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_config_json_reads_back_as_the_same_config(naming):
    config = TINY.replace(eps=1e-5, text_len=77)
    assert TransformerConfig.from_dict(json.loads(json.dumps(config_json(config, naming)))) == config
