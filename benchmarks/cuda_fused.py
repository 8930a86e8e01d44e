"""The Triton kernels of the cuda backend at the shapes of the 14B model, beside their definitions on the same GPU.

    python benchmarks/cuda_fused.py --out benchmarks/results/cuda_fused.md

Each operator three times: the Triton kernel, its definition in plain PyTorch, and that under torch.compile. Bytes are
those of operands and results, each once, and of operands twice where a scale of the whole tensor is known only after
the last element; the rate is compared with that of a copy of 80640 x 5120 in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ospnext.backends.cuda.kernels.amax import amax_of_all
from ospnext.backends.cuda.quantize import quantize
from ospnext.backends.reference.quantize import quantize as reference_quantize
from ospnext.bench.measure import timed
from ospnext.numerics.scaling import amax_of
from ospnext.ops import use_backend
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.registry import registry

REPEATS = 5
TOKENS, CHANNELS, HEADS, HEAD_DIM, FFN = 80_640, 5120, 40, 128, 13_824
#: Operators whose gradient does not depend on x.
X_HAS_NO_PART = ("rope", "gate_residual")
HEADER = "| operator | pass | form | ms | GB | GB/s | of a copy |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    arguments = parser.parse_args()
    copy = copy_rate()
    lines = [
        "# Fused kernels of the cuda backend",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; bf16, median of {REPEATS}. "
        f"A copy of {TOKENS} x {CHANNELS}: {copy:.0f} GB/s.",
        "",
        HEADER,
        "|" + " --- |" * (HEADER.count("|") - 1),
        *rows(copy, arguments.only),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def milliseconds(call: Callable[[], object]) -> float:
    return timed(call, torch.device("cuda"), repeats=REPEATS, warm_up=2).median


def copy_rate() -> float:
    """GB/s, of reading and writing."""
    x = randn(TOKENS, CHANNELS)
    out = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda: out.copy_(x)) / 1e6


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


# ---- what is measured


def operands() -> Iterator[tuple[str, str, Callable[[], tuple[Any, ...]]]]:
    """(operator, variant, a function that makes its arguments), as the model calls it."""

    def x() -> Tensor:
        return randn(1, TOKENS, CHANNELS)

    def per_sample() -> Tensor:
        return randn(1, CHANNELS, dtype=torch.float32)

    def angles() -> tuple[Tensor, Tensor]:
        turn = randn(TOKENS, HEAD_DIM // 2, dtype=torch.float32)
        return turn.cos(), turn.sin()

    def modulated() -> tuple[Any, ...]:
        return x(), None, None, per_sample(), per_sample(), 1e-6

    def permutation() -> Tensor:
        return torch.arange(TOKENS, device="cuda").view(-1, 2).T.flatten()

    yield "rms_norm", "", lambda: (x(), randn(CHANNELS), 1e-6)
    yield "rope", "", lambda: (randn(1, TOKENS, HEADS, HEAD_DIM), *angles())
    yield "rms_norm_rope", "", lambda: (x(), randn(CHANNELS), *angles(), 1e-6)
    yield "layer_norm_modulate", "modulated", modulated
    yield "layer_norm_modulate", "affine", lambda: (x(), randn(CHANNELS), randn(CHANNELS), None, None, 1e-6)
    yield "gate_residual", "gated", lambda: (x(), x(), per_sample(), None)
    yield "gate_residual", "gated, permuted", lambda: (x(), x(), per_sample(), permutation())
    yield "gelu_tanh", "", lambda: (randn(1, TOKENS, FFN),)
    for granularity in ("row", "tensor"):
        form = (15.0, "amax", granularity, True)
        yield "layer_norm_modulate_quantize", granularity, lambda form=form: (*modulated(), *form)
        yield "gelu_tanh_quantize", granularity, lambda form=form: (randn(1, TOKENS, FFN), *form)


def rows(copy: float, only: str) -> Iterator[str]:
    for name, variant, make in operands():
        if only not in name:
            continue
        contract, args = CONTRACTS[f"fused.{name}"], make()
        (kernel,) = (i for i in registry().manifests["cuda"].offers(contract.name) if i.id == "cuda.triton")
        target = registry().kernel(kernel)
        label = f"{name}, {variant}" if variant else name
        yield from forms(label, "forward", target.forward, contract.composite.forward, args, args, copy)
        if contract.composite.backward is not None:
            # Whatever the forward returns has the shape that the gradient has.
            grad = torch.randn_like(target.forward(*args))
            both, read = (grad, *args), (grad, *(args[1:] if name in X_HAS_NO_PART else args))
            yield from forms(label, "backward", target.backward, contract.composite.backward, both, read, copy)
        del args
    for label, kernel, definition, args in quantizers():
        if only in label:
            # Of hif8_quantize the definition makes tables in Python, which is nothing to compile.
            yield from forms(label, "forward", kernel, definition, args, args, copy, compiled=label == "amax")


def quantizers() -> Iterator[tuple[str, Callable, Callable, tuple[Any, ...]]]:
    """(operator and variant, kernel, definition, arguments) of what quantizes a tensor that is there already."""
    x = randn(1, TOKENS, CHANNELS)
    yield "amax", amax_of_all, lambda x: amax_of(x, "tensor"), (x,)
    for granularity in ("row", "tensor"):
        how = {"scale_max": 15.0, "scale_mode": "amax", "granularity": granularity, "carried": True}
        kernel, definition = (partial(f, amax=None, **how) for f in (quantize, reference_quantize))
        yield f"hif8_quantize, {granularity}", kernel, definition, (x,)


def forms(
    label: str,
    direction: str,
    kernel: Callable,
    definition: Callable,
    args: tuple[Any, ...],
    read: tuple[Any, ...],
    copy: float,
    compiled: bool = True,
) -> Iterator[str]:
    """A definition that calls hif8_quantize has the kernel of that; what is fused is plain."""
    torch.compiler.reset()
    ways = {"Triton": kernel, "definition": definition}
    if compiled:
        ways["compiled"] = torch.compile(definition, fullgraph=True, dynamic=False)
    twice = args[:1] if label.endswith(", tensor") else ()
    moved = nbytes(read) + nbytes(twice) + nbytes(kernel(*args))
    for form, function in ways.items():
        ms = milliseconds(lambda f=function: f(*args))
        rate = moved / ms / 1e6
        yield f"| {label} | {direction} | {form} | {ms:.3f} | {moved / 1e9:.2f} | {rate:.0f} | {rate / copy:.0%} |"


def nbytes(tensors: Any) -> int:
    found = tensors if isinstance(tensors, (tuple, list)) else (tensors,)
    return sum(t.nbytes for t in found if isinstance(t, Tensor))


if __name__ == "__main__":
    with use_backend("cuda", ops={"fused": "composite"}), torch.no_grad():
        main()
