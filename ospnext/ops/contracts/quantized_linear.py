"""The linear layer on HiFloat8 operands: everything that is true about it, stated once; the format's arithmetic is in
quantize_oracle.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Level, Through, as_is
from ospnext.ops.contracts import quantize_oracle as oracle
from ospnext.ops.contracts.hif8_cast import DTYPES, generator_of, op, quantize_contract
from ospnext.ops.recipe import Accumulate, HiF8Recipe, LinearGranularity

MEANING = """\
y = (decode(x) decode(w)^T) * s_x * s_w + bias, where (x, s_x) and (w, s_w) are codes and scales as hif8_quantize gives
them. x [..., K], weight [N, K], bias [N], y [..., N] in the dtype of the unquantized x, contiguous. Any strides; no
tokens, and no features to add up, are legal.

Sum         of grid values, whose products are exact in fp32, in fp32 or, as far as the dtype of the result can tell,
            better; in fp64 on request and for fp64. accumulate="fast" allows sums that keep 14 bits.
Order       sum, then scales in fp32, then the bias, then one rounding to the dtype of y.
Scales      per tensor; or of x per row and of the weight per row (output feature). They act by IEEE arithmetic: 0 gives
            0, and NaN where a sum is Inf; Inf gives Inf, and NaN where a sum is 0.
Backward    g = hif8_quantize(dy, scale_max=grad_scale_max), once, serves all: dx = g w, dweight = g^T x, both with
            their scales, and dbias = sum of g ("quant") or of dy ("raw"), in the dtypes of x, weight and bias.
            Quantizers pass gradients straight through; scales are constants. A scale inside the sum of a gradient is
            refused.
Saved       codes and scales.
Range       Decoded codes of x and weight are at most scale_max in magnitude, of the gradient grad_scale_max, as
            quantizers make them. An implementation may give NaN for larger ones, and for Inf.
Carried     codes of x and weight may both be E4M3 numbers (see hif8_quantize); then there is no backward pass."""


@dataclass(frozen=True)
class QuantizedLinearRequest:
    """What selection knows of a call; `shape` is (tokens M, output features N, input features K), `dtype` that of the
    result.
    """

    device_type: str
    dtype: torch.dtype
    shape: tuple[int, int, int]
    x_granularity: LinearGranularity = "tensor"
    weight_granularity: LinearGranularity = "tensor"
    bias: bool = False
    #: The bias has another dtype than the result: it must not be rounded before it is added.
    mixed_bias: bool = False
    accumulate: Accumulate = "fp32"
    scale_max: float = 15.0
    grad_scale_max: float = 224.0
    backward: bool = False
    carried: bool = False


# ---- inputs

#: On the grid, at most 224, and few bits: sums of their products are exact in fp32.
_GRADIENT_INTEGERS = (0, 1, 2, 3, 4, 6, 8, 16, 224)


def _inputs(case: Case) -> dict[str, Any]:
    """x, weight or its codes, bias, grad_out and the recipe."""
    request, options = case.request, case.options
    recipe: HiF8Recipe = options["recipe"]
    generator = generator_of(case)
    (_, features, inner), tokens = request.shape, options["tokens"]

    def random(*shape: int) -> Tensor:
        if case.exact:
            return torch.randint(-15, 16, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def largest(x: Tensor, value: float) -> Tensor:
        """An exact case has scales of 1."""
        if case.exact and x.numel():
            x.flatten()[0] = value
        return x

    def rounded(x: Tensor, scale_max: float, dtype: torch.dtype = request.dtype) -> Tensor:
        return oracle.away_from_ties(x.to(dtype), scale_max, recipe.scale_mode, recipe.granularity)

    x = largest(random(*tokens, inner), 15.0) * (1.0 if case.exact else 3.0)
    weight_dtype = options.get("weight_dtype", request.dtype)
    weight = largest(random(features, inner), -15.0) * (1.0 if case.exact else 0.02)
    if cancelled := options.get("cancelled", 0):
        # The products of as many features undo those of the ones before: what sums lost on the way is what is left.
        x[..., cancelled : 2 * cancelled] = -x[..., :cancelled]
        weight[:, cancelled : 2 * cancelled] = weight[:, :cancelled]
    named: dict[str, Any] = {"x": rounded(x, recipe.scale_max)}
    named["weight"] = rounded(weight, recipe.scale_max, weight_dtype)
    if "stored" in options:
        values, scale = oracle.quantized(
            named["weight"], recipe.scale_max, recipe.scale_mode, options.get("weight_granularity", recipe.granularity)
        )
        named["weight"] = oracle.codes_of(values)
        named["weight_scale"] = scale if options["stored"] is True else torch.full_like(scale, options["stored"])
        if request.carried:
            numbers, power = oracle.carried(values, recipe.scale_max)
            named["weight"], named["weight_scale"] = numbers.to(torch.float8_e4m3fn), named["weight_scale"] / power
    named["bias"] = random(features).to(weight_dtype) if request.bias else None
    if request.backward:
        if case.exact:
            grid = torch.tensor(_GRADIENT_INTEGERS, dtype=torch.float64)
            grad = grid[torch.randint(0, len(grid), (*tokens, features), generator=generator)]
            grad = largest(grad * random(*tokens, features).sign(), 224.0).to(request.dtype)
        else:
            grad = rounded(random(*tokens, features) * 1e-4, recipe.grad_scale_max)
        named["grad_out"] = grad
    return named | {"recipe": recipe}


# ---- the formula


def _evaluate(named: Mapping[str, Any], product: Any, wide: torch.dtype) -> dict[str, Tensor]:
    """All results; `product(a [M, K], b [N, K])` adds up in `wide`."""
    recipe: HiF8Recipe = named["recipe"]
    x, weight, bias = named["x"], named["weight"], named["bias"]
    tokens = x.shape[:-1]
    x_values, x_scale = oracle.quantized(x, recipe.scale_max, recipe.scale_mode, recipe.granularity)
    if weight.dtype == torch.float8_e4m3fn:
        w_values, w_scale = weight.double(), named["weight_scale"]
        x_values, power = oracle.carried(x_values, recipe.scale_max)
        x_scale = x_scale / power
    elif "weight_scale" in named:
        w_values, w_scale = oracle.decoded(weight), named["weight_scale"]
    else:
        w_values, w_scale = oracle.quantized(weight, recipe.scale_max, recipe.scale_mode, recipe.granularity)
    x_values, w_values = x_values.flatten(0, -2).to(wide), w_values.to(wide)
    x_scale, w_scale = x_scale.reshape(-1, 1).to(wide), w_scale.to(wide)
    y = product(x_values, w_values) * x_scale * w_scale.mT
    found = {"out": (y if bias is None else y + bias.to(wide)).unflatten(0, tokens)}
    if "grad_out" not in named:
        return found
    grad = named["grad_out"]
    g_values, g_scale = oracle.quantized(grad, recipe.grad_scale_max, recipe.scale_mode)
    g_values, g_scale = g_values.flatten(0, -2).to(wide), g_scale.reshape(1, 1).to(wide)
    found["dx"] = (product(g_values, w_values.mT) * g_scale * w_scale).unflatten(0, tokens)
    if "weight_scale" not in named:
        found["dweight"] = product(g_values.mT, x_values.mT) * g_scale * x_scale
    if bias is not None:
        ones = torch.ones(1, len(g_values), dtype=wide)
        raw = recipe.bias_grad == "raw"
        summed = product(ones, grad.flatten(0, -2).to(wide).mT if raw else g_values.mT)[0]
        found["dbias"] = summed if raw else summed * g_scale[0]
    return found


def _oracle(named: Mapping[str, Any]) -> dict[str, Tensor]:
    return _evaluate(named, lambda a, b: a @ b.mT, torch.float64)


def _yardstick(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """Sums in fp32 from the last element to the first, 16 at a time; 32 at a time and cut to 14 bits for "fast"."""
    fast = named["recipe"].accumulate == "fast"
    step = 32 if fast else 16

    def product(a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(len(a), len(b))
        for left, right in zip(reversed(a.split(step, dim=1)), reversed(b.split(step, dim=1)), strict=True):
            total = total + left @ right.mT
            total = _cut(total) if fast else total
        return total

    dtype = named["x"].dtype
    wide = torch.float64 if torch.float64 == dtype or named["recipe"].accumulate == "fp64" else torch.float32
    weight_dtype = dtype if "weight_scale" in named else named["weight"].dtype
    found = _evaluate(named, product, wide)
    of_parameters = {"dweight": weight_dtype, "dbias": None if named["bias"] is None else named["bias"].dtype}
    return {name: value.to(of_parameters.get(name) or dtype) for name, value in found.items()}


def _cut(x: Tensor) -> Tensor:
    """fp32 numbers without all but the first 13 bits of their fractions."""
    return (x.view(torch.int32) & ~0x3FF).view(torch.float32)


def _call(named: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    from ospnext import ops

    names = ("x", "bias") if "weight_scale" in named else ("x", "weight", "bias")
    leaves = {name: named[name] for name in names if named[name] is not None}
    if "grad_out" in named:
        leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    weight = leaves.get("weight")
    if "weight_scale" in named:
        weight = ops.Quantized(named["weight"], named["weight_scale"])
    out = through(ops.quantized_linear)(leaves["x"], weight, leaves.get("bias"), recipe=named["recipe"])
    found = {"out": out.detach()}
    if "grad_out" in named:
        grads = torch.autograd.grad(out, list(leaves.values()), named["grad_out"])
        found |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def _library_calls(named: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    recipe: HiF8Recipe = named["recipe"]
    quantize, with_gradient = op("hif8_quantize"), "grad_out" in named

    x, weight, bias = (named[key] for key in ("x", "weight", "bias"))
    carried = weight.dtype == torch.float8_e4m3fn

    def quantized(t: Tensor, scale_max: float) -> tuple[Tensor, Tensor]:
        return quantize(t, None, scale_max, recipe.scale_mode, recipe.granularity, carried)

    def leaf(t: Tensor | None) -> Tensor | None:
        return t.detach().requires_grad_(with_gradient) if t is not None else None

    of_x = quantized(x, recipe.scale_max)
    stored = "weight_scale" in named
    of_weight = (weight, named["weight_scale"]) if stored else quantized(weight, recipe.scale_max)
    scales = (recipe.scale_max, recipe.grad_scale_max)
    yield (
        op("quantized_linear"),
        (
            *(leaf(x), *of_x, None if stored else leaf(weight), *of_weight, leaf(bias)),
            *(x.dtype, recipe.accumulate, *scales, recipe.scale_mode, recipe.bias_grad, ""),
        ),
    )
    if with_gradient:
        dtypes = (x.dtype, weight.dtype, bias.dtype)
        of_grad = quantized(named["grad_out"], recipe.grad_scale_max)
        yield op("quantized_linear_backward"), (*of_grad, *of_x, *of_weight, *dtypes, recipe.accumulate, *scales)


# ---- cases

#: Tokens and features of a plain case; no two alike, none a multiple of a tile.
TOKENS, FEATURES, INNER = (2, 53), 71, 93
PER_ROW = HiF8Recipe(granularity="row")


def _case(
    words: str,
    tag: str,
    *,
    tokens: tuple[int, ...] = TOKENS,
    features: int = FEATURES,
    inner: int = INNER,
    recipe: HiF8Recipe | None = None,
    bias: bool = True,
    backward: bool = False,
    crossed: bool = False,
    exact: bool = False,
    **options: Any,
) -> Case:
    recipe = recipe or HiF8Recipe()
    request = QuantizedLinearRequest(
        "cpu",
        DTYPES[tag],
        (math.prod(tokens), features, inner),
        x_granularity=recipe.granularity,
        weight_granularity=options.get("weight_granularity", recipe.granularity),
        bias=bias,
        mixed_bias=bias and options.get("weight_dtype", DTYPES[tag]) != DTYPES[tag],
        accumulate=recipe.accumulate,
        scale_max=recipe.scale_max,
        grad_scale_max=recipe.grad_scale_max,
        backward=backward,
        carried=options.get("carried", False),
    )
    options |= {"recipe": recipe, "tokens": tokens}
    # Nothing asks every device to have FP8.
    level: Level = "optional" if request.carried else "required"
    return Case(f"quantized_linear/{level}/{tag}-{words}", level, request, options, crossed=crossed, exact=exact)


def _cases() -> Iterator[Case]:
    raw = HiF8Recipe(bias_grad="raw")
    for tag in ("bf16", "fp32"):
        yield _case("exact-backward", tag, backward=True, exact=True)
        yield _case("plain", tag, bias=False)
        yield _case("backward", tag, backward=True, crossed=True)
        yield _case("nobias-backward", tag, bias=False, backward=True)
        yield _case("rawbias-backward", tag, recipe=raw, backward=True)
        yield _case("stored", tag, stored=True, crossed=True)
        yield _case("stored-backward", tag, stored=True, backward=True)
        yield _case("row", tag, recipe=PER_ROW, crossed=True)
        yield _case("stored-row", tag, recipe=PER_ROW, stored=True)
        # Sizes that tensor cores take as they are.
        yield _case("aligned-plain", tag, tokens=(2, 56), features=96, inner=112, bias=False)
        yield _case("aligned-backward", tag, tokens=(2, 56), features=96, inner=112, backward=True, crossed=True)
        yield _case("aligned-stored", tag, tokens=(2, 56), features=96, inner=112, stored=True, crossed=True)
        yield _case("aligned-nobias-backward", tag, tokens=(1,), features=96, inner=112, bias=False, backward=True)
        yield _case("aligned-row", tag, tokens=(56,), features=96, inner=112, recipe=PER_ROW)
        yield _case("m1-backward", tag, tokens=(1,), backward=True)
        yield _case("m0-backward", tag, tokens=(0,), backward=True)
        yield _case("k1-n1-backward", tag, features=1, inner=1, backward=True)
        yield _case("k0", tag, inner=0)
    yield _case("pow2-backward", "bf16", recipe=HiF8Recipe(scale_mode="pow2"), backward=True)
    yield _case("scalemax-backward", "bf16", recipe=HiF8Recipe(scale_max=224.0, grad_scale_max=15.0), backward=True)
    yield _case("fp32weight-backward", "bf16", backward=True, weight_dtype=torch.float32)
    aligned: dict[str, Any] = {"tokens": (2, 56), "features": 96, "inner": 112}
    yield _case("aligned-fp32weight-backward", "bf16", **aligned, backward=True, weight_dtype=torch.float32)
    # Long sums are where tensor cores that add with few bits would show.
    long: dict[str, Any] = {"tokens": (7,), "features": 48, "inner": 13_824}
    yield _case("aligned-k13824", "bf16", **long)
    yield _case("k13824", "fp32", tokens=(7,), features=33, inner=13_824)
    yield _case("m32768-backward", "fp32", tokens=(32_768,), features=5, inner=9, backward=True)
    yield _case("tiles-backward", "bf16", tokens=(512,), features=384, inner=256, backward=True)
    wide = HiF8Recipe(accumulate="fp64")
    sums: dict[str, Any] = {"tokens": (7,), "features": 33, "inner": 13_824, "bias": False, "cancelled": 6_900}
    yield _case("accumulate64-k13824", "fp32", recipe=wide, **sums)
    yield _case("backward", "fp64", backward=True)
    stored: dict[str, Any] = {"stored": True, "carried": True}
    for tag in ("bf16", "fp32"):
        yield _case("carried", tag, **stored)
        yield _case("carried-row", tag, **stored, recipe=PER_ROW)
        yield _case("carried-aligned", tag, **aligned, **stored, crossed=True)
        yield _case("carried-aligned-row", tag, **aligned, **stored, recipe=PER_ROW, crossed=True)
    yield _case("carried-aligned-row-nobias", "bf16", **aligned, **stored, bias=False, recipe=PER_ROW)
    yield _case("carried-aligned-row-m0", "bf16", **aligned | {"tokens": (0,)}, **stored, recipe=PER_ROW)
    yield _case("carried-aligned-row-k13824", "bf16", **long, **stored, recipe=PER_ROW)
    yield _case("aligned-k13824-row", "bf16", **long, recipe=PER_ROW)
    fast, fast_row = (HiF8Recipe(granularity=g, accumulate="fast") for g in get_args(LinearGranularity))
    yield _case("carried-fast", "bf16", **aligned, **stored, recipe=fast)
    yield _case("carried-fast-row-k13824", "bf16", **long, **stored, recipe=fast_row)
    yield _case("scale0", "fp32", stored=0.0)
    yield _case("scaleinf", "fp32", stored=math.inf)
    yield _case("scalenan", "fp32", stored=math.nan)


CONTRACT = quantize_contract(
    "quantized_linear",
    MEANING,
    QuantizedLinearRequest,
    inputs=_inputs,
    oracle=_oracle,
    yardstick=_yardstick,
    call=_call,
    cases=_cases,
    library_calls=_library_calls,
)
