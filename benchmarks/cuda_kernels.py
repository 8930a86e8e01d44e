"""What each kernel of the cuda backend takes at the shapes of the 14B model, beside the alternatives on the same GPU.

    python benchmarks/cuda_kernels.py --out benchmarks/results/cuda_kernels.md

Medians of CUDA events over fresh random inputs; rates count the operations of the plain formula."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ospnext import ops
from ospnext.bench.measure import timed
from ospnext.ops import use_backend
from ospnext.ops.policy import current_policy
from ospnext.ops.registry import registry

REPEATS = 5
HEADS, HEAD_DIM, CHANNELS, FFN = 40, 128, 5120, 13_824
#: (name, batch, tokens): a full block and a sparse one at 768P.
LENGTHS = (("full block, 768P", 1, 80_640), ("sparse block, 768P", 4, 20_160))
#: Subsequences of a sparse block at 720P, which differ in length.
PACKED = (19_320, 19_320, 18_480, 18_480)
TOKENS = 80_640


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name()
    lines = [
        "# Kernels of the cuda backend",
        "",
        f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; median of {REPEATS}.",
        "",
    ]
    for title, head, rows in (
        ("Attention", "| shape | implementation | forward ms | TFLOP/s | forward and backward ms |", attention_rows()),
        ("Quantized linear", "| shape | implementation | ms | TFLOP/s | times bf16 |", linear_rows()),
        ("Quantization of [80640, 5120] bf16", "| what | implementation | ms | GB/s | of a copy |", quantize_rows()),
    ):
        lines += [f"## {title}", "", head, "|" + " --- |" * head.count(" | ") + " --- |", *rows, ""]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def milliseconds(call: Callable[[], object]) -> float:
    return timed(call, torch.device("cuda"), repeats=REPEATS, warm_up=2).median


def implementations(contract: str) -> Iterator[str]:
    """Those of the backend whose packages are installed."""
    for implementation in registry().manifests["cuda"].offers(contract):
        if not registry().missing_packages(implementation):
            yield implementation.id


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * scale


# ---- attention


def attention_rows() -> Iterator[str]:
    for name, batch, tokens in LENGTHS:
        q, k, v = (randn(batch, tokens, HEADS, HEAD_DIM) for _ in range(3))
        flops = 4 * batch * tokens**2 * HEADS * HEAD_DIM
        yield from _attention(name, (q, k, v), {}, flops, ops.attention)
    q, k, v = (randn(sum(PACKED), HEADS, HEAD_DIM) for _ in range(3))
    ends = torch.tensor([0, *PACKED], device="cuda").cumsum(0).int()
    pack = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": max(PACKED), "max_seqlen_kv": max(PACKED)}
    flops = 4 * sum(n**2 for n in PACKED) * HEADS * HEAD_DIM
    yield from _attention("sparse block, 720P, packed", (q, k, v), pack, flops, ops.attention_packed)


def _attention(name: str, operands: tuple[Tensor, ...], pack: dict, flops: int, function: Callable) -> Iterator[str]:
    for implementation in implementations("attention"):
        if implementation == "cuda.math":
            continue  # minutes: it is there for what no kernel takes
        with use_backend("cuda", ops={"attention": implementation}):
            forward = milliseconds(lambda: function(*operands, **pack))
            both = ""
            if implementation != "cuda.cudnn" and "full" not in name:
                leaves = [t.detach().requires_grad_() for t in operands]
                grad = torch.randn_like(operands[0])

                def step(leaves=leaves, grad=grad):
                    torch.autograd.grad(function(*leaves, **pack), leaves, grad)

                both = f"{milliseconds(step):.1f}"
        yield f"| {name} | {implementation} | {forward:.1f} | {flops / forward / 1e9:.0f} | {both} |"


# ---- linear


def linear_rows() -> Iterator[str]:
    for inner, features in ((CHANNELS, CHANNELS), (CHANNELS, FFN), (FFN, CHANNELS)):
        x, weight, bias = randn(TOKENS, inner), randn(features, inner, scale=0.02), randn(features)
        flops, shape = 2 * TOKENS * inner * features, f"{TOKENS} x {inner} -> {features}"
        plain = milliseconds(lambda x=x, w=weight, b=bias: torch.nn.functional.linear(x, w, b))
        yield f"| {shape} | bf16 linear of PyTorch | {plain:.2f} | {flops / plain / 1e9:.0f} | 1.00 |"
        with use_backend("cuda", ops={}):
            stored = ops.hif8_quantize(weight)
            codes = ops.hif8_quantize(x)
        for implementation in implementations("quantized_linear"):
            if implementation == "cuda.torch":
                continue
            with use_backend("cuda", ops={"quantized_linear": implementation}):
                for words, given in (("with codes of x", codes), ("and its quantization", None)):
                    call = functools.partial(ops.quantized_linear, x, stored, bias, x_quantized=given)
                    ms = milliseconds(call)
                    rate = flops / ms / 1e9
                    yield f"| {shape} | {implementation}, {words} | {ms:.2f} | {rate:.0f} | {plain / ms:.2f} |"


# ---- quantization


def quantize_rows() -> Iterator[str]:
    x = randn(TOKENS, CHANNELS)
    out = torch.empty_like(x)
    copy = 2 * x.nbytes / milliseconds(lambda: out.copy_(x)) / 1e6
    yield f"| copy | PyTorch | {2 * x.nbytes / copy / 1e6:.2f} | {copy:.0f} | 100% |"
    for what, function, moved in (
        ("quantize (amax, then codes)", ops.hif8_quantize, 2 * x.nbytes + x.numel()),
        ("fake_quantize (amax, then values)", ops.hif8_fake_quantize, 3 * x.nbytes),
    ):
        contract = "hif8_quantize" if what.startswith("quantize") else "hif8_fake_quantize"
        for implementation in implementations(contract):
            with use_backend("cuda", ops={contract: implementation}):
                ms = milliseconds(lambda f=function: f(x))
            rate = moved / ms / 1e6
            yield f"| {what} | {implementation} | {ms:.2f} | {rate:.0f} | {rate / copy:.0%} |"


if __name__ == "__main__":
    use_backend("cuda")
    print(current_policy())
    main()
