"""Layouts of ranks that share a sample, run by as many processes as they have ranks and compared with one process.

    python tests/parallel_layouts.py WORLD RESULTS.json

Ranks are forked from a process that has imported everything: starting one costs nothing. Everything is in fp64, so that
a difference is a mistake and no rounding."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ospnext.errors import ConfigError
from ospnext.models import OSPNextTransformer, TransformerConfig, preset, quantize_model
from ospnext.models.parallelize import share_samples
from ospnext.models.quant_policy import QuantPolicy
from ospnext.ops import use_backend
from ospnext.ops.collective import all_gather
from ospnext.parallel.config import ParallelConfig
from ospnext.parallel.exchange import Payload
from ospnext.parallel.mesh import make_mesh
from ospnext.pipelines.replica import Replica

TIMEOUT, GUIDANCE = 120.0, 5.0
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
    #: 2 computes both branches of guidance, each on ranks of its own.
    cfg: int = 1
    #: Compare with one process that counts its loss once, and not as often as ranks do: in 8 bits another number.
    loss_once: bool = False
    #: What is wrong on purpose.
    mutant: str = ""

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.grid))
        words = f"ssp{self.ssp}-ulysses{self.ulysses}-k{self.k}-full{self.full}-{shape}-b{self.batch}-h{self.heads}"
        payload = "" if self.payload == "plain" else f"-{self.payload}-payload"
        words += ("-hif8" if self.quant else "") + payload + (f"-{self.mutant}" if self.mutant else "")
        return f"cfg{self.cfg}-" * (self.cfg > 1) + words + "-loss-once" * self.loss_once

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(cfg=self.cfg, ssp=self.ssp, ulysses=self.ulysses)

    @property
    def reference(self) -> tuple[Layout, int]:
        """What one process computes to compare it with, the same for several layouts, and how often it counts its loss.

        Each rank computes the loss, so that gradients inside the model are R times those of one process. That rounds
        the scales of 8 bits, which are fp32, otherwise unless R is a power of two.
        """
        times = self.parallel.world if self.quant and not self.loss_once else 1
        return replace(self, ssp=1, ulysses=1, loss_once=False, mutant=""), times


class Computed(NamedTuple):
    """Gradients are by parameter; there are none where 8 bits travel."""

    velocity: Tensor
    gradients: dict[str, Tensor]


#: (of ranks, of one process) -> what is to be said of them, as JSON types.
Judge = Callable[[Computed, Computed], dict[str, Any]]


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


def run(model: OSPNextTransformer, layout: Layout, replica: Replica | None = None, *, times: int = 1) -> Computed:
    """With gradients of a loss that is not the same for any two tokens, counted `times` times and divided by that.
    Without `replica`, on one process.
    """
    config, generator = model.config, torch.Generator().manual_seed(2)
    (t, h, w), (_, ph, pw) = layout.grid, config.patch_size

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latents = randn(layout.batch, config.in_dim, t, h * ph, w * pw)
    text, weight = randn(layout.batch, config.text_len, config.text_dim), randn(*latents.shape)
    timestep = torch.full((layout.batch,), 500.0, dtype=torch.float64)
    if layout.payload != "plain":
        return Computed(eight_bits(model, latents, timestep, text), {})
    if layout.cfg == 1:
        velocity = model(latents, timestep, text)
    else:
        velocity = guided(model, replica or Replica(), latents, timestep, [text, randn(*text.shape)])
    (times * (velocity * weight).sum()).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad / times for n, p in model.named_parameters()}
    return Computed(velocity.detach(), gradients)


def guided(
    model: OSPNextTransformer, replica: Replica, latents: Tensor, timestep: Tensor, texts: Sequence[Tensor]
) -> Tensor:
    """As `diffusion.guide`, but in fp64: that one rounds to fp32."""
    if replica.divides_branches:
        v_cond, v_uncond = replica.of_branches(model(latents, timestep, texts[replica.branch]))
    else:
        v_cond, v_uncond = (model(latents, timestep, text) for text in texts)
    return v_uncond + GUIDANCE * (v_cond - v_uncond)


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


def slice_gradients(model: OSPNextTransformer, layout: Layout) -> None:
    """Plans whose exchanges have the gradient of `GatherAndKeep`."""
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


def compared(world: int, layouts: Sequence[Layout], judge: Judge) -> dict[str, dict[str, Any]]:
    """By name of the layout, what `judge` says, and whether all of `world` ranks have the same velocity ("agree")."""
    torch.set_num_threads(1)
    with use_backend("reference"):
        references = dict.fromkeys(layout.reference for layout in layouts)
        alone = {(one, times): run(model_of(one), one, times=times) for one, times in references}
    with tempfile.TemporaryDirectory(prefix="ospnext-layouts-") as folder:
        mp.start_processes(_rank_main, (world, layouts, alone, judge, folder), world, start_method="fork")
        return json.loads(Path(folder, "results.json").read_text())


def _rank_main(
    rank: int,
    world: int,
    layouts: Sequence[Layout],
    alone: dict[tuple[Layout, int], Computed],
    judge: Judge,
    folder: str,
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found, meshes = {}, {}
    with use_backend("reference"):
        for kind in dict.fromkeys((layout.parallel, layout.payload) for layout in layouts):
            meshes[kind] = make_mesh(kind[0], "cpu", TIMEOUT, kind[1])
        for layout in layouts:
            mesh = meshes[layout.parallel, layout.payload]
            model = share_samples(model_of(layout), mesh.sequence)
            if layout.mutant == "sliced-adjoint":
                slice_gradients(model, layout)
            velocity, gradients = run(model, layout, Replica(mesh))
            # Every rank has computed the loss: the mean over them, as FSDP takes it, is the gradient.
            together = Computed(velocity, _mean(gradients) if gradients else {})
            agree = bool((all_gather(velocity[None]) == velocity).all())
            found[layout.name] = judge(together, alone[layout.reference]) | {"agree": agree}
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _mean(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Over ranks, in one collective."""
    flat = all_gather(torch.cat([grad.flatten() for grad in gradients.values()])[None]).mean(0)
    parts = flat.split([grad.numel() for grad in gradients.values()])
    return {name: part.view_as(grad) for (name, grad), part in zip(gradients.items(), parts, strict=True)}


def by_parameter(found: Computed, expected: Computed) -> dict[str, Any]:
    gradients = {name: _off(grad, expected.gradients[name]) for name, grad in found.gradients.items()}
    return {"velocity": _off(found.velocity, expected.velocity), "gradients": gradients}


def _off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


if __name__ == "__main__":
    world, out = int(sys.argv[1]), sys.argv[2]
    Path(out).write_text(json.dumps(compared(world, LAYOUTS[world], by_parameter)))
