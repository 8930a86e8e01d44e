"""How far velocity and gradients of ranks that share a model are from those of one process, in fp64: by layout and by
group of parameters, and beside them those of a published gradient that is wrong.

    python benchmarks/parallel_gradients.py --out benchmarks/results/parallel_gradients.md     # minutes on two cores
    python benchmarks/parallel_gradients.py --tiny                                              # seconds

Ranks are processes of this machine over gloo, each with one thread. The layouts and their comparison are those of
tests/test_parallel_model.py; that one compares each parameter by itself, and larger grids."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from parallel_layouts import Computed, Layout, compared, model_of, run  # noqa: E402
from torch import Tensor  # noqa: E402

from ospnext.bench.report import table  # noqa: E402
from ospnext.bench.versions import versions  # noqa: E402
from ospnext.models import OSPNextTransformer  # noqa: E402
from ospnext.ops import use_backend  # noqa: E402
from ospnext.sparse import Grid  # noqa: E402

#: Column -> what the names of its parameters begin with. Every parameter is in one.
GROUPS = {
    "patch": r"patch_embedding\.",
    "text": r"text_embedding\.",
    "time": r"time_embedding\.",
    "modulation": r"time_projection\.|blocks\.\d+\.modulation",
    "q": r"blocks\.\d+\.self_attn\.q\.",
    "k": r"blocks\.\d+\.self_attn\.k\.",
    "v": r"blocks\.\d+\.self_attn\.v\.",
    "o": r"blocks\.\d+\.self_attn\.o\.",
    "norms of q, k": r"blocks\.\d+\.self_attn\.norm_",
    "cross-attention": r"blocks\.\d+\.(cross_attn|norm3)\.",
    "FFN": r"blocks\.\d+\.ffn\.",
    "head": r"head\.",
}

#: By k, (even, uneven): k^2 divides both sides of the frame, or neither.
GRIDS = {1: ((2, 8, 8), (2, 7, 9)), 2: ((2, 8, 8), (2, 7, 9)), 3: ((2, 9, 9), (2, 10, 13))}


@dataclass(frozen=True)
class Divided:
    """A way to divide a model of some k among ranks; 1 is the dense model."""

    k: int
    ssp: int = 1
    ulysses: int = 1
    cfg: int = 1

    @property
    def world(self) -> int:
        return self.cfg * self.ssp * self.ulysses

    def layout(self, grid: Grid, **others: Any) -> Layout:
        """Full blocks need a head for each rank."""
        full = 0 if self.k == 1 else 4
        made = Layout(self.ssp, self.ulysses, self.k, full, grid, cfg=self.cfg, **others)
        return made if self.world <= made.heads else replace(made, heads=12)


DIVIDED = (
    Divided(2, ssp=2), Divided(1, ulysses=2), Divided(2, ulysses=2), Divided(2, cfg=2),
    Divided(3, ssp=3), Divided(2, ulysses=3),
    Divided(2, ssp=4), Divided(1, ulysses=4), Divided(2, ulysses=4), Divided(2, ssp=2, ulysses=2),
    Divided(2, cfg=2, ssp=2), Divided(2, cfg=2, ulysses=2),
    Divided(2, ulysses=6), Divided(2, ssp=2, ulysses=3), Divided(3, ssp=3, ulysses=2), Divided(3, cfg=2, ssp=3),
    Divided(2, ulysses=8), Divided(2, ssp=2, ulysses=4), Divided(2, ssp=4, ulysses=2), Divided(2, cfg=2, ssp=4),
    Divided(2, cfg=2, ssp=2, ulysses=2),
    Divided(3, ssp=9),
)  # fmt: skip
WRONG = (Divided(2, ssp=2), Divided(3, ssp=3), Divided(2, ssp=4), Divided(2, ssp=4, ulysses=2))
TINY = (Divided(2, ssp=2), Divided(2, ulysses=2), Divided(2, cfg=2), Divided(3, ssp=3))
SLICED = "sliced-adjoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two and three ranks only, uneven grids")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    divided = TINY if arguments.tiny else DIVIDED
    text = "\n".join(report(errors([*layouts(divided, tiny=arguments.tiny)]))) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def layouts(divided: Sequence[Divided], *, tiny: bool) -> Iterator[Layout]:
    for one in divided:
        even, uneven = GRIDS[one.k]
        for grid in [uneven] if tiny else [even, uneven]:
            yield one.layout(grid)
            yield one.layout(grid, quant=True)
        if not _power_of_two(one.world):
            yield one.layout(uneven, quant=True, loss_once=True)
        if one in WRONG:
            yield one.layout(uneven, mutant=SLICED)


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def errors(layouts: Sequence[Layout]) -> dict[Layout, dict[str, float]]:
    """By layout, in the order of world sizes: error of the velocity and of each group. Ranks of a size start once."""
    found: dict[Layout, dict[str, float]] = {}
    for world, same in groupby(sorted(layouts, key=_world), key=_world):
        of_world = list(same)
        judged = compared(world, of_world, by_group)
        found |= {layout: judged[layout.name]["errors"] for layout in of_world}
        print(f"{len(found)} of {len(layouts)} layouts", file=sys.stderr, flush=True)
    return found


def _world(layout: Layout) -> int:
    return layout.parallel.world


def by_group(found: Computed, expected: Computed) -> dict[str, Any]:
    errors = {"velocity": largest_error([found.velocity], [expected.velocity])}
    for group, names in groups(list(expected.gradients)).items():
        errors[group] = largest_error(*([of[name] for name in names] for of in (found.gradients, expected.gradients)))
    return {"errors": errors}


def groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Parameters of each group, by name."""
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in names:
        (group,) = (group for group, pattern in GROUPS.items() if re.match(pattern, name))
        found[group].append(name)
    return found


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max |found - expected| / max |expected|, each over all tensors."""
    differences = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    return differences / max(b.abs().max().item() for b in expected)


def quantizing(alone: Layout) -> dict[str, float]:
    """What HiFloat8 itself changes, on one process."""
    with use_backend("reference"):
        quantized, plain = (run(model_of(one), one) for one in (alone, replace(alone, quant=False)))
    return by_group(quantized, plain)["errors"]


def report(found: dict[Layout, dict[str, float]]) -> Iterator[str]:
    plain = {layout: of for layout, of in found.items() if not layout.quant and not layout.mutant}
    quant = {layout: of for layout, of in found.items() if layout.quant and not layout.loss_once}
    even_scales = {layout: of for layout, of in quant.items() if _power_of_two(_world(layout))}
    odd_scales = {layout: of for layout, of in quant.items() if layout not in even_scales}
    once = {layout: of for layout, of in found.items() if layout.loss_once}
    wrong = {layout: of for layout, of in found.items() if layout.mutant}
    yield from ("# Velocity and gradients of ranks against one process", "")
    yield from _circumstances(model_of(next(iter(found))))
    yield from ("", *table(["largest error", "velocity", "gradient"], [
        ["full precision", *_largest(plain)],
        ["HiFloat8 on 2, 4 and 8 ranks", *_largest(even_scales)],
        ["HiFloat8 on 3, 6 and 9 ranks", *_largest(odd_scales)],
        ["the same against a loss that is counted once", *_largest(once)],
        ["a gradient that slices", *_largest(wrong)],
    ]))  # fmt: skip
    yield from ("", "## Full precision", "", *_table(plain))
    yield from ("", "## HiFloat8", "")
    yield "Linears and attention of all blocks quantize and dequantize, forward and backward, with scales of whole"
    yield "tensors that ranks agree on. Sums of 8-bit products are exact in fp64: many errors are 0."
    yield from ("", *_table(even_scales))
    yield from ("", "## HiFloat8, where ranks are no power of two", "")
    yield "Each of R ranks computes the loss, so that gradients inside the model are R times those of one process, and"
    yield "their mean over ranks is right. Scales are fp32, and round R times a number otherwise unless R is a power of"
    yield "two: by 6e-8. Here one process counts its loss R times, too, and divides its gradients by R; what is left is"
    yield "that of the text's keys and values, whose mean over ranks is taken inside."
    yield from ("", *_table(odd_scales))
    yield from ("", "## HiFloat8, where ranks are no power of two, against a loss that is counted once", "")
    yield "Some codes fall on the other side of a boundary, and those after them follow. Both are gradients in"
    yield "HiFloat8, and nearer to each other than to that of full precision, which the rows of one rank compare with."
    alone = dict.fromkeys(layout.reference[0] for layout in once)
    yield from ("", *_table(once, {one: quantizing(one) for one in alone}))
    yield from ("", "## A gradient that slices", "")
    yield "In full precision. Where tokens change rank, the backward pass takes the local slice instead of the adjoint"
    yield "of the exchange, as published code does around its gathers: what other ranks did with a token is lost. The"
    yield "forward pass does not tell, and neither does the head, which comes after the last exchange."
    yield from ("", *_table(wrong))


def _circumstances(some: OSPNextTransformer) -> Iterator[str]:
    said, config = versions(torch.device("cpu")), some.config
    parameters = sum(p.numel() for p in some.parameters())
    yield f"fp64; ospnext {said['ospnext']}, torch {said['torch']}, python {said['python']}; {platform.machine()} CPU,"
    yield "backend reference; ranks are processes over gloo with one thread each."
    yield ""
    yield f"Model: {config.num_layers} blocks, of which two at each end are full (k = 1 is dense: 4 full blocks);"
    yield f"{config.dim} channels in {config.num_heads} heads (12 for 9 ranks), FFN of {config.ffn_dim}, text of"
    yield f"{config.text_len} tokens; {parameters:,} random parameters. One sample. A grid is T x H x W tokens,"
    yield "and even where k^2 divides H and W. The loss is a weighted sum of the velocity, or with cfg 2 of the guided"
    yield "one. Gradients are means over ranks, as FSDP takes them."
    yield ""
    yield "Each number is max |g - g1| / max |g1| over the parameters of a group, g1 being the gradient on one process;"
    yield "`velocity` is the same of the forward pass. `cross-attention` includes the norm before it, `modulation` the"
    yield "projection of the timestep, and `head` its own modulation."


def _largest(rows: dict[Layout, dict[str, float]]) -> list[str]:
    """Of the velocity, and of all gradients."""
    gradients = (error for of in rows.values() for name, error in of.items() if name != "velocity")
    return [_number(max(of["velocity"] for of in rows.values())), _number(max(gradients))]


def _table(rows: dict[Layout, dict[str, float]], yardsticks: dict[Layout, dict[str, float]] | None = None) -> list[str]:
    body = [_row(_sizes(layout), _world(layout), layout, errors) for layout, errors in rows.items()]
    for one, errors in (yardsticks or {}).items():
        name = "quantizing itself" + ", guided" * (one.cfg > 1) + f", {one.heads} heads" * (one.heads > 8)
        body.append(_row(name, 1, one, errors))
    return table(["layout", "ranks", "k", "grid", "", "velocity", *GROUPS], body)


def _row(name: str, ranks: int, layout: Layout, errors: dict[str, float]) -> list[str]:
    evenness = ("even", "uneven")[GRIDS[layout.k].index(layout.grid)]
    shape = [str(layout.k), " x ".join(map(str, layout.grid)), evenness]
    return [name, str(ranks), *shape, *map(_number, errors.values())]


def _sizes(layout: Layout) -> str:
    sizes = {"cfg": layout.cfg, "ssp": layout.ssp, "ulysses": layout.ulysses}
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def _number(error: float) -> str:
    return f"{error:.0e}" if error else "0"


if __name__ == "__main__":
    main()
