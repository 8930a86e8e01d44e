"""HiFloat8 checkpoints: the format, round trips, conversion, and every way in which config and tensors can disagree."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import random_inputs, random_model

from ospnext.cli import main
from ospnext.errors import CheckpointError, ConfigError
from ospnext.models import OSPNextTransformer, load_transformer, save_transformer
from ospnext.models import convert as convert_module
from ospnext.models.config import PRESETS
from ospnext.models.convert import convert
from ospnext.models.hif8_linear import StoredHiF8Linear
from ospnext.models.loading import inspect_checkpoint, parameter_dtype
from ospnext.models.quantization import LINEARS, QuantPolicy, quantize_model
from ospnext.models.weights.keymaps import official_to_diffusers
from ospnext.models.weights.quantized import Quantization
from ospnext.models.weights.shapes import parameter_shapes
from ospnext.ops import HiF8Recipe, use_backend
from ospnext.pipelines import OSPNextPipeline, write_random_checkpoint

TINY = PRESETS["tiny"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
ALL = QuantPolicy(quant="hif8", quant_attn="hif8")
POLICIES = {
    "all": ALL,
    "linears only": QuantPolicy(quant="hif8"),
    "some": QuantPolicy("hif8", "hif8", linears=("cross_attn.k", "ffn.0"), attention=("self_attn",), blocks="1,3-6"),
    "rows": QuantPolicy("hif8", "hif8", recipe=HiF8Recipe(granularity="row")),
    "pow2": QuantPolicy("hif8", "hif8", recipe=HiF8Recipe(scale_mode="pow2", scale_max=224.0, bias_grad="raw")),
}


def plain(dtype=torch.bfloat16) -> OSPNextTransformer:
    """As a loader makes it: in half precision some parameters stay fp32."""
    model = random_model(TINY, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, dtype))
    return model


def stored(policy: QuantPolicy = ALL, dtype=torch.bfloat16) -> OSPNextTransformer:
    return quantize_model(plain(dtype), policy, store=True)


@torch.no_grad()
def velocity(model: OSPNextTransformer) -> torch.Tensor:
    return model(*random_inputs(TINY, (1, 4, 6), dtype=model.dtype))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_same_files(found, expected) -> None:
    for name in (WEIGHTS, "config.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def recipes_of(model):
    return {n: m.recipe for n, m in model.named_modules() if getattr(m, "recipe", None) is not None}


@pytest.mark.parametrize("max_shard_size", [100_000, 10**9])
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_files_hold_codes_and_scales_beside_what_was_there(tmp_path, naming, max_shard_size):
    model = stored()
    save_transformer(model, tmp_path, naming=naming, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (max_shard_size < 10**9)
    state, found = dict(model.state_dict()), tensors_of(tmp_path)
    assert_same(found, state if naming == "official" else {official_to_diffusers(n): t for n, t in state.items()})
    name = {"official": "blocks.2.self_attn.o.weight", "diffusers": "blocks.2.attn1.to_out.0.weight"}[naming]
    assert (found[name].dtype, found[f"{name}_scale"].dtype) == (torch.uint8, torch.float32)
    assert config_of(tmp_path)["quantization_config"] == {
        "quant_method": "hif8", "quant": "hif8", "quant_attn": "hif8", "blocks": "all",
        "linears": list(LINEARS), "attention": ["self_attn", "cross_attn"],
        "recipe": {"scale_max": 15.0, "grad_scale_max": 224.0, "scale_mode": "amax", "granularity": "tensor",
                   "bias_grad": "quant", "accumulate": "fp32"},
    }  # fmt: skip
    assert_same(load_transformer(tmp_path).state_dict(), state)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_loaded_computes_what_was_in_memory(tmp_path, policy, dtype):
    model = stored(policy, dtype)
    save_transformer(model, tmp_path)
    again = load_transformer(tmp_path)
    assert_same(again.state_dict(), model.state_dict())
    assert recipes_of(again) == recipes_of(model)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(velocity(again), velocity(model))
    assert not torch.equal(velocity(again), velocity(plain(dtype)))
    report = inspect_checkpoint(tmp_path)
    assert (report.dtype, report.parameters) == (again.dtype, TINY.parameter_count()) == (dtype, report.parameters)
    assert report.quantization == Quantization.of([policy], 8) and report.quantization.policies(8) == [policy]
    assert f"weights of {len(list(policy.linear_names(8)))} linears are HiF8 codes with a scale for a " in str(report)


def test_another_dtype_is_for_what_is_not_quantized(tmp_path):
    save_transformer(stored(), tmp_path)
    expected = stored().state_dict()
    for dtype in (torch.float32, torch.float16):
        for state in (load_transformer(tmp_path, dtype=dtype).state_dict(), stored().to(dtype).state_dict()):
            for name in (f"blocks.0.ffn.0.weight{end}" for end in ("", "_scale")):
                assert state[name].dtype == expected[name].dtype and torch.equal(state[name], expected[name])
            assert state["blocks.0.ffn.0.bias"].dtype == state["head.head.weight"].dtype == dtype


def test_trained_layers_are_saved_as_plain_ones_beside_stored_ones_of_any_recipe(tmp_path):
    save_transformer(plain(), tmp_path / "plain")
    save_transformer(quantize_model(plain(), ALL), tmp_path / "trained")
    assert_same_files(tmp_path / "trained", tmp_path / "plain")

    model = plain()
    for policy in (
        QuantPolicy("hif8", linears=("ffn.0", "ffn.2"), blocks="0-3"),
        QuantPolicy("hif8", linears=("self_attn.q", "ffn.0"), blocks="4,6", recipe=HiF8Recipe(scale_mode="pow2")),
        QuantPolicy("none", "hif8", attention=("self_attn",), blocks="2-7", recipe=HiF8Recipe(scale_max=224.0)),
    ):
        quantize_model(model, policy, store=True)
    quantize_model(model, QuantPolicy("hif8", linears=("cross_attn.o",)))
    save_transformer(model, tmp_path / "a")
    again = load_transformer(tmp_path / "a")
    assert_same(again.state_dict(), model.state_dict())
    trained = [f"blocks.{number}.cross_attn.o" for number in range(8)]
    assert recipes_of(again) == {name: recipe for name, recipe in recipes_of(model).items() if name not in trained}
    assert {type(again.get_submodule(name)) for name in trained} == {torch.nn.Linear}
    assert len(config_of(tmp_path / "a")["quantization_config"]["also"]) == 2
    convert(tmp_path / "a", tmp_path / "b", naming="diffusers")
    assert config_of(tmp_path / "a") == config_of(tmp_path / "b")


def test_size_is_the_computed_one_and_about_half(tmp_path):
    config = TINY.replace(dim=192, ffn_dim=768, num_heads=8, freq_dim=8, text_dim=8, num_layers=20)
    model = OSPNextTransformer(config).to(torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    save_transformer(model, tmp_path / "bf16")
    save_transformer(quantize_model(model, ALL, store=True), tmp_path / "hif8")
    names = list(ALL.linear_names(20))
    codes = sum(math.prod(parameter_shapes(config)[f"{name}.weight"]) for name in names)
    sizes = [sum(tensor.nbytes for tensor in tensors_of(tmp_path / kind).values()) for kind in ("bf16", "hif8")]
    assert sizes == [2 * config.parameter_count(), 2 * config.parameter_count() - codes + 4 * len(names)]
    on_disk = [(tmp_path / kind / WEIGHTS).stat().st_size for kind in ("bf16", "hif8")]
    assert 0.5 < sizes[1] / sizes[0] < 0.53 and 0.5 < on_disk[1] / on_disk[0] < 0.53


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_conversion_equals_quantizing_and_saving(tmp_path, policy, dtype):
    """The source is fp32, so that bf16 shows whether weights are rounded before they are quantized."""
    source, whole, cut, expected = (tmp_path / name for name in ("source", "whole", "cut", "expected"))
    save_transformer(plain(torch.float32), source, naming="official", max_shard_size=200_000)
    save_transformer(quantize_model(load_transformer(source, dtype=dtype), policy, store=True), expected)
    convert(source, whole, naming="diffusers", dtype=dtype, quant=policy)
    assert_same_files(whole, expected)
    convert(source, cut, naming="diffusers", dtype=dtype, quant=policy, max_shard_size=1)
    assert_same(tensors_of(cut), tensors_of(expected))
    of_fp32, of_bf16 = (stored(policy, before).state_dict() for before in (torch.float32, torch.bfloat16))
    found, name = load_transformer(whole).state_dict(), "blocks.3.ffn.0.weight"
    assert [torch.equal(found[name], of[name]) for of in (of_fp32, of_bf16)] == [dtype is None, dtype is not None]


def test_codes_survive_renaming_resharding_and_another_dtype(tmp_path):
    model = stored(POLICIES["some"])
    save_transformer(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", naming="official", max_shard_size=50_000)
    assert_same(tensors_of(tmp_path / "b"), dict(model.state_dict()))
    convert(tmp_path / "b", tmp_path / "c", naming="official", dtype=torch.float16)
    dtypes = inspect_checkpoint(tmp_path / "c").quantization.dtypes
    dtypes = {name: dtypes.get(name, parameter_dtype(name, torch.float16)) for name in model.state_dict()}
    assert_same(tensors_of(tmp_path / "c"), {name: t.to(dtypes[name]) for name, t in model.state_dict().items()})
    convert(tmp_path / "b", tmp_path / "d", naming="diffusers")
    assert_same_files(tmp_path / "d", tmp_path / "a")


def test_conversion_from_the_command_line(tmp_path, capsys):
    source, quantized, other = (str(tmp_path / name) for name in ("source", "quantized", "other"))
    save_transformer(plain(torch.float32), source)
    words = "--to diffusers --dtype bfloat16 --quant hif8 --quant-blocks 2-5 --quant-attn hif8 --quant-granularity row"
    words += " --quant-scale-mode pow2 --quant-linears ffn.0,ffn.2"
    assert main(["convert", source, quantized, *words.split()]) == 0
    recipe = HiF8Recipe(scale_mode="pow2", granularity="row")
    policy = QuantPolicy("hif8", "hif8", linears=("ffn.0", "ffn.2"), blocks="2-5", recipe=recipe)
    assert_same(load_transformer(quantized).state_dict(), stored(policy).state_dict())
    for origin, options, message in (
        (quantized, "--quant hif8", "is quantized already (weights of 8 linears are HiF8 codes with a scale for a row"),
        (source, "--quant-blocks 1", "--quant-blocks says how to quantize, but nothing says to: add --quant hif8"),
        (source, "--quant hif8 --quant-linears ffn.1", "linears: 'ffn.1' is not one of self_attn.q"),
        (source, "--quant hif8 --quant-blocks 7-8", "the model has blocks 0 to 7"),
    ):
        assert main(["convert", origin, other, "--to", "official", *options.split()]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="names no linears"):
        convert(source, other, naming="official", quant=QuantPolicy(quant_attn="hif8"))
    assert not (tmp_path / "other").exists()


def test_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    save_transformer(plain(), tmp_path / "source")
    monkeypatch.setattr(convert_module, "quantized_weight", lambda weight, recipe: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(tmp_path / "source", tmp_path / "out", naming="official", quant=ALL)
    assert not (tmp_path / "out").exists()


def refusal(folder, state, config) -> str:
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load_transformer(folder)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    save_transformer(stored(POLICIES["rows"]), tmp_path / "model", naming="official")
    return tmp_path / "model"


def test_all_disagreements_of_config_and_tensors_are_listed_at_once(folder):
    state, config = tensors_of(folder), config_of(folder)
    del state["blocks.0.ffn.0.weight_scale"]
    state["blocks.1.ffn.0.weight"] = state["blocks.1.ffn.0.weight"].bfloat16()
    state["blocks.2.ffn.0.weight_scale"] = torch.ones(1, 1)
    state["blocks.3.ffn.0.weight_scale"] = state["blocks.3.ffn.0.weight_scale"].bfloat16()
    state["head.head.weight"] = state["head.head.weight"].to(torch.uint8)
    state["head.head.weight_scale"] = torch.ones(1, 1)
    config["quantization_config"]["blocks"] = "0-6"
    message = refusal(folder, state, config)
    for line in (
        "1 missing: blocks.0.ffn.0.weight_scale [96, 1]",
        "11 unexpected: head.head.weight_scale [1, 1]; blocks.7.",
        "1 wrongly shaped: blocks.2.ffn.0.weight_scale [1, 1], expected [96, 1]",
        "1 HiF8 codes by quantization_config but not uint8: blocks.1.ffn.0.weight bfloat16",
        "11 uint8 but no HiF8 codes by quantization_config: ",
        "1 scales of HiF8 codes but not float32: blocks.3.ffn.0.weight_scale bfloat16",
        "nothing was loaded",
    ):
        assert line in message
    assert "FP8" not in message


def test_codes_that_nothing_explains_are_refused(folder):
    message = refusal(folder, tensors_of(folder), config_of(folder) | {"quantization_config": None})
    assert "80 tensors are uint8 (" in message and "no quantization_config" in message
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="80 tensors are uint8"):
        load_transformer(folder / WEIGHTS, config_overrides={"num_heads": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "fp8"}, "has the quant_method 'fp8'; ospnext reads 'hif8' only"),
        ({"blocks": "0-8"}, "blocks '0-8': the model has blocks 0 to 7"),
        ({"linears": ["ffn.1"]}, "'ffn.1' is not one of"),
        ({"linaers": []}, "unknown key 'linaers' (did you mean 'linears'?)"),
        ({"recipe": {"scale_max": 1e9}}, "scale_max must lie between"),
        ({"also": [{"quant": "hif8", "blocks": "3"}]}, "blocks.3.cross_attn.k is quantized by two policies"),
        ({"also": "ffn"}, "'also' must be a list of policies, found 'ffn'"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(folder, change, message):
    config = config_of(folder)
    config["quantization_config"] |= change
    found = refusal(folder, tensors_of(folder), config)
    assert message in found and str(folder / "config.json") in found


def test_a_pipeline_folder_with_codes_generates(tmp_path):
    def frames(pipe):
        noise = torch.Generator().manual_seed(0)
        return pipe("a cat", height=32, width=48, num_frames=5, num_inference_steps=2, generator=noise).frames

    write_random_checkpoint(tmp_path / "plain")
    with use_backend("reference"):
        pipe = OSPNextPipeline.from_pretrained(tmp_path / "plain")
        quantize_model(pipe.transformer, ALL, store=True)
        pipe.save_pretrained(tmp_path / "hif8")
        again = OSPNextPipeline.from_pretrained(tmp_path / "hif8")
        assert sum(isinstance(m, StoredHiF8Linear) for m in again.transformer.modules()) == 80
        assert (frames(again) == frames(pipe)).all()
