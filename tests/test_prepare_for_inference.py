"""A model whose stored codes are kept in the form that a backend multiplies: same values, less to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hif8_models import small
from small_models import random_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from ospnext.backends.reference import MANIFEST
from ospnext.errors import ConfigError
from ospnext.models import QuantPolicy, prepare_for_inference, quantize_model, save_transformer
from ospnext.models.hif8_linear import StoredHiF8Linear
from ospnext.models.quant_report import QuantReport
from ospnext.ops import HiF8Recipe
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Registry

#: The reference, as if it multiplied E4M3.
PREFERRING = dataclasses.replace(
    MANIFEST,
    implementations=tuple(
        dataclasses.replace(i, prefers=frozenset({"carried"})) if i.contract == "quantized_linear" else i
        for i in MANIFEST.implementations
    ),
)
GRID = (2, 5, 7)


class Quantized(TorchDispatchMode):
    """dtype of the codes that each hif8_quantize makes."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.ospnext.hif8_quantize.default:
            self.dtypes.append(out[0].dtype)
        return out


def quantized(granularity: str, dtype: torch.dtype = torch.float32):
    recipe = HiF8Recipe(granularity=granularity)
    return quantize_model(small(dtype, k=2), QuantPolicy("hif8", recipe=recipe), store=True)


@pytest.fixture
def preferring():
    with use_registry(Registry([PREFERRING])):
        yield


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_results_are_those_of_the_codes(preferring, granularity):
    model = quantized(granularity)
    given = random_inputs(model.config, GRID, dtype=torch.float32)
    with torch.no_grad():
        expected = model(*given)
        prepare_for_inference(model)
        with Quantized() as seen:
            found = model(*given)
    # Only values below 2^-12 of 15 differ, and they are rounded to E4M3.
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert set(seen.dtypes) == {torch.float8_e4m3fn}
    layers = [m for m in model.modules() if isinstance(m, StoredHiF8Linear)]
    assert layers and all(layer.carried for layer in layers)


def test_a_backend_that_prefers_nothing_keeps_codes():
    model = prepare_for_inference(quantized("row"))
    assert not any(m.carried for m in model.modules() if isinstance(m, StoredHiF8Linear))


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_operators_that_quantize_give_what_the_linears_would_have_quantized(granularity):
    """Without gradients, codes come from the norms and the GELU; with gradients, from the linears."""
    model = quantized(granularity)
    given = random_inputs(model.config, GRID, dtype=torch.float32)
    with torch.no_grad():
        found = model(*given)
    assert found.equal(model(*given).detach())


def test_hooks_see_the_input_of_a_linear(preferring):
    model = prepare_for_inference(quantized("row"))
    given = random_inputs(model.config, GRID, dtype=torch.float32)
    with torch.no_grad():
        expected = model(*given)
        with QuantReport(model) as report:
            assert model(*given).equal(expected)
    counts = report.as_dict()["ffn.2"]
    tokens, blocks = 2 * 5 * 7, len(model.blocks)
    assert counts["x"]["elements"] == blocks * tokens * model.config.ffn_dim
    assert counts["weight"]["saturated"] >= blocks * model.config.dim  # each row has its largest value


def test_codes_keep_their_form_when_the_model_moves(preferring):
    model = prepare_for_inference(quantized("row")).to(torch.bfloat16)
    layer = model.get_submodule("blocks.0.ffn.0")
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight_scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert layer.to("meta").weight.dtype == torch.float8_e4m3fn


def test_it_cannot_be_saved_or_trained(preferring, tmp_path):
    model = prepare_for_inference(quantized("row"))
    with pytest.raises(ConfigError, match="prepare_for_inference has changed the codes"):
        save_transformer(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for call in (model.state_dict, lambda: model.load_state_dict(quantized("row").state_dict())):
        with pytest.raises(ConfigError, match="or load the model again"):
            call()
    latents, timestep, text = random_inputs(model.config, GRID, dtype=torch.float32)
    with pytest.raises(ValueError, match="carried codes are for inference"):
        model(latents.requires_grad_(), timestep, text).sum().backward()


def test_an_input_that_a_hook_changes_is_the_one_that_is_quantized():
    model = quantized("row")
    given = random_inputs(model.config, GRID, dtype=torch.float32)
    with torch.no_grad():
        expected = model(*given)
        model.blocks[0].self_attn.v.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
        assert not model(*given).allclose(expected)
