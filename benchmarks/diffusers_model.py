"""diffusers' WanTransformer3DModel alone: eager and compiled, with every backend of attention that runs here.

    python benchmarks/diffusers_model.py --resolution 768p --layers 10 --out benchmarks/results/diffusers.md
    python benchmarks/diffusers_model.py --tiny                                   # on a CPU

For what `ospnext bench model --against diffusers` compares with: that one takes the fastest backend, compiled."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from ospnext.bench import diffusers_twin
from ospnext.bench.diffusers_twin import Compiled, attention_times, forward_of, twin
from ospnext.bench.measure import timed
from ospnext.bench.report import table
from ospnext.bench.variants import dense
from ospnext.bench.versions import versions
from ospnext.bench.weights import random_inputs, random_state
from ospnext.bench.workload import Workload, workload
from ospnext.generation.backend_choice import chosen_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="14b", help="(default: 14b)")
    parser.add_argument("--resolution", default="720p", help="(default: 720p)")
    parser.add_argument("--layers", type=int, help="a shorter model")
    parser.add_argument("--repeats", type=int, default=3, help="timed forwards of each (default: 3)")
    parser.add_argument("--compile-all", action="store_true", help="compile with every backend, not the fastest alone")
    parser.add_argument("--tiny", action="store_true", help="a model for a CPU, traced but not compiled")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    work = workload(arguments.preset, arguments.resolution, layers=arguments.layers)
    if arguments.tiny:
        work, diffusers_twin.COMPILER = workload("tiny", "64x96", frames=5, layers=2), "aot_eager"
    with chosen_backend(None) as device, torch.no_grad():
        text = "\n".join(report(work, arguments.repeats, arguments.compile_all, device)) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(work: Workload, repeats: int, compile_all: bool, device: torch.device) -> Iterator[str]:
    config, found = dense(work.config), versions(device)
    model, inputs = twin(config, random_state(config, device)), random_inputs(work, device)
    attention = attention_times(config, work.tokens, device, torch.bfloat16)
    fastest = min(attention, key=lambda name: attention[name])
    yield from ("# WanTransformer3DModel of diffusers", "")
    yield f"{work}. {found.get('device_name', device)}, torch {torch.__version__},"
    yield f"{', '.join(f'{name} {version}' for name, version in found['packages'].items())}. Median of {repeats}."
    yield ""
    body = []
    for name, alone in attention.items():
        row = [name, f"{alone:,.2f}"]
        ways: tuple[Compiled, ...] = ("off", "model", "blocks") if compile_all or name == fastest else ("off",)
        for way in ways:  # blocks last: a block stays compiled
            found_ms = timed(forward_of(model, name, inputs, way), device, repeats=repeats, warm_up=2).median
            row += [f"{found_ms:,.1f}", f"{found_ms / config.num_layers:,.1f}"]
        torch.compiler.reset()
        for block in model.blocks:
            block._compiled_call_impl = None
        body.append([*row, *[""] * 4][:8])
    head = ["attention", "attention of a block, ms", "eager ms", "a layer"]
    yield from table([*head, "one graph, ms", "a layer", "by blocks, ms", "a layer"], body)


if __name__ == "__main__":
    main()
