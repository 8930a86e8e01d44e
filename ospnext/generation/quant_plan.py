"""What quantization changes in the plan of a run: memory, kernels, and the policy in a line."""

from __future__ import annotations

import torch

from ospnext.models.config import TransformerConfig
from ospnext.models.loading import LoadReport
from ospnext.models.quant_policy import LINEARS, QuantPolicy
from ospnext.models.weights.quantized import Quantization
from ospnext.models.weights.shapes import parameter_shapes
from ospnext.ops import HiF8Recipe
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.hif8_cast import CastRequest
from ospnext.ops.contracts.native_attention import NativeAttentionRequest
from ospnext.ops.contracts.quantize import QuantizeRequest
from ospnext.ops.contracts.quantized_linear import QuantizedLinearRequest
from ospnext.ops.policy import current_policy
from ospnext.ops.registry import registry
from ospnext.ops.select import Decision, select


def planned(report: LoadReport, policy: QuantPolicy | None) -> Quantization:
    """What will be codes, or pass through them: layers of the checkpoint and those of the policy."""
    found = report.quantization
    if policy is None or policy.compat != "none":
        return found
    more = Quantization.of([policy], report.config.num_layers)
    return Quantization({**found.linears, **more.linears}, {**found.attention, **more.attention})


def decisions(
    config: TransformerConfig, tokens: int, dtype: torch.dtype, device: torch.device, quantization: Quantization
) -> dict[str, Decision]:
    """The selection for every operator that quantization adds, by what it is for."""
    found: dict[str, Decision] = {}
    entering = dict.fromkeys(quantization.linears.values())
    for (N, K, recipe), names in _linears_alike(config, quantization).items():
        per = recipe.granularity
        linear = QuantizedLinearRequest(
            device.type, dtype, (tokens, N, K), per, per, bias=True, accumulate=recipe.accumulate
        )
        found[f"quantized_linear {K} -> {N} ({', '.join(names)})"] = _decide("quantized_linear", linear)
    for recipe in entering:
        shape = (1, tokens, config.dim)
        request = QuantizeRequest(device.type, dtype, shape, recipe.scale_max, recipe.scale_mode, recipe.granularity)
        found[f"hif8_quantize of what enters these{_which(recipe, entering)}"] = _decide("hif8_quantize", request)
    attending = dict.fromkeys(quantization.attention.values())
    for recipe in attending:
        if recipe.attention == "native":
            native = NativeAttentionRequest(
                *(device.type, dtype, 1, tokens, tokens, config.num_heads, config.head_dim),
                scale_max=recipe.scale_max,
                scale_mode=recipe.scale_mode,
            )
            label = "native_attention: on 8-bit q, k, v and probabilities, or as quantized_attention"
            found[label + _which(recipe, attending)] = _decide("native_attention", native)
            continue
        heads = (1, tokens, config.num_heads, config.head_dim)
        request = QuantizeRequest(device.type, dtype, heads, recipe.scale_max, recipe.scale_mode)
        label = "quantized_attention: attention as above, of q, k and v after hif8_fake_quantize"
        found[label + _which(recipe, attending)] = _decide("hif8_fake_quantize", request)
    return found


def compat_decisions(policy: QuantPolicy | None, dtype: torch.dtype, device: torch.device) -> dict[str, Decision]:
    """Of a policy that computes scales as another code base does, around two casts."""
    if policy is None or policy.compat == "none":
        return {}
    request = CastRequest(device.type, dtype, (1,))
    return {f"{name} for {policy.compat}": _decide(name, request) for name in ("hif8_encode", "hif8_decode")}


def in_a_line(policy: QuantPolicy) -> str:
    parts = []
    if policy.quant == "hif8":
        names = "all linears" if set(policy.linears) == set(LINEARS) else ", ".join(policy.linears)
        parts.append(f"{names} (weights {'stored as codes' if policy.compat == 'none' else 'quantized in each call'})")
    if policy.quant_attn != "none":
        native = " and their 8-bit attention" if policy.quant_attn == "hif8_native" else ""
        others = "" if policy.attention_blocks is None else f" in {_blocks(policy.attention_blocks)}"
        parts.append(f"q, k and v of {' and '.join(policy.attention)}{native}{others}")
    where = _blocks(policy.blocks)
    how = f"scale_mode={policy.recipe.scale_mode} granularity={policy.recipe.granularity}"
    if policy.compat != "none":
        how += f" compat={policy.compat}"
    return f"HiFloat8 in {where}: {'; '.join(parts)}; {how}"


def _blocks(text: str) -> str:
    return "all blocks" if text == "all" else f"blocks {text}"


def _decide(contract: str, request: object) -> Decision:
    return select(CONTRACTS[contract], request, current_policy(), registry())


def _linears_alike(
    config: TransformerConfig, quantization: Quantization
) -> dict[tuple[int, int, HiF8Recipe], dict[str, None]]:
    """(output features, input features, recipe) -> names within a block of the linears that share them."""
    shapes = parameter_shapes(config)
    found: dict[tuple[int, int, HiF8Recipe], dict[str, None]] = {}
    for name, recipe in quantization.linears.items():
        N, K = shapes[f"{name}.weight"]
        found.setdefault((N, K, recipe), {})[name.split(".", 2)[2]] = None  # "blocks.3.ffn.0"
    return found


def _which(recipe: HiF8Recipe, of: dict[HiF8Recipe, None]) -> str:
    return f" ({recipe.scale_mode}, per {recipe.granularity})" if len(of) > 1 else ""
