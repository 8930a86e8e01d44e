"""Transformer checkpoints: names, detection, strictness, configs, round trips and atomic writes."""

from __future__ import annotations

import inspect
import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models.config import PRESETS, TransformerConfig
from ospnext.models.convert import convert
from ospnext.models.loading import inspect_checkpoint, keeps_fp32, load_transformer, save_transformer
from ospnext.models.transformer import OSPNextTransformer
from ospnext.models.weights import writer
from ospnext.models.weights.config_files import config_json, infer_config, override_config
from ospnext.models.weights.keymaps import detect, diffusers_to_official, official_to_diffusers
from ospnext.models.weights.shapes import parameter_shapes

TINY = PRESETS["tiny"]
DENSE = {"skiparse_model_type": "full", "sparse_ratio": 1, "num_full_blocks": 0}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def random_state(config: TransformerConfig = TINY, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in parameter_shapes(config).items()}


def diffusers_model(config: TransformerConfig):
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )


def public_config(model) -> dict[str, object]:
    """The arguments of a diffusers model, as JSON has them: tuples are lists there."""
    names = inspect.signature(type(model).__init__).parameters.keys() - {"self"}
    return json.loads(json.dumps({name: model.config[name] for name in names}))


def as_diffusers(state):
    return {official_to_diffusers(name): tensor for name, tensor in state.items()}


def assert_same(found, expected) -> None:
    """Bit for bit, dtypes included."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def folder(tmp_path):
    """An official-named fp32 checkpoint of the tiny preset."""
    path = tmp_path / "model"
    path.mkdir()
    save_file(random_state(), path / WEIGHTS)
    (path / "config.json").write_text(json.dumps(config_json(TINY, "official")))
    return path


def snapshot(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


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


# --- refusals --------------------------------------------------------------------------------------------------------


def test_differences_are_listed_with_shapes(folder):
    state = as_diffusers(random_state())
    for i in range(4):
        del state[f"blocks.{i}.ffn.net.2.weight"], state[f"blocks.{i}.ffn.net.2.bias"], state[f"blocks.{i}.norm2.bias"]
    state["extra.weight"] = torch.zeros(2, 3)
    state["proj_out.weight"] = torch.zeros(64, 47)
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, folder / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        load_transformer(folder)
    message = str(caught.value)
    assert "diffusers Wan names with prefix 'module.'" in message
    assert "12 missing: module.blocks.0." in message
    assert "module.blocks.0.norm2.bias [48]" in message
    assert message.count("module.blocks.") == 10
    assert "; and 2 more" in message
    assert "1 unexpected: module.extra.weight [2, 3]" in message
    assert "1 wrongly shaped: module.proj_out.weight [64, 47], expected [64, 48]" in message
    assert "check that all files come from one download" in message


def test_one_missing_tensor_is_refused(folder):
    state = random_state()
    del state["blocks.5.modulation"]
    save_file(state, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"1 missing: blocks.5.modulation \[1, 6, 48\]"):
        load_transformer(folder)


def test_more_layers_than_the_config_says_is_refused(folder):
    save_file(random_state(TINY.replace(num_layers=10)), folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"54 unexpected: blocks\.8\."):
        load_transformer(folder)


def renamed(state, old, new):
    return {name.replace(old, new): tensor for name, tensor in state.items()}


FOREIGN = {
    "lora": ({f"blocks.0.self_attn.q.lora_{x}.weight": torch.zeros(4, 48) for x in "AB"}, "LoRA adapter"),
    "kohya lora": ({"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(4, 48)}, "LoRA adapter"),
    "t5": ({"token_embedding.weight": torch.zeros(8, 4), "blocks.0.attn.q.weight": torch.zeros(4, 4)}, "T5 text"),
    "hf t5": ({"shared.weight": torch.zeros(8, 4), "encoder.block.0.layer.0.layer_norm.weight": torch.zeros(4)}, "T5"),
    "vae": ({"encoder.conv1.weight": torch.zeros(4, 3, 3, 3, 3), "conv1.weight": torch.zeros(2)}, "autoencoder"),
    "i2v": (
        random_state() | {"img_emb.proj.0.bias": torch.zeros(4), "blocks.0.cross_attn.k_img.bias": torch.zeros(4)},
        "image-to-video",
    ),
    "diffusers i2v": (as_diffusers(random_state()) | {"blocks.0.attn2.add_k_proj.bias": torch.zeros(4)}, "image-to-"),
    "i2v channels": (random_state(TINY.replace(in_dim=36)), r"36 latent channels and predicts 16"),
    "vace": (random_state() | {"vace_blocks.0.modulation": torch.zeros(1, 6, 48)}, "VACE"),
    "fp8": (
        {n: t.to(torch.float8_e4m3fn) if t.dim() == 2 else t for n, t in random_state().items()},
        r"of a dtype other than .*F8_E4M3",
    ),
    "scaled fp8": (random_state() | {"blocks.0.ffn.0.scale_weight": torch.ones(1)}, "quantized"),
    "empty": ({}, "no tensors at all"),
    "something else": ({"layers.0.weight": torch.zeros(2)}, r"not a Wan transformer.*layers.0.weight"),
    "only the common name": ({"patch_embedding.weight": torch.zeros(2)}, "not a Wan transformer"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_named(tmp_path, kind):
    state, message = FOREIGN[kind]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(tmp_path / "w.safetensors", config_overrides={"num_heads": 2})
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "i2v"}, "of type 'i2v'"),
        ({"num_attention_heads": 2, "attention_head_dim": 24, "image_dim": 1280}, "image-to-video Wan config"),
        ({"in_dim": 36}, "36 latent channels"),
    ],
)
def test_foreign_configs_are_named(folder, config, message):
    (folder / "config.json").write_text(json.dumps(config_json(TINY, "official") | config))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_config_of_another_kind_of_model_is_refused(folder):
    (folder / "config.json").write_text('{"d_model": 4096, "num_heads": 64}')
    with pytest.raises(CheckpointError, match=r"not the config of a Wan transformer.*d_model, num_heads"):
        load_transformer(folder)
    with pytest.raises(ConfigError, match="num_heads"):  # beside a single file it is somebody else's and is ignored
        load_transformer(folder / WEIGHTS)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path):
    path.write_bytes(b"")


def damage_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize("name", [WEIGHTS, "w.pth"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"cannot be read: it is truncated"),
        (damage_empty, "is empty"),
        (damage_pointer, "git lfs pull"),
    ],
)
def test_damaged_files_are_refused(folder, name, damage, message):
    torch.save(random_state(), folder / "w.pth")
    damage(folder / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(folder / name)
    assert name in str(caught.value)


def test_pickled_objects_are_not_loaded(tmp_path):
    torch.save({"state_dict": random_state(), "config": TINY}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="a pickle can run any code"):
        load_transformer(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [{"ema": random_state()}, [1, 2], {"state_dict": 3, "lr": 1.0}])
def test_pickles_without_a_state_dict_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_transformer(tmp_path / "w.pth")


def test_paths_that_are_no_checkpoint_say_what_to_do(tmp_path, folder):
    (folder / "w.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"no such file or directory.*hf download"):
        load_transformer("Wan-AI/Wan2.1-T2V-1.3B")
    with pytest.raises(CheckpointError, match=r"of no format ospnext reads"):
        load_transformer(folder / "w.gguf")
    with pytest.raises(CheckpointError, match="no transformer checkpoint"):
        load_transformer(tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has weights .* but no config.json"):
        load_transformer(folder)


def test_two_expert_pipeline_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "pipeline" / "transformer")
    shutil.copytree(folder, tmp_path / "pipeline" / "transformer_2")
    with pytest.raises(CheckpointError, match="two transformers"):
        load_transformer(tmp_path / "pipeline")


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, folder):
    path = tmp_path / "sharded"
    save_transformer(load_transformer(folder), path, naming="official", max_shard_size=300_000)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def test_shards_respect_the_size_and_the_index(sharded):
    index = json.loads((sharded / INDEX).read_text())
    sizes = []
    for file in sorted(sharded.glob("*.safetensors")):
        state = load_file(file)
        sizes.append(sum(tensor.nbytes for tensor in state.values()))
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == state.keys()
    assert max(sizes) <= 300_000
    assert index["metadata"]["total_size"] == sum(sizes) == 4 * TINY.parameter_count()


def test_plan_gives_a_tensor_above_the_limit_its_own_shard():
    sizes = {"a": 3, "b": 3, "c": 20, "d": 1, "e": 9, "f": 1}
    assert writer.plan_shards(sizes, 10) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    with pytest.raises(ConfigError, match="max_shard_size"):
        writer.plan_shards({"a": 1}, 0)


@pytest.mark.parametrize("indexed", [True, False])
def test_absent_shards_are_named(sharded, indexed):
    if not indexed:
        (sharded / INDEX).unlink()
    assert_same(load_transformer(sharded).state_dict(), random_state())
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="one shard of several"):
        load_transformer(first)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of its .*{first.name}"):
        load_transformer(sharded)
    last.unlink()
    if indexed:
        with pytest.raises(CheckpointError, match=f"lacks 2 of its .*{first.name}, {last.name}"):
            load_transformer(sharded)


def test_index_may_not_point_outside_its_folder(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "../model/" + WEIGHTS}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_transformer(sharded)


def test_the_same_tensor_in_two_files_is_refused(folder):
    (folder / WEIGHTS).rename(folder / "fp32.safetensors")
    save_file({"head.modulation": torch.zeros(1, 2, 48)}, folder / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"head.modulation is both in ema.safetensors and in fp32.safetensors"):
        load_transformer(folder)


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


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", [300_000, 10**9])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path, folder, dtype, naming, max_shard_size):
    model = load_transformer(folder, dtype=dtype)
    save_transformer(model, tmp_path / "out", naming=naming, max_shard_size=max_shard_size)
    again = load_transformer(tmp_path / "out")
    assert again.config == model.config
    assert inspect_checkpoint(tmp_path / "out").naming == naming
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("max_shard_size", [300_000, 10**9])
def test_diffusers_loads_what_we_write(tmp_path, folder, max_shard_size):
    diffusers = pytest.importorskip("diffusers")
    model = load_transformer(folder)
    save_transformer(model, tmp_path / "out", max_shard_size=max_shard_size)
    theirs, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(theirs.state_dict(), as_diffusers(model.state_dict()))
    assert public_config(theirs) == public_config(diffusers_model(TINY))


def test_we_load_what_diffusers_writes(tmp_path):
    theirs = diffusers_model(TINY)
    theirs.save_pretrained(tmp_path / "out", max_shard_size="300KB")
    model = load_transformer(tmp_path / "out", config_overrides={"text_len": TINY.text_len})
    assert model.config == TINY.replace(**DENSE)
    assert_same(as_diffusers(model.state_dict()), dict(theirs.state_dict()))


def fail_on_second_call(function):
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("exists", [True, False])
def test_failed_write_leaves_the_destination_untouched(tmp_path, sharded, monkeypatch, exists):
    target = sharded if exists else tmp_path / "new"
    before = snapshot(target) if exists else None
    model = load_transformer(sharded)
    monkeypatch.setattr(writer, "save_file", fail_on_second_call(writer.save_file))
    with pytest.raises(OSError, match="no space left"):
        save_transformer(model, target, max_shard_size=300_000)
    assert (snapshot(target) if exists else target.exists()) == (before or False)


def test_interrupted_publication_is_refused_by_the_reader(sharded, monkeypatch):
    model = load_transformer(sharded)
    monkeypatch.setattr(writer.os, "replace", fail_on_second_call(writer.os.replace))
    with pytest.raises(OSError, match="no space left"):
        save_transformer(model, sharded, max_shard_size=200_000)
    with pytest.raises(CheckpointError, match=r"no config.json"):
        load_transformer(sharded)


def test_saving_over_a_checkpoint_replaces_it_and_spares_other_files(sharded):
    (sharded / "README.md").write_text("mine")
    model = load_transformer(sharded)
    save_transformer(model, sharded)
    assert set(snapshot(sharded)) == {"README.md", "config.json", WEIGHTS}
    assert_same(load_transformer(sharded).state_dict(), random_state())
    assert (sharded / WEIGHTS).stat().st_mode == (sharded / "README.md").stat().st_mode


def test_saving_needs_a_folder_and_a_plain_model(tmp_path, folder):
    model = load_transformer(folder)
    with pytest.raises(CheckpointError, match="a file is there"):
        save_transformer(model, folder / WEIGHTS)
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"adapter.weight is no parameter"):
        save_transformer(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_conversion_keeps_every_stored_bit(tmp_path, folder, naming):
    state = {n: t.bfloat16() if i % 2 else t for i, (n, t) in enumerate(random_state().items())}
    torch.save({"model": {f"module.{n}": t for n, t in state.items()}}, folder / "w.pth")
    convert(folder / "w.pth", tmp_path / "out", naming=naming, max_shard_size=300_000)
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(file)
    assert_same(found, state if naming == "official" else as_diffusers(state))
    assert inspect_checkpoint(tmp_path / "out").config == TINY


def test_conversion_to_a_dtype_equals_loading_in_it(tmp_path, folder):
    sparse = {"num_full_blocks": 0}
    report = convert(folder, tmp_path / "out", naming="diffusers", dtype=torch.bfloat16, config_overrides=sparse)
    model = load_transformer(folder, dtype=torch.bfloat16, config_overrides=sparse)
    assert report.config == model.config == inspect_checkpoint(tmp_path / "out").config == TINY.replace(**sparse)
    assert_same(load_file(tmp_path / "out" / WEIGHTS), as_diffusers(model.state_dict()))


def test_conversion_in_place(folder):
    convert(folder, folder, naming="diffusers", max_shard_size=300_000)
    assert inspect_checkpoint(folder).naming == "diffusers"
    assert_same(load_transformer(folder).state_dict(), random_state())
