"""Transformer checkpoints that do not load: what is wrong is named, nothing is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import (
    TINY,
    WEIGHTS,
    as_diffusers,
    random_state,
    tiny_folder,  # noqa: F401  (a fixture)
)

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models.loading import load_transformer
from ospnext.models.weights.config_files import config_json

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
