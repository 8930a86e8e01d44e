"""The dense model against diffusers' WanTransformer3DModel, which nobody here wrote, through both public namings.

diffusers computes parts of the forward in fp32 whatever the dtype of the model, so an fp64 WanTransformer3DModel is off
by fp32 roundings. The casts (diffusers 0.42), each found by reading and each proved necessary and, together, sufficient
by `test_fp64_difference_is_the_internal_casts`:

- `get_timestep_embedding`: `timesteps.float()` and the fp32 exponents of the sinusoid's frequencies;
- `get_1d_rotary_pos_embed`: `.float()` on the cosine and sine tables;
- `FP32LayerNorm.forward`: `inputs.float()`, and `.float()` on its weight and bias;
- `WanTransformerBlock.forward`: `temb.float()` under the modulation, `hidden_states.float()` before each norm and at
  each gated residual addition, `ff_output.float()`;
- `WanTransformer3DModel.forward`: `hidden_states.float()` before the last norm.

Widened to fp64, one and all, diffusers agrees with ours to fp64 rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_models import SMALL, random_inputs, random_model, relative_error, sparse

from ospnext.models import OSPNextTransformer, TransformerConfig, load_transformer, save_transformer
from ospnext.models.weights.keymaps import diffusers_to_official, official_to_diffusers

diffusers = pytest.importorskip("diffusers")

#: More heads and channels than elsewhere; head_dim 32 has rotary pairs (6, 5, 5).
WIDE = SMALL.replace(dim=96, num_heads=3, ffn_dim=160, num_layers=3, freq_dim=32)
#: Checkpoints on disk are of models that predict as many channels as they take.
SQUARE = SMALL.replace(out_dim=SMALL.in_dim)
SHAPES = [(SMALL, (1, 1, 1), 1), (SMALL, (3, 4, 5), 2), (SMALL, (5, 1, 7), 3), (WIDE, (2, 6, 3), 2)]

# fp32 rounds at 2^-24 = 6e-8; 8 blocks chain some hundred roundings, of which those of phases weigh most.
FP32_BOUND = 1e-5
FP64_BOUND = 1e-12


def diffusers_model(config: TransformerConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Sizes are given one by one, not through ospnext's own writer of configs."""
    return diffusers.WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.in_dim, out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.num_layers, eps=config.eps,
    ).to(dtype)  # fmt: skip


def twin(model: OSPNextTransformer) -> torch.nn.Module:
    """A diffusers model with the weights of ours, strictly."""
    theirs = diffusers_model(model.config, model.dtype)
    theirs.load_state_dict({official_to_diffusers(name): value for name, value in model.state_dict().items()})
    return theirs


def run_theirs(model: torch.nn.Module, latents, timestep, text) -> torch.Tensor:
    return model(latents, timestep, text, return_dict=False)[0]


@pytest.mark.parametrize(("config", "grid", "batch"), SHAPES)
def test_fp32_forward(config, grid, batch):
    """Measured: at most 5e-6, nearly all of it diffusers' fp32 sinusoid."""
    model = random_model(config, dtype=torch.float32)
    inputs = random_inputs(config, grid, batch=batch, dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(model(*inputs), run_theirs(twin(model), *inputs)) <= FP32_BOUND


def test_fp32_gradients():
    """Of every parameter, through the key map; measured: at most 6e-6 of the largest of a tensor."""
    model = random_model(SMALL, dtype=torch.float32)
    theirs, inputs = twin(model), random_inputs(SMALL, (2, 3, 4), batch=2, dtype=torch.float32)
    probe = torch.randn(2, SMALL.out_dim, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    (model(*inputs) * probe).sum().backward()
    (run_theirs(theirs, *inputs) * probe).sum().backward()
    expected = {diffusers_to_official(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) <= 10 * FP32_BOUND, name


# ---- fp64
# --------------------------------------------------------------------------------------------------------------

#: Functions of diffusers by the `.float()` calls they make; the first also names the dtype of its frequencies.
CASTS = (
    "get_timestep_embedding",
    "get_1d_rotary_pos_embed",
    "FP32LayerNorm.forward",
    "WanTransformerBlock.forward",
    "WanTransformer3DModel.forward",
)


class _WideTorch:
    """The torch module as a namespace in which float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextmanager
def widened(functions: tuple[str, ...]) -> Iterator[None]:
    """Within the named functions of diffusers, and nowhere else, casts to fp32 become casts to fp64."""
    from diffusers.models import embeddings

    narrow, timestep_embedding = torch.Tensor.float, embeddings.get_timestep_embedding

    def cast(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        code = sys._getframe(1).f_code
        if "diffusers" in code.co_filename and code.co_qualname in functions:
            return tensor.double()
        return narrow(tensor, *args, **kwargs)

    def wide_timestep_embedding(*args, **kwargs) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(embeddings, "torch", _WideTorch())
            return timestep_embedding(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", cast)
        if "get_timestep_embedding" in functions:
            patch.setattr(embeddings, "get_timestep_embedding", wide_timestep_embedding)
        yield


def fp64_difference(config, grid, batch, casts: tuple[str, ...]) -> float:
    model, inputs = random_model(config), random_inputs(config, grid, batch=batch)
    with torch.no_grad(), widened(casts):
        return relative_error(run_theirs(twin(model), *inputs), model(*inputs))


@pytest.mark.parametrize(("config", "grid", "batch"), SHAPES)
def test_fp64_difference_is_the_internal_casts(config, grid, batch):
    """With all casts widened both agree to fp64 rounding (measured: 6e-16); as they are, to fp32's (5e-6)."""
    assert 1e-9 < fp64_difference(config, grid, batch, ()) <= FP32_BOUND
    assert fp64_difference(config, grid, batch, CASTS) <= FP64_BOUND


@pytest.mark.parametrize("kept", CASTS)
def test_each_cast_alone_makes_an_fp32_difference(kept):
    """Nothing is widened in vain: leaving any one function as it is brings fp32 roundings back."""
    casts = tuple(name for name in CASTS if name != kept)
    assert fp64_difference(SMALL, (3, 4, 5), 2, casts) > 1e3 * FP64_BOUND


# ---- both namings
# ------------------------------------------------------------------------------------------------------


def test_saved_for_diffusers_and_loaded_by_diffusers(tmp_path):
    model = random_model(SQUARE, dtype=torch.float32)
    save_transformer(model, tmp_path / "ours", naming="diffusers")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    inputs = random_inputs(SQUARE, (2, 3, 4), dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(model(*inputs), run_theirs(theirs, *inputs)) <= FP32_BOUND


def test_saved_by_diffusers_and_loaded_by_us(tmp_path):
    theirs = twin(random_model(SQUARE, dtype=torch.float32))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_transformer(tmp_path / "theirs", config_overrides={"text_len": SQUARE.text_len})
    assert model.config == SQUARE
    inputs = random_inputs(SQUARE, (2, 3, 4), dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(model(*inputs), run_theirs(theirs, *inputs)) <= FP32_BOUND


def test_official_names_are_those_diffusers_converts_from():
    """diffusers' own converter of official Wan checkpoints, on our state dict as it is."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    model = random_model(SQUARE, dtype=torch.float32)
    theirs = diffusers_model(SQUARE, torch.float32)
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(model.state_dict())))
    inputs = random_inputs(SQUARE, (2, 3, 4), dtype=torch.float32)
    with torch.no_grad():
        assert relative_error(model(*inputs), run_theirs(theirs, *inputs)) <= FP32_BOUND


def test_official_folder_gives_the_same_model(tmp_path):
    model = random_model(sparse(SQUARE), dtype=torch.float32)
    save_transformer(model, tmp_path / "ours", naming="official")
    loaded, inputs = load_transformer(tmp_path / "ours"), random_inputs(SQUARE, (2, 3, 5), dtype=torch.float32)
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))


def test_sparse_weights_are_a_dense_checkpoint():
    """Skiparse adds no parameter: the strict key map still fits, and only the result differs."""
    model, inputs = random_model(sparse(SQUARE)), random_inputs(SQUARE, (2, 4, 4))
    theirs = twin(model)
    with torch.no_grad():
        assert relative_error(model(*inputs), run_theirs(theirs, *inputs)) > 1e-3
