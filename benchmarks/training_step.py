"""Forward and backward of a group of blocks of the 14B model, dense and sparse, in bf16 and with HiFloat8 linears.

    python benchmarks/training_step.py --resolution 768p --out benchmarks/results/training_step.md
    python benchmarks/training_step.py --tiny                                     # on a CPU, in seconds

Four blocks: all full, or one full and three sparse ones, about the mix of OSP-Next (8 of 40 are full). Each is
checkpointed, as in training: its forward runs twice. Gradients of all parameters, of the input and of the text; no
optimizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ospnext.bench.measure import release, timed
from ospnext.bench.report import table
from ospnext.bench.versions import versions
from ospnext.bench.weights import random_block
from ospnext.bench.workload import Workload, workload
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models.config import BlockKind
from ospnext.models.hif8_linear import HiF8Linear
from ospnext.models.layers import Block
from ospnext.models.layout import BlockPlan, stream_layout
from ospnext.models.quant_policy import LINEARS
from ospnext.ops import HiF8Recipe
from ospnext.ops.device import Device

GROUPS: dict[str, tuple[BlockKind, ...]] = {
    "dense": ("full", "full", "full", "full"),
    "sparse": ("full", "token", "group", "token"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", default="720p", help="(default: 720p)")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each (default: 2)")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    work = workload("tiny", "64x96", frames=5) if arguments.tiny else workload("14b", arguments.resolution)
    with chosen_backend(None) as device:
        text = "\n".join(report(work, arguments.repeats, device)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(work: Workload, repeats: int, device: torch.device) -> Iterator[str]:
    found, config = versions(device), work.config
    yield from ("# Forward and backward of four blocks", "")
    yield f"{work.tokens:,} tokens ({work.resolution}), {config.dim} channels; every block checkpointed; median of"
    yield f"{repeats}. {found.get('device_name', device)}, backend {found['backend']}, torch {torch.__version__}."
    yield ""
    body: list[list[str]] = []
    baseline: float | None = None
    for form, quantized in (("bf16", False), ("HiF8 linears", True)):
        for name, kinds in GROUPS.items():
            try:
                milliseconds, peak = measure(work, kinds, quantized, repeats, device)
            except Exception as error:  # one that does not fit leaves the others
                body.append([f"{name}, {form}", f"FAILED: {type(error).__name__}: {error}".splitlines()[0], "", ""])
            else:
                baseline = baseline or milliseconds
                shown = f"{milliseconds:,.1f}", f"{baseline / milliseconds:.2f}", f"{peak / 2**30:.1f}"
                body.append([f"{name}, {form}", *shown])
            release()
    yield from table(["blocks", "ms", "times dense bf16", "peak GiB"], body)


def measure(
    work: Workload, kinds: tuple[BlockKind, ...], quantized: bool, repeats: int, device: torch.device
) -> tuple[float, int]:
    """(milliseconds of a step, peak memory in bytes)."""
    step, surface = make_step(work, kinds, quantized, device), Device(device)
    step()
    surface.synchronize()
    surface.reset_peak_memory()
    return timed(step, device, repeats=repeats, warm_up=0).median, surface.peak_memory()


def make_step(
    work: Workload, kinds: tuple[BlockKind, ...], quantized: bool, device: torch.device
) -> Callable[[], Tensor]:
    """A call that runs forward and backward and returns the gradient of the input."""
    config = work.config
    k = config.sparse_ratio if "token" in kinds else 1
    plans = stream_layout(kinds, k, work.grid, 1, config.rope_pairs, torch.float32, device).blocks
    blocks = [random_block(config, device, seed=i).train() for i in range(len(kinds))]
    for block in blocks if quantized else ():
        for name in LINEARS:
            block.set_submodule(name, HiF8Linear.of(cast(nn.Linear, block.get_submodule(name)), HiF8Recipe()))
    x_BNC = torch.randn(1, work.tokens, config.dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    text_BLC = torch.randn(1, config.text_len, config.dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    time_B6C = torch.randn(1, 6, config.dim, device=device, requires_grad=True)
    grad = torch.randn_like(x_BNC)
    leaves = [x_BNC, text_BLC, time_B6C, *(p for block in blocks for p in block.parameters())]

    def run(block: Block, stream: Tensor, plan: BlockPlan) -> Tensor:
        return block(stream, time_B6C, block.cross_attn.project_text(text_BLC), plan)

    def step() -> Tensor:
        stream = x_BNC
        for block, plan in zip(blocks, plans, strict=True):
            stream = checkpoint(run, block, stream, plan, use_reentrant=False)
        return torch.autograd.grad(stream, leaves, grad)[0]

    return step


if __name__ == "__main__":
    main()
