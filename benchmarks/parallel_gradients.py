"""How far velocity and gradients of ranks that share a model are from those of one process, in fp64: by layout and by
group of parameters, and beside them those of a published gradient that is wrong.

    python benchmarks/parallel_gradients.py --out benchmarks/results/parallel_gradients.md     # minutes on two cores
    python benchmarks/parallel_gradients.py --tiny                                              # seconds

Ranks are processes of this machine over gloo, each with one thread. The layouts and their comparison are those of
tests/test_parallel_model.py; that one compares each parameter by itself, and larger grids."""

from __future__ import annotations

import argparse
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
from hif8_cast import processor  # noqa: E402
from parallel_layouts import Computed, Layout, compared, model_of  # noqa: E402
from torch import Tensor  # noqa: E402

from ospnext.bench.report import table  # noqa: E402
from ospnext.bench.versions import versions  # noqa: E402

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

    def layouts(self, *, mutant: str = "") -> Iterator[Layout]:
        """Over both grids, in full precision and in HiFloat8. Full blocks need a head for each rank."""
        for quant in (False, True):
            for grid in GRIDS[self.k]:
                made = Layout(self.ssp, self.ulysses, self.k, 0 if self.k == 1 else 4, grid, quant=quant, cfg=self.cfg)
                yield replace(made, mutant=mutant, heads=made.heads if self.world <= made.heads else 12)


DIVIDED = (
    Divided(2, ssp=2), Divided(1, ulysses=2), Divided(2, ulysses=2), Divided(2, cfg=2),
    Divided(3, ssp=3), Divided(2, ulysses=3), Divided(3, ulysses=3),
    Divided(2, ssp=4), Divided(1, ulysses=4), Divided(2, ulysses=4), Divided(2, ssp=2, ulysses=2),
    Divided(2, cfg=2, ssp=2), Divided(2, cfg=2, ulysses=2),
    Divided(2, ulysses=6), Divided(2, ssp=2, ulysses=3), Divided(3, ssp=3, ulysses=2), Divided(3, cfg=2, ssp=3),
    Divided(2, ulysses=8), Divided(2, ssp=2, ulysses=4), Divided(2, ssp=4, ulysses=2), Divided(2, cfg=2, ssp=4),
    Divided(2, cfg=2, ssp=2, ulysses=2),
    Divided(3, ssp=9),
)  # fmt: skip
WRONG = (Divided(2, ssp=2), Divided(3, ssp=3), Divided(2, ssp=4), Divided(2, ssp=4, ulysses=2))
TINY = (Divided(2, ssp=2), Divided(2, ulysses=2), Divided(2, cfg=2)), (Divided(2, ssp=2),)
SLICED = "sliced-adjoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two ranks only")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    right, wrong = TINY if arguments.tiny else (DIVIDED, WRONG)
    layouts = [layout for one in right for layout in one.layouts()]
    layouts += [layout for one in wrong for layout in one.layouts(mutant=SLICED) if not layout.quant]
    text = "\n".join(report(errors(layouts))) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


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


def report(found: dict[Layout, dict[str, float]]) -> Iterator[str]:
    said, some = versions(torch.device("cpu")), model_of(next(iter(found)))
    config = some.config
    right = [of for layout, of in found.items() if not layout.mutant]
    wrong = [of for layout, of in found.items() if layout.mutant]
    yield from ("# Velocity and gradients of ranks against one process", "")
    yield f"fp64; ospnext {said['ospnext']}, torch {said['torch']}, python {said['python']}; {processor()}, ranks over"
    yield "gloo, one thread each; backend reference."
    yield f"Model: {config.num_layers} blocks, of which two at each end are full (k = 1 is dense: 4 full blocks);"
    yield f"{config.dim} channels in {config.num_heads} heads (12 for 9 ranks), FFN of {config.ffn_dim}, text of"
    yield f"{config.text_len} tokens; {sum(p.numel() for p in some.parameters()):,} random parameters. One sample; a grid"
    yield "is T x H x W tokens, even where k^2 divides H and W. The loss is a weighted sum of the velocity, of the guided"
    yield "one with cfg 2. Gradients are means over ranks, as FSDP takes them."
    yield ""
    yield "Each number is max |g - g1| / max |g1| over the parameters of a group, g1 being the gradient on one process;"
    yield "`velocity` is the same of the forward pass. `cross-attention` includes the norm before it, `modulation` the"
    yield "projection of the timestep, and `head` its own modulation."
    yield ""
    yield f"Largest: {_largest(right, velocity=True)} of a velocity, {_largest(right)} of a gradient. With the gradient of"
    yield f"the last table: {_largest(wrong, velocity=True)} and {_largest(wrong)}."
    yield from ("", "## In full precision", "", *_table(found, quant=False, mutant=""))
    yield from ("", "## HiFloat8", "")
    yield "Linears and attention of all blocks quantize and dequantize, forward and backward, with scales of whole tensors"
    yield "that ranks agree on."
    yield from ("", *_table(found, quant=True, mutant=""))
    yield from ("", "## A gradient that slices", "")
    yield "The same layouts, but where tokens change rank the backward pass takes the local slice instead of the adjoint of"
    yield "the exchange, as published code does around its gathers: what other ranks did with a token is lost. The forward"
    yield "pass does not tell, and neither does the head, which comes after the last exchange."
    yield from ("", *_table(found, quant=False, mutant=SLICED))


def _largest(rows: Sequence[dict[str, float]], *, velocity: bool = False) -> str:
    return _number(max(error for of in rows for name, error in of.items() if (name == "velocity") is velocity))


def _table(found: dict[Layout, dict[str, float]], *, quant: bool, mutant: str) -> list[str]:
    head = ["layout", "ranks", "k", "grid", "", "velocity", *GROUPS]
    rows = []
    for layout, errors in found.items():
        if (layout.quant, layout.mutant) == (quant, mutant):
            evenness = ("even", "uneven")[GRIDS[layout.k].index(layout.grid)]
            shape = [str(layout.k), " x ".join(map(str, layout.grid)), evenness]
            rows.append([_sizes(layout), str(_world(layout)), *shape, *map(_number, errors.values())])
    return table(head, rows)


def _sizes(layout: Layout) -> str:
    sizes = {"cfg": layout.cfg, "ssp": layout.ssp, "ulysses": layout.ulysses}
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def _number(error: float) -> str:
    return f"{error:.0e}" if error else "0"


if __name__ == "__main__":
    main()
