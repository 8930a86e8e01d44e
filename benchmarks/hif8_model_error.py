"""How far bf16 and HiF8 move each block of a small OSP-Next with random weights, and its velocity, from fp64.

    python benchmarks/hif8_model_error.py --out benchmarks/results/hif8_model_error.md

Heads have the real 128 channels. Each block gets the input that it has in fp64, rounded to bf16, so that errors of
blocks before it do not count; the velocity is that of a whole model. Weights are bf16 numbers everywhere."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ospnext import ops
from ospnext.models import OSPNextTransformer, TransformerConfig
from ospnext.models.hif8_linear import HiF8Linear
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.models.upstream_bf16 import UpstreamBf16Linear, fake_quantize
from ospnext.ops import HiF8Recipe

CONFIG = TransformerConfig(
    dim=256, ffn_dim=704, num_heads=2, num_layers=8, freq_dim=64, text_dim=64, text_len=32,
    skiparse_model_type="dual_end", sparse_ratio=2, num_full_blocks=4,
)  # fmt: skip
GRID, SEEDS = (4, 12, 16), (0, 1, 2)
POLICIES = {
    "bf16": QuantPolicy(),
    "linears": QuantPolicy("hif8"),
    "linears, attention": QuantPolicy("hif8", "hif8"),
    "upstream_bf16": QuantPolicy("hif8", "hif8", compat="upstream_bf16"),
}
#: Known beforehand: of a tensor of N(0, 1) at 15 and 224, and of a product of two independent ones at 15.
TENSOR, GRADIENT, PRODUCT = 2.64e-2, 5.25e-2, 2**0.5 * 2.64e-2


def random_model(seed: int) -> OSPNextTransformer:
    """Matrices keep the size of signals, norms are about 1, and the rest is small: no branch is switched off."""
    model, generator = OSPNextTransformer(CONFIG), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if ".norm" in name and name.endswith("weight"):
                parameter.mul_(0.3).add_(1)
            elif parameter.ndim > 1 and not name.endswith("modulation"):
                parameter.div_(parameter.flatten(1).shape[1] ** 0.5)
            else:
                parameter.mul_(0.3)
    return model.to(torch.bfloat16)


def relative(found: Tensor, expected: Tensor, of: Tensor | None = None) -> float:
    """Frobenius norm of the difference over that of `of`."""
    return ((found.double() - expected.double()).norm() / (expected if of is None else of).double().norm()).item()


@torch.no_grad()
def errors(seed: int) -> tuple[list[dict[str, tuple[float, float]]], dict[str, float]]:
    """For each block (error of the output, error relative to what the block adds) by policy; error of the velocity."""
    generator = torch.Generator().manual_seed(100 + seed)
    t, h, w = GRID
    latents = torch.randn(1, CONFIG.in_dim, t, 2 * h, 2 * w, generator=generator).bfloat16()
    text = torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=generator).bfloat16()
    timestep = torch.rand(1, generator=generator) * 1000
    truth = random_model(seed).double()
    models = {name: quantize_model(random_model(seed), policy) for name, policy in POLICIES.items()}
    given: list[tuple] = []
    handles = [block.register_forward_hook(lambda _, inputs, out: given.append(inputs)) for block in truth.blocks]
    velocity = truth(latents.double(), timestep, text.double())
    for handle in handles:
        handle.remove()
    prompt = truth.text_embedding(text.double()).bfloat16()
    blocks = []
    for number, (x, time, _, plan) in enumerate(given):
        x, time = x.bfloat16(), time.bfloat16()
        exact, block = plan, truth.blocks[number]
        expected = block(x.double(), time.double(), block.cross_attn.project_text(prompt.double()), exact)
        added = expected - (x if plan.switch is None else x[:, plan.switch]).double()
        found = {}
        for name, model in models.items():
            block, plan = model.blocks[number], model.layout(GRID, 1).blocks[number]
            out = block(x, time, block.cross_attn.project_text(prompt), plan)
            found[name] = relative(out, expected), relative(out, expected, of=added)
        blocks.append(found)
    return blocks, {name: relative(model(latents, timestep, text), velocity) for name, model in models.items()}


def building_blocks() -> Iterator[str]:
    """The noise that all of it is made of, measured on N(0, 1) and a linear of 1024 x 1024."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(1024, 1024, generator=generator).bfloat16() for _ in range(2))
    for scale_max, expected in ((15.0, TENSOR), (224.0, GRADIENT)):
        codes, scale = ops.hif8_quantize(x, scale_max=scale_max)
        yield f"| tensor at {scale_max:g} | {relative(ops.hif8_decode(codes) * scale, x):.2e} | {expected:.2e} |"
        upstream = fake_quantize(x, scale_max)
        yield f"| the same, upstream_bf16 | {relative(upstream, x):.2e} | |"
        between = relative(upstream, ops.hif8_decode(codes) * scale)
        yield f"| difference of the two | {between:.2e} | 0 to 4e-2, as the amax falls |"
    plain = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    plain.weight.data.copy_(weight)
    exact, recipe = x.double() @ weight.double().T, HiF8Recipe()
    for name, linear in (
        ("linear in bf16", plain),
        ("HiF8 linear", HiF8Linear.of(plain, recipe)),
        ("upstream_bf16 linear", UpstreamBf16Linear.of(plain, recipe)),
    ):
        expected = f"{PRODUCT:.2e}" if linear is not plain else ""
        yield f"| {name} | {relative(linear(x).detach(), exact):.2e} | {expected} |"


def report() -> str:
    found = [errors(seed) for seed in SEEDS]
    names = list(POLICIES)

    def means(which: int, number: int) -> str:
        return " | ".join(f"{statistics.mean(run[0][number][name][which] for run in found):.2e}" for name in names)

    lines = [
        "# Error of HiF8 in a model",
        "",
        f"Relative Frobenius error against fp64. {CONFIG.num_layers} blocks, {CONFIG.dim} channels in",
        f"{CONFIG.num_heads} heads, {CONFIG.ffn_dim} in the feed-forward, {GRID[0] * GRID[1] * GRID[2]} tokens; random",
        f"weights; mean of {len(SEEDS)} seeds; reference backend, torch {torch.__version__}.",
        "",
        "## What it is made of",
        "",
        "| | measured | expected |",
        "| --- | --- | --- |",
        *building_blocks(),
        "",
        "## Of what a block adds to the stream",
        "",
        "The same input (that of fp64) for all. A branch ends in two products one after the other, which make",
        f"sqrt(2) * {PRODUCT:.1e} = {2**0.5 * PRODUCT:.1e} unless attention averages them.",
        "",
        f"| block | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        *(f"| {i} {kind} | {means(1, i)} |" for i, kind in enumerate(CONFIG.block_kinds)),
        "",
        "## Of the stream after a block",
        "",
        "Smaller, since the stream carries on what it had.",
        "",
        f"| block | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        *(f"| {i} {kind} | {means(0, i)} |" for i, kind in enumerate(CONFIG.block_kinds)),
        "",
        "## Of the velocity, through all blocks",
        "",
        f"| | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
        f"| mean | {' | '.join(f'{statistics.mean(run[1][name] for run in found):.2e}' for name in names)} |",
        f"| largest | {' | '.join(f'{max(run[1][name] for run in found):.2e}' for name in names)} |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # matrices are small
    text = report()
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
