"""What a forward takes and refuses: timesteps, kept text, dtypes."""

from __future__ import annotations

import re

import pytest
import torch
from small_models import SMALL, random_inputs, random_model, relative_error, sparse

from ospnext.conformance import oracle_dense, oracle_sparse
from ospnext.models import OSPNextTransformer, load_transformer, save_transformer

CONFIGS = pytest.mark.parametrize("config", [SMALL, sparse()], ids=["dense", "sparse"])


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# ---- timesteps
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("timestep", "rounded"), [(997.09, 996.0), (994.08, 996.0), (987.65, 988.0), (301.1, 302.0)])
def test_bf16_rounding_of_the_timestep(timestep, rounded):
    """bf16 has a spacing of 4 from 512 on and of 2 from 256 on; 994.08 and 997.09 become one timestep."""
    latents, _, text = random_inputs(SMALL, (1, 2, 3), dtype=torch.float32)
    rounding = random_model(SMALL, dtype=torch.float32, timestep_rounding="bf16")
    exact = random_model(SMALL, dtype=torch.float32)
    expected = exact(latents, torch.tensor([rounded]), text)
    assert torch.equal(rounding(latents, torch.tensor([timestep]), text), expected)
    assert relative_error(exact(latents, torch.tensor([timestep]), text), expected) > 1e-3


def test_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match=r"'none' or 'bf16', got 'fp16'"):
        OSPNextTransformer(SMALL, timestep_rounding="fp16")


def test_sinusoid_is_computed_in_fp64():
    """In fp32 its angles, up to 1000 radians, would be off by 3e-5."""
    config = SMALL.replace(freq_dim=256)
    timestep = torch.tensor([0.0, 0.7, 500.123, 999.9])
    expected = oracle_dense.sinusoid(timestep, 256)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2.0**-25 + 1e-12)):
        found = random_model(config, dtype=dtype)._sinusoid(timestep)
        assert (found.double() - expected).abs().max() <= bound


# ---- kept text
# ---------------------------------------------------------------------------------------------------------


@CONFIGS
def test_kept_text_serves_every_step(config):
    model = random_model(config)
    latents, timestep, text = random_inputs(config, (2, 3, 5), batch=2)
    context = model.encode_text(text)
    for step in (timestep, timestep / 2):
        assert torch.equal(model(latents, step, context), model(latents, step, text))


def test_text_matters():
    model = random_model(SMALL)
    latents, timestep, text = random_inputs(SMALL, (1, 3, 4), batch=2)
    assert relative_error(model(latents, timestep, text.flip(0)), model(latents, timestep, text)) > 1e-3


# ---- refused inputs
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(5, 1, 4, 6), (1, 4, 1, 4, 6), (1, 5, 1, 3, 6), (1, 5, 1, 4, 7), (1, 5, 0, 4, 6), (1, 5, 1, 0, 6)],
    ids=str,
)
def test_wrong_latents_are_refused(shape):
    message = f"latents must be [B, 5, T, H, W] with H and W multiples of 2 and 2; got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        random_model(SMALL)(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 7, 10))


@pytest.mark.parametrize("timestep", [torch.zeros(1), torch.zeros(3), torch.zeros(()), torch.zeros(2, 1),
                                      torch.zeros(2, dtype=torch.int64)], ids=str)  # fmt: skip
def test_wrong_timesteps_are_refused(timestep):
    latents, _, text = random_inputs(SMALL, (1, 2, 3), batch=2)
    with pytest.raises(ValueError, match=rf"timestep must be floating \[2\].*{timestep.dtype}"):
        random_model(SMALL)(latents, timestep, text)


@pytest.mark.parametrize("shape", [(7, 10), (2, 6, 10), (2, 7, 9), (2, 7, 10, 1)], ids=str)
def test_wrong_text_is_refused(shape):
    model, (latents, timestep, _) = random_model(SMALL), random_inputs(SMALL, (1, 2, 3), batch=2)
    for run in (lambda text: model(latents, timestep, text), model.encode_text):
        with pytest.raises(ValueError, match=r"text embeddings must be \[B, 7, 10\].*got"):
            run(torch.zeros(shape))


@pytest.mark.parametrize("batch", [1, 3])
def test_text_of_another_batch_is_refused(batch):
    """One prompt for two samples is not repeated in silence."""
    model, (latents, timestep, _) = random_model(SMALL), random_inputs(SMALL, (1, 2, 3), batch=2)
    text = torch.zeros(batch, 7, 10)
    for given in (text, model.encode_text(text)):
        with pytest.raises(ValueError, match=f"text has a batch of {batch}, latents one of 2"):
            model(latents, timestep, given)


# ---- dtypes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "out"), [(torch.float64, torch.float64), (torch.float32, torch.float32),
                                            (torch.bfloat16, torch.float32)], ids=str)  # fmt: skip
def test_velocity_is_never_narrower_than_fp32(dtype, out):
    """Latents stay fp32 between steps, whatever the model computes in."""
    model = random_model(SMALL, dtype=dtype)
    assert model(*random_inputs(SMALL, (1, 2, 3), dtype=torch.float32)).dtype == out


def rms_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def bf16_model(config, tmp_path, fp32_islands: bool) -> OSPNextTransformer:
    """All of it bf16, or as a checkpoint is loaded in bf16: norms, modulation and time embedding in fp32."""
    model = random_model(config, dtype=torch.bfloat16)
    if not fp32_islands:
        return model
    save_transformer(model, tmp_path / "model")
    return load_transformer(tmp_path / "model", dtype=torch.bfloat16)


@pytest.mark.parametrize("fp32_islands", [False, True])
@CONFIGS
def test_bf16_model_is_near_the_exact_one(config, fp32_islands, tmp_path):
    """In root mean square, against fp64 with the same (bf16) weights and inputs.

    A signal passes some 30 roundings of relative size u = 2^-8 in each block (additions to the stream, steps of the
    three branches), which add up like a random walk to at most sqrt(30 * blocks) u = 0.06. The sharper bound is the
    yardstick: the same formulas with every intermediate in bf16. Measured: 0.007 to 0.008, against 0.010 of the
    yardstick."""
    config = config.replace(out_dim=config.in_dim)
    model, rounded = bf16_model(config, tmp_path, fp32_islands), random_model(config, dtype=torch.bfloat16)
    assert (model.time_embedding[0].weight.dtype == torch.float32) == fp32_islands
    latents, timestep, text = random_inputs(config, (2, 5, 6), batch=2, dtype=torch.bfloat16)
    yardstick = oracle_sparse.reference(rounded, latents, timestep, text)
    expected = oracle_sparse.reference(rounded.double(), latents.double(), timestep, text.double())
    error = rms_error(model(latents, timestep, text), expected)
    assert 2.0**-10 < error <= rms_error(yardstick, expected)
    assert error <= (30 * config.num_layers) ** 0.5 * 2.0**-8
