"""The one call that makes a transformer compute in HiFloat8 where a policy says so."""

from __future__ import annotations

from typing import cast

from torch import nn

from ospnext.errors import ConfigError
from ospnext.models.attend import Attend
from ospnext.models.hif8_linear import HiF8Linear, StoredHiF8Linear
from ospnext.models.quant_policy import ATTENTIONS, LINEARS, QuantPolicy
from ospnext.models.transformer import OSPNextTransformer
from ospnext.models.upstream_bf16 import RoundTrip, UpstreamBf16Linear

__all__ = ["ATTENTIONS", "LINEARS", "QuantPolicy", "prepare_for_inference", "quantize_model"]


def quantize_model(model: OSPNextTransformer, policy: QuantPolicy, *, store: bool = False) -> OSPNextTransformer:
    """Make the layers of `policy` compute in HiFloat8, in place; returns the model.

    Args:
        store: keep weights as codes, which halves their memory and freezes them. Otherwise parameters stay as they are
            and can be trained.

    Raises:
        ConfigError: the model has no such block, or one of the layers is quantized already, or the model is sharded
            or shares its samples, or `store` is asked for with a `compat`. The model is then as it was.
    """
    layers, recipe = model.config.num_layers, policy.recipe
    if model.sequence is not None:
        raise ConfigError("the model shares its samples with other ranks: quantize it first, and share it then")
    if store and policy.compat != "none":
        raise ConfigError(f"compat={policy.compat!r} quantizes weights in each call: it has no stored codes")
    linears = {name: model.get_submodule(name) for name in policy.linear_names(layers)}
    attends = {name: cast(Attend, model.get_submodule(f"{name}.attend")) for name in policy.attention_names(layers)}
    for name, linear in linears.items():
        if type(linear) is not nn.Linear:
            raise ConfigError(
                f"{name} is a {type(linear).__name__}: only plain linears can be quantized, and only once"
            )
        if hasattr(linear.weight, "device_mesh"):  # a DTensor, without importing what defines them
            raise ConfigError(f"the weight of {name} is sharded: quantize the model first, and shard it then")
    for name, attend in attends.items():
        if attend.recipe is not None or attend.round_trip is not None:
            raise ConfigError(f"{name} is quantized already: attention can be quantized only once")
    upstream = policy.compat == "upstream_bf16"
    kind = UpstreamBf16Linear if upstream else StoredHiF8Linear if store else HiF8Linear
    for name, linear in linears.items():
        model.set_submodule(name, kind.of(cast(nn.Linear, linear), recipe))
    for attend in attends.values():
        if upstream:
            attend.round_trip = RoundTrip(recipe)
        else:
            attend.recipe = policy.attention_recipe
    return model


def prepare_for_inference(model: OSPNextTransformer) -> OSPNextTransformer:
    """Keep stored codes in the form that the backend in force multiplies fastest, in place; returns the model.

    Call it on the device and under the backend that will run. The model can then neither be saved nor give gradients.
    Other backends compute with the same values if they handle carried codes, as the reference does."""
    for module in model.modules():
        if isinstance(module, StoredHiF8Linear):
            module.carry(model.dtype)
    return model
