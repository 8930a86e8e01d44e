"""Bytes that linears and blocks of the 14B model keep between forward and backward in bf16 and HiF8, and of weights.

    python benchmarks/hif8_memory.py --out benchmarks/results/hif8_memory.md

Counted on tensors without values: each storage that autograd saves once, however often, and no parameters. So the one
input that q, k and v share counts once in bf16 too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ospnext import ops
from ospnext.models import OSPNextTransformer, preset
from ospnext.models import layers as model_layers
from ospnext.models.hif8_linear import HiF8Linear, project
from ospnext.models.quantization import QuantPolicy, quantize_model
from ospnext.models.upstream_bf16 import UpstreamBf16Linear
from ospnext.ops import HiF8Recipe
from ospnext.ops.policy import use_registry
from ospnext.ops.registry import DeviceInfo, Implementation, Manifest, Probe, Registry

#: 81 frames of 1280 x 720.
GRID = (21, 45, 80)
TOKENS = GRID[0] * GRID[1] * GRID[2]
CONFIG = preset("14B")
GB = 1e9
FUSED = ("rms_norm", "layer_norm_modulate", "rope", "gate_residual", "gelu_tanh")
POLICIES = {
    "bf16": QuantPolicy(),
    "HiF8 linears": QuantPolicy("hif8"),
    "HiF8 linears and attention": QuantPolicy("hif8", "hif8"),
    "upstream_bf16": QuantPolicy("hif8", "hif8", compat="upstream_bf16"),
}


def probe() -> Probe:
    return Probe(DeviceInfo("cpu", "a device that is never asked"))


@contextmanager
def fused_operators() -> Iterator[None]:
    """As with a backend that has its own kernels of norms, rotary embedding and the like: they keep their inputs."""
    sys.modules["hif8_memory"] = sys.modules[__name__]
    kernels = tuple(Implementation(f"none.{name}", f"fused.{name}", "hif8_memory:probe") for name in FUSED)
    manifest = Manifest("none", "never called", ("cpu",), "hif8_memory:probe", kernels, priority=1000)
    with use_registry(Registry([manifest])), ops.use_backend("none"):
        yield


def kept(run: Callable[[], Tensor | tuple[Tensor, ...]], module: nn.Module) -> int:
    """Bytes that are kept for the backward pass of `run`, but for the parameters of `module`."""
    found: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        found.setdefault(t.untyped_storage()._cdata, t)
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        out = run()
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    del out
    return sum(t.untyped_storage().nbytes() for storage, t in found.items() if storage not in parameters)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def linear_rows() -> Iterator[str]:
    recipe, C, F = HiF8Recipe(), CONFIG.dim, CONFIG.ffn_dim
    for name, inner, outer in (("q, k, v or o alone", C, C), ("ffn.0", C, F), ("ffn.2", F, C)):
        plain = nn.Linear(inner, outer, dtype=torch.bfloat16, device="meta")
        x = empty(1, TOKENS, inner)
        sizes = [
            kept(lambda linear=linear, x=x: linear(x), plain)
            for linear in (plain, HiF8Linear.of(plain, recipe), UpstreamBf16Linear.of(plain, recipe))
        ]
        yield row(name, f"{inner} -> {outer}", sizes[0], sizes[1], sizes[1], sizes[2])
    three = nn.ModuleList(nn.Linear(C, C, dtype=torch.bfloat16, device="meta") for _ in range(3))
    quantized = [HiF8Linear.of(linear, recipe) for linear in three]
    upstream = [UpstreamBf16Linear.of(linear, recipe) for linear in three]
    x = empty(1, TOKENS, C)
    sizes = [
        kept(lambda run=run: run(), three)
        for run in (
            lambda: project(x, *three),
            lambda: tuple(linear(x) for linear in quantized),
            lambda: project(x, *quantized),
            lambda: project(x, *upstream),
        )
    ]
    yield row("q, k and v of one input", f"{C} -> 3 x {C}", *sizes)


def row(*cells: object) -> str:
    return "| " + " | ".join(f"{c / GB:.3f}" if isinstance(c, int) else str(c) for c in cells) + " |"


def block_bytes(policy: QuantPolicy, shared: bool) -> int:
    with torch.device("meta"):
        model = OSPNextTransformer(CONFIG.replace(num_layers=2, num_full_blocks=0)).to(torch.bfloat16)
    quantize_model(model, policy)
    plan, block = model.layout(GRID, 1).blocks[0], model.blocks[0]
    with torch.no_grad():
        text = block.cross_attn.project_text(empty(1, CONFIG.text_len, CONFIG.dim))
    x, time = empty(1, TOKENS, CONFIG.dim), empty(1, 6, CONFIG.dim)
    before = model_layers.project
    model_layers.project = before if shared else lambda x, *linears: tuple(linear(x) for linear in linears)
    try:
        return kept(lambda: block(x, time, text, plan), model)
    finally:
        model_layers.project = before


def block_rows() -> Iterator[str]:
    cases = [(name, policy, True) for name, policy in POLICIES.items()]
    cases.insert(2, ("HiF8 linears, codes of q, k, v not shared", POLICIES["HiF8 linears"], False))
    baseline = {}
    for name, policy, shared in cases:
        with fused_operators():
            fused = block_bytes(policy, shared)
        with ops.use_backend("reference"):
            defined = block_bytes(policy, shared)
        baseline.setdefault("sizes", (fused, defined))
        first, second = baseline["sizes"]
        yield row(name, fused, f"{fused / first:.3f}", defined, f"{defined / second:.3f}")


def weight_rows() -> Iterator[str]:
    sizes: list[tuple[str, int, int]] = []
    for name, policy, store in (
        ("bf16, or HiF8 with weights that are trained", POLICIES["bf16"], False),
        ("HiF8 with stored codes", POLICIES["HiF8 linears"], True),
    ):
        with torch.device("meta"):
            model = OSPNextTransformer(CONFIG).to(torch.bfloat16)
        names = list(POLICIES["HiF8 linears"].linear_names(CONFIG.num_layers))
        quantize_model(model, policy, store=store)
        linears = sum(bytes_of(model.get_submodule(linear)) for linear in names)
        sizes.append((name, linears, bytes_of(model)))
    for name, linears, everything in sizes:
        yield row(name, linears, everything, f"{everything / sizes[0][2]:.3f}")


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def report() -> str:
    codes = sum(CONFIG.dim * n for n in (*[CONFIG.dim] * 6, *[CONFIG.ffn_dim] * 2))
    return "\n".join(
        [
            "# Memory of HiF8",
            "",
            f"The 14B model ({CONFIG.dim} channels, {CONFIG.ffn_dim} in the feed-forward), batch 1, {TOKENS} tokens",
            "(81 frames of 1280 x 720), in GB of 10^9 bytes. Counted on tensors without values,",
            f"torch {torch.__version__}.",
            "",
            "## Kept between forward and backward by linears",
            "",
            "In bf16 a linear keeps its input; its weight is a parameter and there anyway. In HiF8 it keeps codes of",
            "both, one byte per element.",
            "",
            "| linear | shape | bf16 | HiF8 | HiF8, shared codes | upstream_bf16 |",
            "| --- | --- | --- | --- | --- | --- |",
            *linear_rows(),
            "",
            "## Kept by a whole block",
            "",
            "A sparse block, text projected before. Other operators keep what they do in a backend that has kernels of",
            "its own for them (their inputs), or as the definitions of the reference backend (mostly fp32).",
            "",
            "| block | kernels | of bf16 | definitions | of bf16 |",
            "| --- | --- | --- | --- | --- |",
            *block_rows(),
            "",
            f"Codes of its weights are {codes / GB:.3f} GB of that. Attention keeps its output for its own backward",
            "pass, so the codes that both output projections keep of it come on top: there HiF8 keeps more than bf16.",
            "Linears are a small part of what a block keeps; with activation checkpointing it is the inputs of blocks",
            "that count, and they are the same.",
            "",
            "## Weights",
            "",
            "| weights | quantized linears | whole model | of bf16 |",
            "| --- | --- | --- | --- |",
            *weight_rows(),
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    text = report()
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
