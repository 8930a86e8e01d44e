"""Whether a denoising step makes the host wait for the device: three steps with guidance, waiting forbidden after one.

    python benchmarks/step_sync.py --out benchmarks/results/step_sync.md

A device whose PyTorch has a sync debug mode raises where the host would wait. The first step is free to: kernels are
chosen, and solvers move what they need to the device. `tests/test_pipeline_sync.py` asks the same of the core alone."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ospnext.bench.measure import release
from ospnext.bench.report import table
from ospnext.bench.variants import VARIANTS
from ospnext.bench.versions import versions
from ospnext.bench.weights import random_state
from ospnext.diffusion import SOLVERS
from ospnext.errors import ConfigError
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models import OSPNextTransformer, preset
from ospnext.pipelines import OSPNextPipeline

#: As wide as the 1.3B model, with every kind of block.
CONFIG = preset("1.3B").replace(num_layers=8, num_full_blocks=4)
#: Height, width and frames: subsequences of equal length, and of four lengths that are packed.
SIZES = {"even": (256, 512, 9), "uneven": (240, 432, 9)}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with chosen_backend(None) as device, torch.no_grad():
        module: Any = torch.get_device_module(device)
        if not hasattr(module, "set_sync_debug_mode"):
            raise ConfigError(f"PyTorch has no sync debug mode for {device}; run this on a device that has one")
        text = "\n".join(report(device, module)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(device: torch.device, module: Any) -> Iterator[str]:
    found = versions(device)
    yield from ("# Does a step wait?", "")
    yield f"{found.get('device_name', device)}, backend {found['backend']}, torch {torch.__version__}; {STEPS} steps,"
    yield "guidance on, sync debug mode `error` from the end of the first step to the end of the last."
    yield from ("", *table(["variant", "grid", "solver", "branches", "result"], [*rows(device, module)]))


def rows(device: torch.device, module: Any) -> Iterator[list[str]]:
    state = random_state(CONFIG, device)
    for variant in VARIANTS.values():
        transformer = variant.build(CONFIG, state)
        for size, solver, batched in itertools.product(SIZES, SOLVERS, ("off", "on")):
            branches = "in one forward" if batched == "on" else "one after the other"
            yield [variant.name, size, solver, branches, outcome(transformer, SIZES[size], solver, batched, module)]
        del transformer
        release()


def outcome(transformer: OSPNextTransformer, size: tuple[int, int, int], solver: str, batched: str, module: Any) -> str:
    """ "pass", or the error in a line."""
    pipe = OSPNextPipeline(transformer, None, None, solver=solver, batched_guidance=batched)
    pipe.set_progress_bar_config(disable=True)
    text = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)

    def forbid(pipe: OSPNextPipeline, i: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        module.set_sync_debug_mode("error" if i < STEPS - 1 else "default")
        return {}

    def run(callback: Any) -> None:
        height, width, frames = size
        pipe(
            prompt_embeds=text, negative_prompt_embeds=text, height=height, width=width, num_frames=frames,
            num_inference_steps=STEPS, callback_on_step_end=callback, output_type="latent",
        )  # fmt: skip

    try:
        run(None)  # kernels are compiled
        run(forbid)
    except Exception as error:  # the others are judged all the same
        module.set_sync_debug_mode("default")
        return f"FAIL: {type(error).__name__}: {error}".splitlines()[0]
    return "pass"


if __name__ == "__main__":
    main()
