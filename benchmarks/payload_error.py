"""What an exchange in 8 bits costs: the velocity of a small model whose stream is rounded at every switch, as
`parallel.payload=hif8` rounds it, against the same without. One process; random weights.

    python benchmarks/payload_error.py --out benchmarks/results/payload_error.md"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ospnext.bench.report import table
from ospnext.models import OSPNextTransformer, preset
from ospnext.ops import hif8_decode, hif8_quantize, use_backend

#: (layers, full blocks): the last as deep as the 14B model, which has 31 switches.
DEPTHS = ((8, 4), (16, 4), (40, 8))
WIDTH = {"dim": 192, "num_heads": 8, "ffn_dim": 384}
LATENTS, TEXT = (1, 16, 3, 22, 40), (1, 64, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with use_backend("reference"), torch.no_grad():
        text = "\n".join(report()) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report() -> Iterator[str]:
    yield from ("# Switches in 8 bits", "")
    yield f"{WIDTH['dim']} channels, fp32, torch {torch.__version__}; relative difference of the velocity (Frobenius)."
    yield from ("", *table(["layers", "switches", "difference", "over the root of switches"], [*rows()]))


def rows() -> Iterator[list[str]]:
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(*shape, generator=generator) for shape in (LATENTS, TEXT))
    timestep = torch.tensor([500.0])
    for layers, full in DEPTHS:
        model = OSPNextTransformer(preset("tiny").replace(**WIDTH, num_layers=layers, num_full_blocks=full))
        model.init_weights(generator)
        model.head.head.weight.normal_(std=0.1, generator=generator)  # the recipe's own is zero
        plain = model(latents, timestep, text)
        layout = model.layout(model.token_grid(latents), 1)
        switches = sum(plan.switch is not None for plan in layout.blocks)
        # Where one rank holds all there is no exchange: this one sends to itself.
        plans = tuple(replace(plan, exchange=rounded if plan.switch is not None else None) for plan in layout.blocks)
        model._layouts[next(iter(model._layouts))] = replace(layout, blocks=plans)
        difference = ((model(latents, timestep, text) - plain).norm() / plain.norm()).item()
        yield [str(layers), str(switches), f"{difference:.1%}", f"{difference / switches**0.5:.1%}"]


def rounded(x_BNC: Tensor) -> Tensor:
    codes, scale = hif8_quantize(x_BNC, granularity="row")
    return hif8_decode(codes) * scale


if __name__ == "__main__":
    main()
