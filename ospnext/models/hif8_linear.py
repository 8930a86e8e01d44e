"""Linears whose products are made of HiFloat8 codes, with weights that are trained or that are stored as codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ospnext import ops
from ospnext.errors import ConfigError
from ospnext.numerics import carrier
from ospnext.numerics.scaling import ScaleMode
from ospnext.ops import HiF8Recipe, Quantized
from ospnext.ops.recipe import LinearGranularity

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class HiF8Linear(nn.Linear):
    """`nn.Linear` that quantizes its input and its weight in each call. Parameters, names and dtypes stay those of
    nn.Linear, so that optimizers, adapters and checkpoints notice nothing.

    What is kept for the backward pass is the codes of both, one byte per element.
    """

    recipe: HiF8Recipe
    #: Ranks that hold other tokens of the same input: they share its scale.
    amax_group: ProcessGroup | None = None

    @classmethod
    def of(cls, linear: nn.Linear, recipe: HiF8Recipe) -> HiF8Linear:
        """Take over the parameters of `linear`, not copies of them."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias, made.recipe = linear.weight, linear.bias, recipe
        return made.train(linear.training)

    def forward(self, input: Tensor, x_quantized: Quantized | None = None) -> Tensor:
        """input [..., K]; `x_quantized` are its codes, where several linears share it."""
        return ops.quantized_linear(
            input,
            self.weight,
            self.bias,
            recipe=self.recipe,
            x_quantized=x_quantized,
            amax_group=self.amax_group,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.recipe}"


class StoredHiF8Linear(nn.Module):
    """A linear whose weight is codes (uint8 [N, K]) and their scale (fp32 [1, 1] or [N, 1]): half the memory of bf16.
    The weight cannot be trained; gradients reach the input and the bias, unless the codes are carried.
    """

    weight: Tensor
    weight_scale: Tensor
    amax_group: ProcessGroup | None = None

    def __init__(
        self, in_features: int, out_features: int, recipe: HiF8Recipe, *, bias: bool = True, device: Any = None
    ) -> None:
        super().__init__()
        self.recipe = recipe
        rows = out_features if recipe.granularity == "row" else 1
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, 1, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, recipe: HiF8Recipe) -> StoredHiF8Linear:
        """Quantize the weight of `linear` for good."""
        made = cls(linear.in_features, linear.out_features, recipe, bias=linear.bias is not None, device="meta")
        made.weight, made.weight_scale = quantized_weight(linear.weight, recipe)
        made.bias = linear.bias
        return made.train(linear.training)

    def forward(
        self, input: Tensor | Quantized, x_quantized: Quantized | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """input [..., K]; `x_quantized` are its codes, where several linears share it. Or codes alone, with the dtype
        of the result.
        """
        return ops.quantized_linear(
            input,
            Quantized(self.weight, self.weight_scale),
            self.bias,
            recipe=self.recipe,
            x_quantized=x_quantized,
            amax_group=self.amax_group,
            dtype=dtype,
        )

    @torch.no_grad()
    def carry(self, dtype: torch.dtype) -> None:
        """Keep the weight in the form that the linear of the backend multiplies at once, if it prefers one for results
        in `dtype`. The layer is then for inference, and cannot be saved.
        """
        if self.weight.dtype == torch.uint8 and ops.prefers_carried(self.weight, dtype, self.recipe, self.bias):
            self.weight, self.weight_scale = carrier.carry(self.weight, self.weight_scale, self.recipe.scale_max)

    @property
    def carried(self) -> bool:
        return self.weight.dtype == carrier.DTYPE

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._refuse_carried("saved")
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._refuse_carried("loaded into")
        super()._load_from_state_dict(*arguments)

    def _refuse_carried(self, what: str) -> None:
        if self.carried:
            raise ConfigError(
                f"prepare_for_inference has changed the codes of this model into numbers that a device multiplies: it "
                f"cannot be {what}. Do that before, or load the model again"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredHiF8Linear:
        """`.to(dtype)` is for the bias: codes and scale keep their bits, and only move."""
        codes, scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        for name, kept in (("weight", codes), ("weight_scale", scale)):
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                setattr(
                    self, name, torch.empty_like(moved, dtype=kept.dtype) if kept.is_meta else kept.to(moved.device)
                )
        return self

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}, {self.recipe}"


def quantized_weight(weight: Tensor, recipe: HiF8Recipe) -> Quantized:
    """What `HiF8Linear` makes of its weight in each call."""
    return ops.hif8_quantize(
        weight.detach(), scale_max=recipe.scale_max, scale_mode=recipe.scale_mode, granularity=recipe.granularity
    )


class InputForm(NamedTuple):
    """How linears want their input where the operator before them may quantize it: arguments of its quantizing twin."""

    scale_max: float
    scale_mode: ScaleMode
    granularity: LinearGranularity
    carried: bool


def input_form(*linears: nn.Module) -> InputForm | None:
    """The form of an input that all of these take as codes; None where they need the input itself.

    Gradients need the input, and so do hooks and ranks that share a scale."""
    if torch.is_grad_enabled() or len({_alike(linear) for linear in linears}) != 1:
        return None
    if any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return None
    first = linears[0]
    if not isinstance(first, StoredHiF8Linear) or first.amax_group is not None:
        return None
    recipe = first.recipe
    return InputForm(recipe.scale_max, recipe.scale_mode, recipe.granularity, first.carried)


def project(x: Tensor | Quantized, *linears: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """x through each of the linears. Where all are in HiFloat8 and alike, the codes of x are made once, and kept once
    for the backward pass. Codes, as `input_form` describes them, give results in `dtype`.
    """
    if isinstance(x, Quantized):
        return tuple(cast(StoredHiF8Linear, linear)(x, dtype=dtype) for linear in linears)
    if any(linear._forward_pre_hooks for linear in linears):  # they may change x, each in its own way
        return tuple(linear(x) for linear in linears)
    if len({_alike(linear) for linear in linears}) > 1 or not isinstance(linears[0], HiF8Linear | StoredHiF8Linear):
        return tuple(linear(x) for linear in linears)
    first = linears[0]
    shared = ops.hif8_quantize(
        x.detach(),
        scale_max=first.recipe.scale_max,
        scale_mode=first.recipe.scale_mode,
        granularity=first.recipe.granularity,
        amax_group=first.amax_group,
        carried=isinstance(first, StoredHiF8Linear) and first.carried,
    )
    return tuple(cast(HiF8Linear, linear)(x, shared) for linear in linears)


def _alike(linear: nn.Module) -> tuple[Any, ...] | None:
    """What the codes of an input depend on, but for the input."""
    if not isinstance(linear, HiF8Linear | StoredHiF8Linear):
        return None
    recipe, carried = linear.recipe, isinstance(linear, StoredHiF8Linear) and linear.carried
    return recipe.scale_max, recipe.scale_mode, recipe.granularity, linear.amax_group, carried
