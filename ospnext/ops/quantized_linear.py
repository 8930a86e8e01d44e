"""The linear layer on HiFloat8 operands: the function that models call, and the torch.library ops behind it. The
meaning is in contracts/quantized_linear.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ospnext.numerics import carrier
from ospnext.ops.contracts.quantized_linear import CONTRACT, QuantizedLinearRequest
from ospnext.ops.library import Decided, define
from ospnext.ops.policy import current_policy
from ospnext.ops.quantize import Quantized, amax_op, hif8_quantize, quantize_op, remember_group
from ospnext.ops.recipe import Accumulate, HiF8Recipe
from ospnext.ops.registry import registry
from ospnext.ops.select import select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class QuantizedLinearKernel(Protocol):
    """What an implementation's `target` provides. Codes are uint8: x [..., K], weight [N, K], gradient [..., N]. Scales
    are fp32 and broadcast to them: of x [1..., 1] or [..., 1], of the weight [1, 1] or [N, 1]. Where the implementation
    declares to handle `carried`, codes of both may be float8_e4m3fn: numbers of their own, in the forward pass only.
    """

    def forward(
        self,
        x_codes: Tensor,
        x_scale: Tensor,
        weight_codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        accumulate: Accumulate,
        scale_max: float,
    ) -> Tensor:
        """[..., N] in `dtype`. Decoded codes are at most `scale_max` in magnitude, or not finite."""

    def backward(
        self,
        grad_codes: Tensor,
        grad_scale: Tensor,
        x_codes: Tensor,
        x_scale: Tensor,
        weight_codes: Tensor,
        weight_scale: Tensor,
        *,
        dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
        accumulate: Accumulate,
        scale_max: float,
        grad_scale_max: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias in these dtypes; None where no gradient is asked for. All scales are per
        tensor, but that of a factor no gradient is multiplied with.
        """


def quantized_linear(
    x: Tensor | Quantized,
    weight: Tensor | Quantized,
    bias: Tensor | None = None,
    *,
    recipe: HiF8Recipe | None = None,
    x_quantized: Quantized | None = None,
    amax_group: ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x weight^T + bias with both factors in HiFloat8, and so the products of the backward pass.

    Args:
        x: [..., K]; fp64, fp32, bf16 or fp16. Or codes and scale, where nothing else is left of it; it then has no
            gradient, and `dtype` is that of the result.
        weight: [N, K] in any of these dtypes, quantized anew by each call; or codes [N, K] with a scale [1, 1] or
            [N, 1], which get no gradient. Where the codes are carried, so are those of x, and nothing has a gradient.
        bias: [N], never quantized.
        recipe: scales and sums; None = `HiF8Recipe()`.
        x_quantized: x as `hif8_quantize` gave it, where several layers share it: codes are then made and kept once.
        amax_group: ranks that each hold some tokens of one tensor: they share the scales of x and of the gradient.

    Returns:
        [..., N] in the dtype of x. What is kept for the backward pass is the codes, a byte per element, and scales.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or scales per row or carried codes meet a gradient
            they cannot serve.
        UnsupportedRequestError: no implementation that the policy allows takes the call; the message says why for each.
    """
    recipe = recipe or HiF8Recipe()
    settings: dict[str, Any] = {"scale_max": recipe.scale_max, "scale_mode": recipe.scale_mode}
    settings["granularity"] = recipe.granularity
    if isinstance(weight, Quantized):
        of_weight, codes = None, weight
    else:
        of_weight, codes = weight, hif8_quantize(weight.detach(), **settings)
    if isinstance(x, Quantized):
        if dtype is None or x_quantized is not None:
            raise ValueError("quantized_linear: x as codes needs dtype, that of the result, and no x_quantized")
        of_x, x_quantized = None, x
    else:
        if dtype not in (None, x.dtype):
            raise ValueError(f"quantized_linear: the result has the dtype of x, {x.dtype}; got dtype={dtype}")
        of_x, dtype = x, x.dtype
        if x_quantized is None:
            carried = codes.codes.dtype == carrier.DTYPE
            x_quantized = hif8_quantize(x.detach(), **settings, amax_group=amax_group, carried=carried)
    return _op(
        of_x,
        *x_quantized,
        of_weight,
        *codes,
        bias,
        dtype,
        recipe.accumulate,
        recipe.scale_max,
        recipe.grad_scale_max,
        recipe.scale_mode,
        recipe.bias_grad,
        remember_group(amax_group),
    )


def prefers_carried(weight: Tensor, dtype: torch.dtype, recipe: HiF8Recipe, bias: Tensor | None = None) -> bool:
    """Whether the implementation that the policy chooses for stored codes `weight` (uint8 [N, K]) is faster with
    carried ones.
    """
    features, inner = weight.shape
    request = QuantizedLinearRequest(
        device_type=weight.device.type,
        dtype=dtype,
        shape=(1, features, inner),
        x_granularity=recipe.granularity,
        weight_granularity=recipe.granularity,
        bias=bias is not None,
        mixed_bias=bias is not None and bias.dtype != dtype,
        accumulate="fp64" if dtype == torch.float64 else recipe.accumulate,
        scale_max=recipe.scale_max,
    )
    decision = select(CONTRACT, request, current_policy(), registry())
    return decision.chosen is not None and "carried" in decision.chosen.prefers


# ---- behind the function

_decided = Decided(CONTRACT)
_NOT_CONTRACTED = (
    "scales per row have no {what}: its sum runs over what they belong to. Use granularity='tensor', or no gradient"
)


def _kernel_for(
    x_codes: Tensor,
    x_scale: Tensor,
    weight_codes: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    accumulate: Accumulate,
    scale_max: float,
    grad_scale_max: float | None,
) -> QuantizedLinearKernel:
    """`grad_scale_max` is None for the forward pass."""
    tensors = (x_codes, x_scale, weight_codes, weight_scale, bias)
    signature = (
        *(None if t is None else (t.shape, t.dtype, t.device) for t in tensors),
        dtype,
        accumulate,
        scale_max,
        grad_scale_max,
    )
    kernel = _decided.get(signature)
    if kernel is None:
        _check(x_codes, x_scale, weight_codes, weight_scale, bias)
        features, inner = weight_codes.shape
        request = QuantizedLinearRequest(
            device_type=x_codes.device.type,
            dtype=dtype,
            shape=(x_codes[..., :1].numel(), features, inner),
            x_granularity="tensor" if x_scale.numel() == 1 else "row",
            weight_granularity="tensor" if weight_scale.numel() == 1 else "row",
            bias=bias is not None,
            mixed_bias=bias is not None and bias.dtype != dtype,
            accumulate="fp64" if dtype == torch.float64 else accumulate,
            scale_max=scale_max,
            grad_scale_max=224.0 if grad_scale_max is None else grad_scale_max,
            carried=x_codes.dtype == carrier.DTYPE,
            backward=grad_scale_max is not None,
        )
        kernel = _decided.decide(signature, request)
    return kernel


def _check(x_codes: Tensor, x_scale: Tensor, weight_codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    shapes = f"x {tuple(x_codes.shape)} and weight {tuple(weight_codes.shape)}"
    if x_codes.ndim < 1 or weight_codes.ndim != 2 or x_codes.shape[-1] != weight_codes.shape[1]:
        raise ValueError(f"quantized_linear: x must be [..., K] and weight [N, K]; got {shapes}")
    if x_codes.dtype != weight_codes.dtype or x_codes.dtype not in (torch.uint8, carrier.DTYPE):
        raise ValueError(
            "quantized_linear: codes of x and weight must both be uint8, or both carried in float8_e4m3fn; "
            f"got {x_codes.dtype} and {weight_codes.dtype}"
        )
    for name, scale, codes in (("x", x_scale, x_codes), ("weight", weight_scale, weight_codes)):
        legal = ([1] * codes.ndim, [*codes.shape[:-1], 1])
        if scale.dtype != torch.float32 or list(scale.shape) not in legal:
            raise ValueError(
                f"quantized_linear: the scale of {name} must be fp32 {tuple(legal[0])} or {tuple(legal[1])} "
                f"for codes {tuple(codes.shape)}; got {scale.dtype} {tuple(scale.shape)}"
            )
    if bias is not None and bias.shape != weight_codes.shape[:1]:
        raise ValueError(f"quantized_linear: bias must be ({weight_codes.shape[0]},); got {tuple(bias.shape)}")
    devices = {str(t.device) for t in (x_codes, x_scale, weight_codes, weight_scale, bias) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"quantized_linear: all tensors must be on one device; got {', '.join(sorted(devices))}")


def _forward(
    x, x_codes, x_scale, weight, weight_codes, weight_scale, bias, dtype, accumulate, scale_max, *of_gradient
) -> Tensor:
    if x is not None and x.shape != x_codes.shape:
        raise ValueError(f"quantized_linear: x is {tuple(x.shape)}, x_quantized holds {tuple(x_codes.shape)}")
    operands = (x_codes, x_scale, weight_codes, weight_scale, bias)
    kernel = _kernel_for(*operands, dtype, accumulate, scale_max, None)
    return kernel.forward(*operands, dtype=dtype, accumulate=accumulate, scale_max=scale_max)


def _forward_fake(x, x_codes, x_scale, weight, weight_codes, weight_scale, bias, dtype, *rest) -> Tensor:
    return x_codes.new_empty((*x_codes.shape[:-1], weight_codes.shape[0]), dtype=dtype)


def _backward(
    grad_codes, grad_scale, x_codes, x_scale, weight_codes, weight_scale, dx, dweight, dbias, accumulate, *scales
) -> list[Tensor]:
    if dx is not None and weight_scale.numel() != 1:
        raise ValueError(f"quantized_linear: {_NOT_CONTRACTED.format(what='gradient of x')}")
    if dweight is not None and x_scale.numel() != 1:
        raise ValueError(f"quantized_linear: {_NOT_CONTRACTED.format(what='gradient of the weight')}")
    dtypes = (dx, dweight, dbias)
    operands = (x_codes, x_scale, weight_codes, weight_scale)
    request_dtype = next(d for d in dtypes if d is not None)
    kernel = _kernel_for(*operands, None, request_dtype, accumulate, *scales)
    named = dict(zip(("scale_max", "grad_scale_max"), scales, strict=True))
    grads = kernel.backward(grad_codes, grad_scale, *operands, dtypes=dtypes, accumulate=accumulate, **named)
    return [grad_scale.new_empty(0) if g is None else g for g in grads]


def _backward_fake(
    grad_codes, grad_scale, x_codes, x_scale, weight_codes, weight_scale, dx, dweight, dbias, *settings
) -> list[Tensor]:
    shapes = ((dx, x_codes.shape), (dweight, weight_codes.shape), (dbias, weight_codes.shape[:1]))
    return [grad_scale.new_empty((0,) if d is None else shape, dtype=d) for d, shape in shapes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, x_codes, x_scale, weight, weight_codes, weight_scale, bias, _, *ctx.settings = inputs
    # Not x and weight themselves: their codes say all that the gradients need.
    ctx.save_for_backward(x_codes, x_scale, weight_codes, weight_scale)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, weight, bias))


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    accumulate, scale_max, grad_scale_max, scale_mode, bias_grad, group = ctx.settings
    of_x, _, _, of_weight, _, _, of_bias, *_ = ctx.needs_input_grad
    asked = (of_x, of_weight, of_bias and bias_grad == "quant")
    dtypes = [d if needed else None for d, needed in zip(ctx.dtypes, asked, strict=True)]
    dx = dweight = dbias = None
    if any(asked):
        saved = ctx.saved_tensors  # read once: activation checkpointing unpacks on each read, and refuses a second one
        if saved[0].dtype == carrier.DTYPE:
            raise ValueError(
                "quantized_linear: carried codes are for inference and give no gradient; use uint8 codes, or weights "
                "that are not stored as codes"
            )
        amax = amax_op(grad, "tensor", group) if group else None
        codes, scale = quantize_op(grad, amax, grad_scale_max, scale_mode, "tensor")
        found = _backward_op(codes, scale, *saved, *dtypes, accumulate, scale_max, grad_scale_max)
        dx, dweight, dbias = (g if d is not None else None for g, d in zip(found, dtypes, strict=True))
    if of_bias and bias_grad == "raw":
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=wide).to(ctx.dtypes[2])
    return (dx, None, None, dweight, None, None, dbias, *(None,) * 7)


_backward_op = define(
    "quantized_linear_backward",
    "Tensor grad_codes, Tensor grad_scale, Tensor x_codes, Tensor x_scale, Tensor weight_codes, Tensor weight_scale, "
    "ScalarType? dx, ScalarType? dweight, ScalarType? dbias, str accumulate, float scale_max, float grad_scale_max",
    "Tensor[]",
    kernel=_backward,
    fake=_backward_fake,
)
_op = define(
    "quantized_linear",
    "Tensor? x, Tensor x_codes, Tensor x_scale, Tensor? weight, Tensor weight_codes, Tensor weight_scale, "
    "Tensor? bias, ScalarType dtype, str accumulate, float scale_max, float grad_scale_max, str scale_mode, "
    "str bias_grad, str group",
    "Tensor",
    kernel=_forward,
    fake=_forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
