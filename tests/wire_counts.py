"""What ranks that share a sample really send, counted by `count_bytes` in blocks, forwards and training steps of small
models. Runs in the processes of rank_processes.py; no expectation lives here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ospnext import ops
from ospnext.models import OSPNextTransformer, TransformerConfig, preset, quantize_model
from ospnext.models.parallelize import share_samples
from ospnext.models.quant_policy import QuantPolicy
from ospnext.models.traffic import without_sparsity
from ospnext.ops.collective import count_bytes
from ospnext.ops.collective_bytes import Counted
from ospnext.parallel import SequenceParallel
from ospnext.parallel.exchange import Payload
from ospnext.pipelines.live_bytes import LiveBytes

#: Six heads are uneven among four ranks.
QUANTIZED = QuantPolicy(quant="hif8", quant_attn="hif8")
CONFIG = preset("tiny").replace(dim=48, num_heads=6, ffn_dim=48)
#: LIKE_720P is uneven in both kinds of subsequences alike, LIKE_480P has its longest in the group ones.
EVEN, ODD, LIKE_720P, LIKE_480P = (2, 8, 8), (2, 7, 9), (3, 11, 20), (2, 15, 26)


@dataclass(frozen=True)
class Case:
    """A layout of ranks, a video and what is special about the model."""

    ssp: int
    ulysses: int
    grid: tuple[int, int, int] = ODD
    batch: int = 1
    dense: bool = False
    dtype: torch.dtype = torch.float32
    payload: Payload = "plain"
    quantized: bool = False
    training: bool = False
    full: int = 4
    dim: int = 48

    @property
    def config(self) -> TransformerConfig:
        config = CONFIG.replace(dim=self.dim, ffn_dim=self.dim, num_full_blocks=self.full)
        return without_sparsity(config) if self.dense else config

    @property
    def id(self) -> str:
        words = ["dense" if self.dense else f"full{self.full}", f"ssp{self.ssp}", f"ulysses{self.ulysses}"]
        words += [
            "x".join(map(str, self.grid)),
            f"b{self.batch}",
            f"c{self.dim}",
            str(self.dtype).removeprefix("torch."),
        ]
        return "-".join([*words, *(w for w in ("quantized", "training") if getattr(self, w)), self.payload])


CASES: dict[int, tuple[Case, ...]] = {
    2: (
        Case(2, 1, EVEN, training=True),
        Case(2, 1, batch=2, training=True),
        Case(1, 2, training=True),
        Case(1, 2, dense=True, batch=2, training=True),
        Case(2, 1, payload="hif8", batch=2),
        Case(2, 1, quantized=True, training=True),
        Case(2, 1, full=0),
        Case(1, 2, LIKE_720P, dim=288, dtype=torch.bfloat16),
        Case(2, 1, LIKE_720P, dim=288),
    ),
    4: (
        Case(4, 1, LIKE_720P, training=True),
        Case(2, 2, training=True),
        Case(1, 4, dtype=torch.bfloat16),
        Case(1, 4, EVEN, dense=True),
        Case(4, 1, LIKE_480P, payload="hif8", dtype=torch.bfloat16),
        Case(2, 2, quantized=True),
        Case(2, 2, full=0, batch=2),
    ),
}


@dataclass(frozen=True)
class Sent:
    """Bytes of this rank, and how many collectives it called. `live` is the most that a forward held in tensors."""

    blocks: tuple[int, ...]
    forward: int
    calls: int
    live: int
    trained: int = 0
    trained_checkpointed: int = 0


def sent_in_every_case(world: int) -> dict[str, Sent]:
    with ops.use_backend("reference"):
        groups = {size: _group_of(size) for size in (1, 2, 4) if size <= world}
        return {case.id: _sent(case, groups) for case in CASES[world]}


def _group_of(size: int) -> dist.ProcessGroup:
    """The group of `size` consecutive ranks that this one is in."""
    made = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
    return made[dist.get_rank() // size]


def _sent(case: Case, groups: dict[int, dist.ProcessGroup]) -> Sent:
    model = _model(case, groups)
    latents, timestep, text = _inputs(case)
    with torch.no_grad():
        context = model.encode_text(text)
        model(latents, timestep, context)  # builds the layout
        with LiveBytes() as live:
            model(latents, timestep, context)
        with count_bytes() as forward, _marks(model, forward) as marks:
            model(latents, timestep, context)
    blocks = tuple(after - before for before, after in itertools.pairwise(marks))
    found = Sent(blocks, forward.total_bytes(), forward.total_calls(), live.peak)
    if not case.training:
        return found
    trained = [_step(model, latents, timestep, text)]
    model.gradient_checkpointing = True
    trained.append(_step(model, latents, timestep, text))
    return Sent(found.blocks, found.forward, found.calls, found.live, *trained)


def _model(case: Case, groups: dict[int, dist.ProcessGroup]) -> OSPNextTransformer:
    model = OSPNextTransformer(case.config)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to(case.dtype)
    if case.quantized:
        quantize_model(model, QUANTIZED)
    world = dist.group.WORLD
    sequence = SequenceParallel(case.ssp, case.ulysses, dist.get_rank(), world, groups[case.ulysses], case.payload)
    share_samples(model, sequence)
    return model


def _inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config, generator = case.config, torch.Generator().manual_seed(1)
    (t, h, w), (_, ph, pw) = case.grid, config.patch_size
    latents = torch.randn(case.batch, config.in_dim, t, h * ph, w * pw, generator=generator)
    text = torch.randn(case.batch, config.text_len, config.text_dim, generator=generator)
    return latents, torch.full((case.batch,), 500.0), text


@contextmanager
def _marks(model: OSPNextTransformer, counted: Counted) -> Iterator[list[int]]:
    """What has been sent when each block begins, and when the head does."""
    marks: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_: marks.append(counted.total_bytes()))
        for module in (*model.blocks, model.head)
    ]
    yield marks
    for hook in hooks:
        hook.remove()


def _step(model: OSPNextTransformer, *inputs: torch.Tensor) -> int:
    """Bytes sent in forward and backward."""
    with count_bytes() as counted:
        model(*inputs).sum().backward()
    return counted.total_bytes()
