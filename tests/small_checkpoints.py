"""Checkpoint files of the tiny model and how to compare them. Modules import `tiny_folder` for the fixture `folder`."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from safetensors.torch import save_file

from ospnext.models.config import PRESETS, TransformerConfig
from ospnext.models.weights.config_files import config_json
from ospnext.models.weights.keymaps import official_to_diffusers
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


@pytest.fixture(name="folder")
def tiny_folder(tmp_path):
    """An official-named fp32 checkpoint of the tiny preset."""
    path = tmp_path / "model"
    path.mkdir()
    save_file(random_state(), path / WEIGHTS)
    (path / "config.json").write_text(json.dumps(config_json(TINY, "official")))
    return path


def snapshot(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}
