"""How far bf16 and each form of HiFloat8 are from fp32 with the same weights: block by block, and at the end of a run.

    python benchmarks/model_error.py --out benchmarks/results/model_error.md
    python benchmarks/model_error.py --tiny                                       # on a CPU, in seconds

Blocks all get the inputs that they have in fp32, rounded to bf16, so that only their own error counts; it is relative
to what the block adds to the stream. The run is 50 steps of Euler from the same noise, each model on its own latents.
Weights are random and bf16 numbers everywhere."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ospnext.bench.report import table
from ospnext.bench.variants import Variant
from ospnext.bench.versions import versions
from ospnext.bench.weights import Inputs, random_inputs, random_state
from ospnext.bench.workload import PRESETS, Workload
from ospnext.diffusion import FlowMatchSchedule, make_solver
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models import OSPNextTransformer, TransformerConfig
from ospnext.ops import HiF8Recipe

#: A block of the 1.3B, four full and four sparse ones; uneven subsequences, 4,200 tokens.
REAL = Workload("1.3b", PRESETS["1.3b"].replace(num_layers=8, num_full_blocks=4), "small", 384, 560, 17)
TINY = Workload("tiny", PRESETS["tiny"], "tiny", 80, 96, 5)
STEPS, TINY_STEPS, SHIFT = 50, 3, 5.0

_ROW = {"quant": "hif8", "recipe": HiF8Recipe(granularity="row")}
VARIANTS = (
    Variant("bf16", ""),
    Variant("HiF8, per tensor", "", settings={"quant": "hif8"}),
    Variant("HiF8, per row", "", settings=_ROW),
    Variant("per row, attention of round trips", "", settings=_ROW | {"quant_attn": "hif8"}),
    Variant("per row, native attention", "", settings=_ROW | {"quant_attn": "hif8_native"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU")
    parser.add_argument("--steps", type=int, help=f"of the trajectory (default: {STEPS}, {TINY_STEPS} if tiny)")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with chosen_backend(None) as device, torch.no_grad():
        work, steps = (TINY, TINY_STEPS) if arguments.tiny else (REAL, STEPS)
        text = "\n".join(report(work, arguments.steps or steps, device)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(work: Workload, steps: int, device: torch.device) -> Iterator[str]:
    config, found = work.config, versions(device)
    state = random_state(config, device)
    truth = in_fp32(config, state)
    inputs = random_inputs(work, device)
    given = block_inputs(truth, inputs)
    final = sample(truth, inputs, steps)
    of_blocks: dict[str, list[float]] = {}
    of_runs: dict[str, tuple[float, float]] = {}
    failed: dict[str, str] = {}
    for variant in VARIANTS:
        try:
            model = variant.build(config, state)
            of_blocks[variant.name] = block_errors(truth, model, given, inputs.text_BLC)
            velocity = relative(forward(model, inputs), forward(truth, inputs))
            of_runs[variant.name] = velocity, relative(sample(model, inputs, steps), final)
        except Exception as error:  # one that nothing here can run leaves the others
            failed[variant.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            of_blocks.pop(variant.name, None)
    names = list(of_runs)
    yield from ("# Error against fp32", "")
    yield f"{config.num_layers} blocks, {config.dim} channels in {config.num_heads} heads, {work.tokens:,} tokens"
    yield f"{work.grid}; random weights. Relative Frobenius errors. {found.get('device_name', device)},"
    yield f"backend {found['backend']}, torch {torch.__version__}."
    yield from ("", "## Of what a block adds to the stream", "")
    kinds = config.block_kinds
    body = [[f"{i} {kind}", *(f"{of_blocks[n][i]:.2e}" for n in names)] for i, kind in enumerate(kinds)]
    yield from table(["block", *names], body)
    yield from ("", "## Of the whole model", "")
    rows = (("velocity at one step", 0), (f"latents after {steps} steps of Euler, shift {SHIFT:g}", 1))
    yield from table(["", *names], [[label, *(f"{of_runs[n][i]:.2e}" for n in names)] for label, i in rows])
    for name, error in failed.items():
        yield from ("", f"{name} FAILED: {error}")


def in_fp32(config: TransformerConfig, state: Mapping[str, Tensor]) -> OSPNextTransformer:
    with torch.device("meta"):
        model = OSPNextTransformer(config)
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def forward(model: OSPNextTransformer, inputs: Inputs) -> Tensor:
    return model(inputs.latents_BCTHW, inputs.timestep_B, inputs.text_BLC)


def block_inputs(truth: OSPNextTransformer, inputs: Inputs) -> list[tuple[Any, ...]]:
    """(x, time, text keys and values, plan) of every block."""
    given: list[tuple[Any, ...]] = []
    handles = [block.register_forward_pre_hook(lambda _, args: given.append(args)) for block in truth.blocks]
    forward(truth, inputs)
    for handle in handles:
        handle.remove()
    return given


def block_errors(
    truth: OSPNextTransformer, model: OSPNextTransformer, given: list[tuple[Any, ...]], text: Tensor
) -> list[float]:
    prompt = truth.text_embedding(text.float()).bfloat16()
    errors = []
    for exact, block, (x, time, _, plan) in zip(truth.blocks, model.blocks, given, strict=True):
        x = x.bfloat16()
        expected = exact(x.float(), time, exact.cross_attn.project_text(prompt.float()), plan)
        found = block(x, time, block.cross_attn.project_text(prompt), plan)
        added = expected - (x if plan.switch is None else x[:, plan.switch]).float()
        errors.append(relative(found, expected, of=added))
    return errors


def sample(model: OSPNextTransformer, inputs: Inputs, steps: int) -> Tensor:
    """Latents in fp32 from noise to the end, without guidance."""
    sigmas = FlowMatchSchedule(shift=SHIFT).sigmas(steps)
    solver, context = make_solver("euler", sigmas), model.encode_text(inputs.text_BLC)
    latents = inputs.latents_BCTHW.float()
    for i, timestep in enumerate(FlowMatchSchedule.timesteps(sigmas[:-1])):
        velocity = model(latents, timestep.reshape(1).to(latents.device), context)
        latents = solver.step(i, velocity, latents)
    return latents


def relative(found: Tensor, expected: Tensor, of: Tensor | None = None) -> float:
    """Frobenius norm of the difference over that of `of`."""
    error = (found.double() - expected.double()).norm() / (expected if of is None else of).double().norm()
    if not math.isfinite(error.item()):
        raise RuntimeError("the result is not finite")
    return error.item()


if __name__ == "__main__":
    main()
