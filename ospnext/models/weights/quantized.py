"""Which tensors of a checkpoint are HiFloat8 codes: what config.json says about it, and where tensors disagree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ospnext.config import resolve, to_dict
from ospnext.errors import CheckpointError, ConfigError
from ospnext.models.quant_policy import ATTENTIONS, LINEARS, QuantAttn, QuantPolicy
from ospnext.models.weights.checkpoint_files import CONFIG_NAME, Checkpoint, StoredTensor
from ospnext.models.weights.keymaps import KeyMap
from ospnext.models.weights.shapes import Shape
from ospnext.ops import HiF8Recipe
from ospnext.ops.recipe import AttentionForm

KEY, METHOD = "quantization_config", "hif8"
#: Policies beside the first, of a model that no single policy describes.
_ALSO = "also"
#: How codes are computed from weights is no property of codes: `compat` is not written.
_WRITTEN = ("quant", "quant_attn", "linears", "attention", "blocks", "recipe")
_CODES, _SCALE = torch.uint8, torch.float32


@dataclass(frozen=True)
class Quantization:
    """Recipes by official name: of linears whose weight is stored as codes, and of attentions. False if there are none.

    It says of every layer what it is, where a policy says it of many; policies are how it is written.
    """

    linears: Mapping[str, HiF8Recipe] = field(default_factory=dict)
    attention: Mapping[str, HiF8Recipe] = field(default_factory=dict)

    @classmethod
    def of(cls, policies: Iterable[QuantPolicy], num_layers: int) -> Quantization:
        """What the policies ask for together.

        Raises:
            ConfigError: there is no such block, two of them name one layer, or one has no stored form.
        """
        linears: dict[str, HiF8Recipe] = {}
        attention: dict[str, HiF8Recipe] = {}
        for policy in policies:
            if policy.compat != "none":
                raise ConfigError(f"compat={policy.compat!r} quantizes weights in each call: it has no stored codes")
            for known, names, recipe in (
                (linears, policy.linear_names(num_layers), policy.recipe),
                (attention, policy.attention_names(num_layers), policy.attention_recipe),
            ):
                new = dict.fromkeys(names, recipe)
                if twice := sorted(known.keys() & new.keys()):
                    raise ConfigError(f"{twice[0]} is quantized by two policies")
                known |= new
        return cls(linears, attention)

    def __bool__(self) -> bool:
        return bool(self.linears or self.attention)

    def __str__(self) -> str:
        parts = []
        if self.linears:
            rows = sum(recipe.granularity == "row" for recipe in self.linears.values())
            scales = "a tensor" if not rows else "a row" if rows == len(self.linears) else "a tensor or a row"
            parts.append(f"weights of {len(self.linears)} linears are HiF8 codes with a scale for {scales}")
        if self.attention:
            parts.append(f"{len(self.attention)} attentions compute in HiF8")
        return ", ".join(parts) or "nothing in HiF8"

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By official name, of the tensors whose dtype is that of the format, whatever dtype the model has."""
        codes = {f"{name}.weight": _CODES for name in self.linears}
        return codes | {scale_name(weight): _SCALE for weight in codes}

    def shapes(self, plain: Mapping[str, Shape]) -> dict[str, Shape]:
        """Every tensor of the checkpoint: `plain` is the same model without codes. A scale comes after its codes."""
        found: dict[str, Shape] = {}
        for name, shape in plain.items():
            found[name] = shape
            recipe = self.linears.get(name.removesuffix(".weight"))
            if recipe is not None and name.endswith(".weight"):
                found[scale_name(name)] = (shape[0] if recipe.granularity == "row" else 1, 1)
        return found

    def policies(self, num_layers: int) -> list[QuantPolicy]:
        """As policies: blocks that are quantized alike share one."""
        blocks: dict[tuple[HiF8Recipe, QuantAttn, tuple[str, ...], tuple[str, ...]], list[int]] = defaultdict(list)
        for number in range(num_layers):
            linears, attention = (
                {name: known[f"blocks.{number}.{name}"] for name in names if f"blocks.{number}.{name}" in known}
                for names, known in ((LINEARS, self.linears), (ATTENTIONS, self.attention))
            )
            for recipe in dict.fromkeys(replace(r, attention="qdq") for r in (*linears.values(), *attention.values())):
                names = _with(recipe, linears)
                for quant_attn, chosen in _attentions_with(recipe, attention):
                    blocks[recipe, quant_attn, names, chosen].append(number)
                    names = ()
        return [
            QuantPolicy(
                quant="hif8" if linears else "none",
                quant_attn=quant_attn,
                linears=linears or LINEARS,
                attention=attention or ATTENTIONS,
                blocks=_ranges(numbers, num_layers),
                recipe=recipe,
            )
            for (recipe, quant_attn, linears, attention), numbers in blocks.items()
        ]

    def config_entry(self, num_layers: int) -> dict[str, Any]:
        """What config.json holds besides the shape of the model; nothing for nothing quantized."""
        if not self:
            return {}
        first, *others = (_written(policy) for policy in self.policies(num_layers))
        return {KEY: {"quant_method": METHOD, **first} | ({_ALSO: others} if others else {})}


def scale_name(weight: str) -> str:
    """Under which name the scale of the codes `weight` is stored, in either naming."""
    return f"{weight}_scale"


def read_quantization(checkpoint: Checkpoint, num_layers: int) -> Quantization:
    """What config.json says, for a model of `num_layers`.

    Raises:
        CheckpointError: it says something else than HiF8, something impossible, or nothing where tensors are uint8.
    """
    raw = (checkpoint.config or {}).get(KEY)
    if raw is None:
        _refuse_unexplained_codes(checkpoint)
        return Quantization()
    method = raw.get("quant_method") if isinstance(raw, dict) else raw
    if method != METHOD:
        raise CheckpointError(
            f"{checkpoint.config_path}: {KEY} has the quant_method {method!r}; ospnext reads {METHOD!r} only. Take the "
            "bfloat16, float16 or float32 version of the model; `ospnext convert --quant hif8` quantizes that"
        )
    try:
        return Quantization.of(_read_policies(raw), num_layers)
    except ValueError as error:  # ConfigError is one, and a recipe raises it too
        raise CheckpointError(f"{checkpoint.config_path}: {KEY} cannot be used: {error}") from error


def disagreements(stored: Mapping[str, StoredTensor], keys: KeyMap, quantization: Quantization) -> dict[str, list[str]]:
    """By kind, the stored tensors whose dtype is not the one that the format gives them."""
    kinds: dict[str, list[str]] = {
        (not_codes := f"HiF8 codes by {KEY} but not uint8"): [],
        (unlisted := f"uint8 but no HiF8 codes by {KEY}"): [],
        (not_scales := "scales of HiF8 codes but not float32"): [],
    }
    asked = quantization.dtypes
    for name, ours in keys.official.items():
        wanted, dtype = asked.get(ours), stored[name].dtype
        if wanted is None and dtype == _name(_CODES):
            kinds[unlisted].append(name)
        elif wanted is not None and dtype != _name(wanted):
            kinds[not_codes if wanted == _CODES else not_scales].append(f"{name} {dtype}")
    return kinds


def _refuse_unexplained_codes(checkpoint: Checkpoint) -> None:
    codes = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype == _name(_CODES)]
    if codes:
        raise CheckpointError(
            f"{checkpoint.path}: {len(codes)} tensors are uint8 ({', '.join(codes[:3])}{', ...' if codes[3:] else ''}) "
            f"but no {KEY} in a {CONFIG_NAME} next to them says what they encode. Put the {CONFIG_NAME} there that was "
            "written with these weights, or take an unquantized version of the model"
        )


def _read_policies(raw: Mapping[str, Any]) -> Iterator[QuantPolicy]:
    others = raw.get(_ALSO, [])
    if not isinstance(others, list) or not all(isinstance(other, dict) for other in others):
        raise ConfigError(f"{_ALSO!r} must be a list of policies, found {others!r}")
    first = {name: value for name, value in raw.items() if name not in ("quant_method", _ALSO)}
    for number, values in enumerate([first, *others], 1):
        yield resolve(QuantPolicy, (f"policy {number}", values))


def _written(policy: QuantPolicy) -> dict[str, Any]:
    found = {name: value for name, value in to_dict(policy).items() if name in _WRITTEN}
    del found["recipe"]["attention"]  # `quant_attn` says it
    return found


def _attentions_with(recipe: HiF8Recipe, recipes: Mapping[str, HiF8Recipe]) -> list[tuple[QuantAttn, tuple[str, ...]]]:
    """(quant_attn, names of attention) of those whose scales are those of `recipe`; none is one, too."""
    forms: tuple[tuple[QuantAttn, AttentionForm], ...] = (("hif8", "qdq"), ("hif8_native", "native"))
    found = [(word, _with(replace(recipe, attention=form), recipes)) for word, form in forms]
    return [(word, names) for word, names in found if names] or [("none", ())]


def _with(recipe: HiF8Recipe, recipes: Mapping[str, HiF8Recipe]) -> tuple[str, ...]:
    return tuple(name for name, found in recipes.items() if found == recipe)


def _ranges(numbers: list[int], num_layers: int) -> str:
    """Ascending block numbers as a policy has them: "all", or "0,4-9"."""
    if len(numbers) == num_layers:
        return "all"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
