"""Initialisation: everything is filled, by the recipe, and by the generator alone."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL, random_inputs, sparse

from ospnext.models import OSPNextTransformer

#: Large enough for statistics of single parameters.
CONFIG = sparse(SMALL.replace(dim=96, ffn_dim=200, num_heads=4, freq_dim=64, text_dim=80), num_full_blocks=4)


def initialised(seed: int = 0) -> OSPNextTransformer:
    """As on the way from scratch: built without memory, given memory full of NaN, then initialised."""
    with torch.device("meta"):
        model = OSPNextTransformer(CONFIG)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@pytest.fixture(scope="module")
def model() -> OSPNextTransformer:
    return initialised()


def test_nothing_is_left_uninitialised(model):
    assert not [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.isnan().any()]


def test_nothing_hides_outside_parameters(model):
    """What is neither parameter nor buffer would keep the memory it was given on the meta device."""
    assert not list(model.named_buffers())
    for name, module in model.named_modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)], name


def test_a_generator_decides_and_only_it():
    before = torch.get_rng_state()
    first, again, other = initialised(0), initialised(0), initialised(1)
    assert torch.equal(torch.get_rng_state(), before)
    random = 0
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        if parameter.unique().numel() > 1:
            random += 1
            assert not torch.equal(parameter, other.get_parameter(name)), name
    # Ten matrices and the modulation in each block; the patch embedding, five time and text matrices, one modulation.
    assert random == 8 * 11 + 7


def test_without_a_generator_the_global_one_decides():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(OSPNextTransformer(SMALL))
        models[-1].init_weights()
    weights = [model.patch_embedding.weight for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_constants(model):
    for name, parameter in model.named_parameters():
        if name == "head.head.weight" or name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif ".norm" in name:
            assert name.endswith(".weight")
            assert (parameter == 1).all(), name
        else:
            assert parameter.unique().numel() > parameter.numel() // 2, name


def test_a_fresh_model_predicts_zero_velocity(model):
    """The head is zero; and its gradient is not, so that it learns."""
    inputs = random_inputs(CONFIG, (1, 4, 5), dtype=torch.float32)
    out = model(*inputs)
    assert (out == 0).all()
    (gradient,) = torch.autograd.grad(out.sum(), model.head.head.weight)
    assert gradient.abs().max() > 0.1


def expected_spread(name: str, parameter: torch.Tensor) -> tuple[str, float]:
    """(distribution, its scale): the bound of a uniform or the standard deviation of a normal one."""
    if name.endswith("modulation"):
        return "normal", CONFIG.dim**-0.5
    if name.startswith(("text_embedding", "time_embedding")):
        return "normal", 0.02
    rows, columns = parameter.flatten(1).shape
    return "uniform", (6 / (rows + columns)) ** 0.5


def test_distributions(model):
    """Mean and spread within five standard errors, and for uniform parameters no value beyond the bound."""
    for name, parameter in model.named_parameters():
        if parameter.unique().numel() == 1:
            continue
        values, count = parameter.detach().double().flatten(), parameter.numel()
        kind, scale = expected_spread(name, parameter)
        std = scale if kind == "normal" else scale / 3**0.5
        # The standard error of the variance follows from the kurtosis: 3 for a normal, 9/5 for a uniform distribution.
        kurtosis = 3 if kind == "normal" else 1.8
        assert values.mean().abs() <= 5 * std / count**0.5, name
        assert abs(values.square().mean() / std**2 - 1) <= 5 * ((kurtosis - 1) / count) ** 0.5, name
        if kind == "uniform":
            assert values.abs().max() <= scale, name
            assert values.abs().max() >= 0.99 * scale, name
