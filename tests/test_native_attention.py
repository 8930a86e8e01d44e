"""Attention on 8-bit operands: who takes a call and who must not, what is refused, and which layers compute so.

The suite itself judges the composition; broken_native_attention.py has kernels that it must find."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from broken_native_attention import E4M3, Fp8Attention
from small_models import random_inputs, random_model, sparse

from ospnext import ops
from ospnext.backends.cuda.attention.spans import spans
from ospnext.backends.reference import MANIFEST
from ospnext.errors import ConfigError, UnsupportedRequestError
from ospnext.generation.config import GenerateConfig, QuantPolicyConfig
from ospnext.generation.quantization import quant_policy
from ospnext.models.loading import load_transformer, save_transformer
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.models.weights.quantized import Quantization
from ospnext.ops import HiF8Recipe
from ospnext.ops.contract import need
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts import native_attention_bounds as bounds
from ospnext.ops.contracts.attention import cumulative
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import Implementation, Manifest, Registry
from ospnext.ops.tolerance import Interval, judge_interval

CONTRACT = CONTRACTS["native_attention"]
CASES = {case.id.rpartition("/")[2]: case for case in CONTRACT.cases()}
NATIVE = HiF8Recipe(attention="native")
FEATURES = frozenset({"packed", "custom_scale", "scale_max", "scale_mode", "given_amax"})

fp8 = Fp8Attention()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def operands(tokens: int = 37) -> list[torch.Tensor]:
    return [randn(1, tokens, 2, 32, seed=seed) for seed in range(3)]


def only_bf16(request, device):
    yield need(request.dtype == torch.bfloat16, "dtype", got=request.dtype, want="bf16")


@contextlib.contextmanager
def backend_with_a_kernel() -> Iterator[Manifest]:
    """The reference, which also declares a kernel for native attention in bf16."""
    kernel = Implementation(
        "acme.fp8", "native_attention", f"{__name__}:fp8", FEATURES, supports=f"{__name__}:only_bf16"
    )
    others = (dataclasses.replace(i, id=f"acme.{i.id.partition('.')[2]}") for i in MANIFEST.implementations)
    manifest = dataclasses.replace(MANIFEST, backend="acme", implementations=(kernel, *others))
    with use_registry(Registry([manifest])):
        yield manifest


# ---- who serves


def composed(q, k, v, scale=32**-0.5, amax=(None, None)) -> torch.Tensor:
    """What the contract says of dense calls, step by step: v makes its round trip without the mean of each channel."""
    q, k = (ops.hif8_fake_quantize(t, amax=given) for t, given in zip((q, k), amax, strict=True))
    mean = v.float().mean((0, 1))
    rest = ops.hif8_fake_quantize(v.float() - mean)
    out = ops.attention(q, k, rest.to(v.dtype), scale=scale)
    return (out + (mean - rest.mean((0, 1)))).to(q.dtype)


def test_without_a_kernel_it_is_attention_on_quantized_operands_bit_for_bit():
    q, k, v = operands()
    assert torch.equal(ops.quantized_attention(q, k, v, recipe=NATIVE), composed(q, k, v))
    found = ops.quantized_attention(q, k, v, recipe=NATIVE, scale=0.3)
    assert torch.equal(found, composed(q, k, v, scale=0.3))
    assert not torch.equal(found, composed(q, k, v))


def test_a_mean_of_v_passes_unrounded():
    """Added to every key it is added to every result, and takes no bits from what it is added to."""
    q, k, v = (t.float() for t in operands())
    shift = torch.linspace(-8, 8, 64).view(2, 32)
    found = ops.quantized_attention(q, k, v + shift, recipe=NATIVE) - shift
    torch.testing.assert_close(found, ops.quantized_attention(q, k, v, recipe=NATIVE), atol=1e-5, rtol=0)
    exact = ops.attention(q, k, v)
    rounded_whole = ops.quantized_attention(q, k, v + shift) - shift
    assert (found - exact).norm() < 0.5 * (rounded_whole - exact).norm()


def test_packed_rows_without_keys_have_no_mean_either():
    q, k, v = (t[0] for t in operands(9))
    pack = {"max_seqlen_q": 5, "max_seqlen_kv": 9}
    pack |= {"cu_seqlens_q": cumulative((4, 5)), "cu_seqlens_kv": cumulative((0, 9))}
    found = ops.quantized_attention(q, k, v + 3, recipe=NATIVE, **pack)
    assert not found[:4].any()
    assert torch.equal(found[4:], composed(q[None], k[None], v[None] + 3)[0, 4:])


def test_a_kernel_takes_what_it_can_and_leaves_nothing_to_chance():
    q, k, v = operands()
    with backend_with_a_kernel():
        found = ops.quantized_attention(q, k, v, recipe=NATIVE)
        assert torch.equal(found, _by_fp8(q, k, v)) and not torch.equal(found, composed(q, k, v))
        wide = [t.float() for t in (q, k, v)]
        with pytest.raises(UnsupportedRequestError, match=r"dtype: got torch.float32, [\s\S]*OSPNEXT_FALLBACK"):
            ops.quantized_attention(*wide, recipe=NATIVE)
        for policy in ({"fallback": ("quantize",)}, {"ops": {"native_attention": "composite"}}):
            with ops.use_backend("acme", **policy):
                found = ops.quantized_attention(*wide, recipe=NATIVE)
                assert torch.equal(found, composed(*wide))


def _by_fp8(q, k, v, **more):
    settings = {"cu_seqlens_q": None, "cu_seqlens_kv": None, "scale": 32**-0.5, "amax": None}
    return fp8.forward(q, k, v, **settings | {"scale_max": 15.0, "scale_mode": "amax"} | more)


def test_given_scales_are_used():
    """By ranks that share them: one for q and one for k. That of v is not of v without its mean, and serves nobody."""
    q, k, v = operands()
    amax = [torch.full((1, 1, 1, 1), value) for value in (9.0, 11.0)]
    arguments = (None, None, 0, 0, None, 15.0, "amax")
    found = torch.ops.ospnext.native_attention(q, k, v, *arguments, amax)
    assert torch.equal(found, composed(q, k, v, amax=amax))
    assert not torch.equal(found, torch.ops.ospnext.native_attention(q, k, v, *arguments, []))
    with backend_with_a_kernel():
        found = torch.ops.ospnext.native_attention(q, k, v, *arguments, amax)
        assert torch.equal(found, _by_fp8(q, k, v, amax=amax))
    with pytest.raises(ValueError, match="amax is that of q and k, or empty; got 1 tensors"):
        torch.ops.ospnext.native_attention(q, k, v, *arguments, amax[:1])


# ---- what it refuses


def test_gradients_and_masks_are_refused_with_what_serves_them():
    q, k, v = operands()
    with pytest.raises(ValueError, match=r"no gradient.*attention='qdq'.*torch\.no_grad"):
        ops.quantized_attention(q, k.requires_grad_(), v, recipe=NATIVE)
    with torch.no_grad():
        ops.quantized_attention(q, k, v, recipe=NATIVE)
    mask = torch.ones(1, 37, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"takes no key_mask; got \(1, 37\).*attention='qdq'"):
        ops.quantized_attention(q, k.detach(), v, recipe=NATIVE, key_mask=mask)
    with pytest.raises(ValueError, match="must agree in batch, heads and head_dim"):
        ops.quantized_attention(q, k.detach()[..., :16], v, recipe=NATIVE)
    with pytest.raises(ValueError, match="attention must be one of qdq, native"):
        HiF8Recipe(attention="fp8")


# ---- the bounds


def judged(name: str, out: torch.Tensor):
    return CONTRACT.expect(CONTRACT.inputs(CASES[name])).judge({"out": out})["out"]


@pytest.mark.parametrize("name", CASES)
def test_fp8_arithmetic_is_within_the_bounds(name):
    """Near the bound, too, where there is something to round: one several times wider would find nothing."""
    case = CASES[name]
    named = CONTRACT.inputs(case)
    recipe, scale = named["recipe"], named.get("scale")
    pack = {key: named.get(key) for key in ("cu_seqlens_q", "cu_seqlens_kv")}
    scale = case.request.head_dim**-0.5 if scale is None else scale
    settings = {"scale": scale, "scale_max": recipe.scale_max, "scale_mode": recipe.scale_mode, "amax": None}
    verdict = judged(name, fp8.forward(named["q"], named["k"], named["v"], **pack, **settings))
    assert verdict.ok
    # The probability of a key that has it all is an FP8 number, and so is its result; as are probabilities that are
    # all alike. A result that is little but the centre is hardly rounded.
    nearest = {"large": 0.25, "zeroscale": 0.0, "k20160-offset": 0.15}.get(name.partition("-")[2], 0.6)
    assert verdict.rms_error > nearest * verdict.rms_bound


def test_a_rounding_of_e4m3_is_what_the_bounds_say():
    """By rounding: the largest error, and the largest root mean square among places where a binade of 1/x may begin."""
    found = []
    for begin in torch.arange(0, 1, 1 / 64):
        x = torch.exp2(begin + torch.linspace(0, 1, 100_001, dtype=torch.float64))
        error = x.float().to(E4M3).double() - x
        assert (error / x).abs().max() <= bounds.ROUNDING
        found.append((error.square().mean() / x.square().mean()).sqrt().item())
    assert max(found) == pytest.approx(bounds.ROUNDING_RMS, rel=0.02)  # steps are few: 8 to a binade
    assert max(found) > 1.1 * min(found)
    half_a_step = torch.finfo(E4M3).smallest_normal / 16
    assert half_a_step == bounds.E4M3_HALF_STEP == bounds.RESULT_HALF_STEP * torch.finfo(E4M3).max


def test_an_error_of_logits_moves_a_result_by_less_than_the_bound():
    generator = torch.Generator().manual_seed(0)
    for off in (1e-3, 0.1, 1.0):
        logits = 3 * torch.randn(200, 50, generator=generator, dtype=torch.float64)
        v = torch.randn(50, 8, generator=generator, dtype=torch.float64)
        p = logits.softmax(-1)
        out = p @ v
        spread = (p @ v.square() - out.square()).sqrt()
        for signs in torch.randint(0, 2, (20, 200, 50), generator=generator):
            moved = (logits + off * (2 * signs - 1)).softmax(-1) @ v
            assert ((moved - out).abs() <= math.expm1(2 * off) * spread).all()


def test_an_interval_with_an_rms_judges_all_elements_together():
    middle = torch.full((1000,), 2.0, dtype=torch.float64)
    interval = Interval(middle - 1, middle + 1, rms=0.1)
    near, far = torch.full((1000,), 2.15), torch.full((1000,), 2.25)
    verdict = judge_interval(near, interval, torch.float32)
    assert verdict.ok and verdict.rms_error == pytest.approx(0.075)
    assert not judge_interval(far, interval, torch.float32).ok
    one_outside = middle.float()
    one_outside[0] = 3.1
    assert not judge_interval(one_outside, interval, torch.float32).ok
    assert judge_interval(far, dataclasses.replace(interval, rms=None), torch.float32).ok


# ---- which layers


def recipes(model) -> dict[str, str]:
    """The form of attention by name."""
    return {
        name.removesuffix(".attend"): module.recipe.attention
        for name, module in model.named_modules()
        if name.endswith(".attend") and module.recipe is not None
    }


def test_attention_can_have_blocks_of_its_own():
    policy = QuantPolicy("hif8", "hif8_native", attention=("self_attn",), blocks="0-2", attention_blocks="1,6-7")
    model = quantize_model(random_model(sparse()), policy)
    assert recipes(model) == {f"blocks.{number}.self_attn": "native" for number in (1, 6, 7)}
    linears = {name for name, module in model.named_modules() if getattr(module, "recipe", None) == policy.recipe}
    assert {name.split(".")[1] for name in linears} == {"0", "1", "2"}
    assert quantize_model(random_model(sparse()), QuantPolicy(quant_attn="hif8_native", blocks="3")) is not None
    for wrong, message in (
        ({"attention_blocks": "2:3"}, "attention_blocks must be 'all' or numbers"),
        ({"attention_blocks": "7-8"}, "attention_blocks '7-8': the model has blocks 0 to 7"),
        ({"compat": "upstream_bf16"}, "compat='upstream_bf16' has no quant_attn='hif8_native'"),
        ({"recipe": NATIVE}, "say it as quant_attn='hif8_native'"),
    ):
        with pytest.raises(ConfigError, match=message):
            quantize_model(random_model(sparse()), QuantPolicy(quant_attn="hif8_native", **wrong))


def test_checkpoints_say_which_form_attention_has(tmp_path):
    policies = [
        QuantPolicy("hif8", "hif8_native", blocks="2-5"),
        QuantPolicy(quant_attn="hif8", attention=("self_attn",), blocks="6"),
        QuantPolicy(quant_attn="hif8_native", attention=("cross_attn",), blocks="6"),
    ]
    model = random_model(dataclasses.replace(sparse(), out_dim=5))
    for policy in policies:
        quantize_model(model, policy, store=True)
    save_transformer(model, tmp_path)
    again = load_transformer(tmp_path)
    forms = {f"blocks.{n}.{name}": "native" for n in (2, 3, 4, 5) for name in ("self_attn", "cross_attn")}
    assert recipes(again) == recipes(model) == forms | {"blocks.6.self_attn": "qdq", "blocks.6.cross_attn": "native"}
    assert Quantization.of(policies, 8).policies(8) == policies


def test_settings_of_generate_reach_the_policy():
    asked = QuantPolicyConfig(blocks="2-5", attention_blocks=3)
    found = quant_policy(GenerateConfig(quant="hif8", quant_attn="hif8_native", quant_policy=asked))
    assert found == QuantPolicy("hif8", "hif8_native", blocks="2-5", attention_blocks="3")
    with pytest.raises(ConfigError, match=r"quant_policy\.attention_blocks has no effect without quant_attn=hif8"):
        GenerateConfig(quant="hif8", quant_policy=asked)


# ---- lengths on the host


def test_spans_are_read_once_for_each_tensor_and_again_when_it_was_written(monkeypatch):
    read = []
    monkeypatch.setattr(torch.Tensor, "tolist", _counted(torch.Tensor.tolist, read))
    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    for _ in range(3):
        assert spans(ends) == [slice(0, 3), slice(3, 3), slice(3, 7)]
    assert len(read) == 1
    assert spans(ends.clone()) == spans(ends) and len(read) == 2
    ends[1] = 2
    assert spans(ends) == [slice(0, 2), slice(2, 3), slice(3, 7)] and len(read) == 3
    with torch.inference_mode():
        untracked = torch.tensor([0, 1], dtype=torch.int32)
        spans(untracked)
        untracked[1] = 2  # nothing tells that it was written
        assert spans(untracked) == [slice(0, 2)]


def _counted(function, into):
    def call(*arguments, **named):
        into.append(arguments)
        return function(*arguments, **named)

    return call


# ---- whole calls


def test_packs_of_one_sequence_are_dense_calls():
    q, k, v = operands()
    ends = cumulative((37,))
    pack = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": 37, "max_seqlen_kv": 37}
    with backend_with_a_kernel():
        found = ops.quantized_attention(*(t[0] for t in (q, k, v)), recipe=NATIVE, **pack)
        assert torch.equal(found, ops.quantized_attention(q, k, v, recipe=NATIVE)[0])


def test_a_model_computes_natively_where_a_kernel_is(monkeypatch):
    calls = []
    monkeypatch.setattr(fp8, "forward", _counted(fp8.forward, calls))
    config, dtype = sparse(), torch.bfloat16
    model = quantize_model(random_model(config, dtype=dtype), QuantPolicy(quant_attn="hif8_native", blocks="1"))
    inputs = random_inputs(config, (2, 4, 6), dtype=dtype)
    with torch.no_grad():
        plain = model(*inputs)
        with backend_with_a_kernel():
            native = model(*inputs)
    assert len(calls) == 2  # self- and cross-attention of one block
    assert not torch.equal(native, plain)
    assert (native - plain).norm() < 0.05 * plain.norm()
