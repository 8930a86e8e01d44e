"""Layouts of ranks that share a sample, run by as many processes as they have ranks and compared with one process.

    python tests/parallel_layouts.py WORLD RESULTS.json

Ranks are forked from a process that has imported everything: starting one costs nothing. Everything is in fp64, so that
a difference is a mistake and no rounding."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ospnext.errors import ConfigError
from ospnext.models import OSPNextTransformer, TransformerConfig, preset, quantize_model
from ospnext.models.layers import CrossAttention
from ospnext.models.quant_policy import QuantPolicy
from ospnext.ops import use_backend
from ospnext.ops.collective import all_gather
from ospnext.parallel import SequenceParallel
from ospnext.parallel.exchange import Payload

HEADS = 8
WIDE = {"dim": 96, "num_heads": HEADS, "ffn_dim": 64}


@dataclass(frozen=True)
class Layout:
    """`full` blocks stand at both ends, as `num_full_blocks` says; k = 1 is the dense model."""

    ssp: int
    ulysses: int
    k: int = 2
    full: int = 4
    grid: tuple[int, int, int] = (2, 7, 9)
    batch: int = 1
    heads: int = HEADS
    quant: bool = False
    payload: Payload = "plain"
    #: What is wrong on purpose.
    mutant: str = ""

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.grid))
        words = f"ssp{self.ssp}-ulysses{self.ulysses}-k{self.k}-full{self.full}-{shape}-b{self.batch}-h{self.heads}"
        payload = "" if self.payload == "plain" else f"-{self.payload}-payload"
        return words + ("-hif8" if self.quant else "") + payload + (f"-{self.mutant}" if self.mutant else "")


#: 480P and 720P have 30 x 52 and 45 x 80 tokens a frame: these are an eighth and less of them, and odd ones.
EVEN, ODD, LIKE_720P, LIKE_480P = (2, 8, 8), (2, 7, 9), (3, 11, 20), (2, 15, 26)
LAYOUTS: dict[int, tuple[Layout, ...]] = {
    2: (
        Layout(2, 1, grid=EVEN),
        Layout(2, 1, batch=2),
        Layout(1, 2),
        Layout(1, 2, k=1, full=0, batch=2),
        Layout(2, 1, quant=True),
        Layout(2, 1, mutant="sliced-adjoint"),
    ),
    3: (Layout(3, 1, k=3, full=4), Layout(1, 3, batch=2), Layout(1, 3, heads=4)),
    4: (
        Layout(4, 1, grid=EVEN),
        Layout(4, 1, grid=LIKE_720P),
        Layout(4, 1, grid=LIKE_480P, full=0),
        Layout(2, 2, batch=2),
        Layout(1, 4, full=0),
        Layout(4, 1, quant=True),
        Layout(2, 2, quant=True),
        Layout(4, 1, grid=LIKE_720P, payload="hif8"),
        Layout(2, 2, batch=2, payload="hif8"),
        Layout(4, 1, mutant="sliced-adjoint"),
    ),
    6: (Layout(2, 3, grid=LIKE_720P), Layout(3, 2, k=3, grid=(2, 10, 13), batch=2), Layout(1, 6, k=1, full=0)),
    8: (Layout(4, 2, grid=LIKE_720P), Layout(2, 4), Layout(1, 8, k=1, full=0)),
}


def model_of(layout: Layout) -> OSPNextTransformer:
    kind = "full" if layout.k == 1 else "dual_end"
    shape = {"num_layers": 4 if layout.k == 1 or not layout.full else 8, "num_full_blocks": layout.full}
    config: TransformerConfig = preset("tiny").replace(
        **WIDE | {"num_heads": layout.heads}, **shape, skiparse_model_type=kind, sparse_ratio=layout.k
    )
    model = OSPNextTransformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # a head of zeros would have no gradient before it
        model.head.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    model = model.double()
    return quantize_model(model, QuantPolicy(quant="hif8", quant_attn="hif8")) if layout.quant else model


def run(model: OSPNextTransformer, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """(velocity, gradients of a loss that is not the same for any two tokens; none where 8 bits travel)."""
    config, generator = model.config, torch.Generator().manual_seed(2)
    (t, h, w), (_, ph, pw) = layout.grid, config.patch_size

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latents = randn(layout.batch, config.in_dim, t, h * ph, w * pw)
    text, weight = randn(layout.batch, config.text_len, config.text_dim), randn(*latents.shape)
    timestep = torch.full((layout.batch,), 500.0, dtype=torch.float64)
    if layout.payload != "plain":
        return eight_bits(model, latents, timestep, text), {}
    velocity = model(latents, timestep, text)
    (velocity * weight).sum().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return velocity.detach(), gradients


def eight_bits(model: OSPNextTransformer, *inputs: Tensor) -> Tensor:
    """The velocity; asking for gradients where ranks exchange 8 bits must be refused."""
    refused = model.sequence is None
    try:
        model(*inputs)
    except ConfigError as error:
        refused = "has no gradient" in str(error)
    assert refused
    with torch.no_grad():
        return model(*inputs)


def share(model: OSPNextTransformer, layout: Layout, rank: int) -> None:
    """What mesh.py and parallelize.py do, by hand."""
    group = None
    for first in range(0, layout.ssp * layout.ulysses, layout.ulysses):
        ranks = list(range(first, first + layout.ulysses))
        made = dist.new_group(ranks)
        group = made if rank in ranks else group
    model.sequence = SequenceParallel(layout.ssp, layout.ulysses, rank, dist.group.WORLD, group, layout.payload)
    for module in model.modules():
        if hasattr(module, "amax_group"):
            module.amax_group = dist.group.WORLD  # type: ignore[assignment]
        if isinstance(module, CrossAttention):
            module.attend.kv_group = dist.group.WORLD
    if layout.mutant == "sliced-adjoint":
        plan = model.layout(layout.grid, layout.batch)
        broken = tuple(replace(b, exchange=b.exchange and GatherAndKeep(b.exchange)) for b in plan.blocks)
        model._layouts[next(iter(model._layouts))] = replace(plan, blocks=broken)


class GatherAndKeep:
    """As upstream goes between full and sparse blocks: everything to everyone, of which each keeps its own part, and a
    gradient that takes the local slice. What others did with this rank's tokens is lost.
    """

    def __init__(self, exchange: Any) -> None:
        self.exchange = exchange

    def __call__(self, x_BNC: Tensor) -> Tensor:
        arrived = self.exchange(x_BNC.detach())
        return arrived + _SliceOfGradient.apply(x_BNC, arrived, self.exchange)


class _SliceOfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, arrived: Tensor, exchange: Any) -> Tensor:
        ctx.exchange, ctx.rows = exchange, x_BNC.shape[1]
        return torch.zeros_like(arrived)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Only of the rows that stayed."""
        rank, exchange = dist.get_rank(), ctx.exchange
        kept, start = grad.new_zeros(grad.shape[0], ctx.rows, grad.shape[2]), sum(exchange.send_splits[:rank])
        rows = torch.arange(grad.shape[1]) if exchange.arrange is None else torch.argsort(exchange.arrange)
        first, count = sum(exchange.receive_splits[:rank]), exchange.receive_splits[rank]
        kept[:, start : start + count] = grad[:, rows[first : first + count]]
        return kept, None, None


def rank_main(rank: int, world: int, address: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    found = {}
    with use_backend("reference"):
        for layout in LAYOUTS[world]:
            alone, together = model_of(layout), model_of(layout)
            share(together, layout, rank)
            expected, of_one = run(alone, layout)
            velocity, of_ranks = run(together, layout)
            found[layout.name] = {
                "velocity": _off(velocity, expected),
                # Every rank has computed the loss: the mean over them, as FSDP takes it, is the gradient.
                "gradients": {name: _off(_mean(grad, world), of_one[name]) for name, grad in of_ranks.items()},
                "agree": bool((all_gather(velocity[None]) == velocity).all()),
            }
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def _mean(t: Tensor, world: int) -> Tensor:
    return all_gather(t[None]).sum(0) / world


def _off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


if __name__ == "__main__":
    world, out = int(sys.argv[1]), sys.argv[2]
    meeting = Path(out).with_suffix(".store")
    mp.start_processes(rank_main, (world, f"file://{meeting}", out), world, start_method="fork")
