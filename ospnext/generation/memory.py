"""Memory of a run before anything is loaded, part by part, and what the pipeline will decide by it. No kernels run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ospnext.diffusion import batches_branches, needs_guidance
from ospnext.generation.config import GenerateConfig
from ospnext.models.config import TransformerConfig
from ospnext.models.loading import LoadReport
from ospnext.models.memory import (
    activation_peak,
    exchange_peak,
    latent_bytes,
    layout_bytes,
    text_bytes,
    weight_bytes,
)
from ospnext.models.parallelize import rank_tokens
from ospnext.models.quant_policy import QuantPolicy
from ospnext.models.weights.quantized import Quantization
from ospnext.ops import HiF8Recipe
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.policy import COMPOSITE, current_policy
from ospnext.ops.registry import registry
from ospnext.ops.select import select
from ospnext.parallel.config import ALONE, ParallelConfig
from ospnext.pipelines.branches import block_flops
from ospnext.pipelines.layout import Layout
from ospnext.pipelines.strict_load import read_json
from ospnext.pipelines.vae import tiles, with_workspace
from ospnext.pipelines.vae_memory import decode_peak, shared_peaks
from ospnext.pipelines.vae_sharing import may_share
from ospnext.pipelines.vae_tiles import tiles_of
from ospnext.sparse import Grid

#: Weights are loaded as they are and become codes on the device: what is freed again before the first video.
WHILE_LOADING = "weights, until they are codes"
ACTIVATIONS, DECODE = "activations", "VAE decode"
TEXT_ENCODER, VAE_WEIGHTS = "text encoder", "VAE weights"
EXCHANGE = "q, k and v while they are exchanged"


@dataclass(frozen=True)
class Known:
    """What is the same for all sizes; `free` is the device's memory now, in bytes, None if unknown."""

    config: GenerateConfig
    report: LoadReport
    quantization: Quantization
    policy: QuantPolicy | None
    device: torch.device
    free: int | None
    parallel: ParallelConfig = ALONE

    @property
    def branches(self) -> int:
        return 2 if needs_guidance(self.config.sampling.guidance_scale) else 1

    @property
    def rank_branches(self) -> int:
        """Of them, those that a rank computes."""
        return self.branches // self.parallel.cfg


@dataclass(frozen=True)
class DecodePlan:
    """Bytes of a decode on the first rank of those that make a video and, at most, on another of them; whether it is in
    tiles, and how many ranks have some of these.
    """

    first: int
    other: int = 0
    tiled: bool = False
    ranks: int = 1


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, on the first rank of those that make a video and on another of them. `activations` is what that
    part is made of at the worst moment of a denoising step.
    """

    parts: dict[str, int]
    others: dict[str, int]
    activations: dict[str, int]
    #: Whether both branches of guidance share a forward.
    batched: bool
    decode: DecodePlan

    @property
    def peak(self) -> int:
        """Everything that stays, plus the largest of what loading, sampling and decoding need for a while."""
        return _peak(self.parts)

    @property
    def peak_of_others(self) -> int:
        """Of a rank that helps to make a video and is not the first of those that do."""
        return _peak(self.others)

    def remark(self, part: str) -> str:
        if part == ACTIVATIONS and self.batched:
            return ", both branches of guidance in one forward"
        if part == DECODE and self.decode.ranks > 1:
            return f", in tiles divided among {self.decode.ranks} ranks"
        return ", in tiles" if part == DECODE and self.decode.tiled else ""

    def within(self, part: str) -> dict[str, int]:
        """What more there is to say of a part."""
        if part == DECODE and self.decode.ranks > 1:
            return {"on another of them, at most": self.decode.other}
        return self.activations if part == ACTIVATIONS else {}


def _peak(parts: dict[str, int]) -> int:
    passing = {WHILE_LOADING, ACTIVATIONS, DECODE} & parts.keys()
    staying = sum(amount for name, amount in parts.items() if name not in passing)
    return staying + max(parts[name] for name in passing)


def plan_memory(known: Known, layout: Layout, grid: Grid) -> MemoryPlan:
    """For videos whose token grid is `grid`. Of the ranks that make one, the first has the text encoder and decodes;
    the others have an autoencoder if they may have to help. Reads the headers and configs of the checkpoint only.
    """
    config, dtype, held = known.report.config, known.report.dtype, _held(known, grid)
    staying = {
        **_weights(known, layout),
        "text keys and values": text_bytes(config, dtype, known.rank_branches),
        "rotary and index tables": layout_bytes(config, held, dtype),
    }
    kept = sum(amount for name, amount in staying.items() if name != WHILE_LOADING)
    left = None if known.free is None else known.free - kept
    batched = known.rank_branches > 1 and _batched(known, grid, left)
    activations = _activations(known, grid, batched)
    decode = _decode(known, layout.vae, grid, left)
    parts = {**staying, ACTIVATIONS: sum(activations.values()), DECODE: decode.first}
    absent = {TEXT_ENCODER} if _may_share(known) else {TEXT_ENCODER, VAE_WEIGHTS}
    others = {name: amount for name, amount in parts.items() if name not in absent} | {DECODE: decode.other}
    return MemoryPlan(parts, others, activations, batched, decode)


def _held(known: Known, grid: Grid) -> Grid:
    """As many tokens as the fullest rank holds: estimates ask how many there are, not where."""
    if known.parallel.sequence == 1:
        return grid
    return 1, 1, max(rank_tokens(known.report.config, grid, known.parallel))


def _weights(known: Known, layout: Layout) -> dict[str, int]:
    report = known.report
    weights = weight_bytes(report.config, report.dtype, known.quantization)
    found = {
        "transformer weights": weights,
        TEXT_ENCODER: _file_bytes(layout.text_encoder),
        VAE_WEIGHTS: _file_bytes(layout.vae),
    }
    if loaded := weight_bytes(report.config, report.dtype, report.quantization) - weights:
        found[WHILE_LOADING] = loaded
    return found


def _file_bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))


def _batched(known: Known, grid: Grid, free: int | None) -> bool:
    """As the pipeline decides it once the weights are there."""
    config, dtype, found = known.report.config, known.report.dtype, known.quantization
    per_tensor = any(recipe.granularity == "tensor" for recipe in found.linears.values())
    return batches_branches(
        known.config.sampling.batched_guidance,
        block_flops=block_flops(config, grid, videos=1) / known.parallel.sequence,
        activations=sum(activation_peak(config, grid, 2, dtype).values()) // known.parallel.sequence,
        free=free,
        scales_span_batch=per_tensor or bool(found.attention) or (known.policy or QuantPolicy()).compat != "none",
    )


def _activations(known: Known, grid: Grid, batched: bool) -> dict[str, int]:
    config, dtype, held = known.report.config, known.report.dtype, _held(known, grid)
    fused = fused_operators(config, math.prod(held), dtype, known.device, known.quantization)
    batch = 2 if batched else 1
    found = activation_peak(config, held, batch, dtype, quantization=known.quantization, fused=fused)
    ranks = known.parallel
    exchange = batch * exchange_peak(config, math.prod(held), math.prod(grid), ranks.ssp, ranks.ulysses, dtype)
    if exchange > sum(found.values()):
        found = {EXCHANGE: exchange}
    solver = known.config.scheduler.solver or "unipc"
    found["latents, velocities and solver"] = latent_bytes(config, grid, 1, solver=solver, branches=known.branches)
    return {name: amount for name, amount in found.items() if amount}


def fused_operators(
    config: TransformerConfig, tokens: int, dtype: torch.dtype, device: torch.device, quantization: Quantization
) -> set[str]:
    """Names of the fused operators for which the backend in force has a kernel that takes this model's stream, and not
    their definitions in plain PyTorch.
    """
    recipe = next(iter(quantization.linears.values()), HiF8Recipe())
    found = set()
    for name, contract in CONTRACTS.items():
        if contract.family != "fused":
            continue
        request = contract.request(device.type, dtype, (1, tokens, config.dim))
        if hasattr(request, "granularity"):
            request = dataclasses.replace(request, granularity=recipe.granularity)
        chosen = select(contract, request, current_policy(), registry()).chosen
        # A backend may offer the definition under a name of its own: only the object tells.
        if chosen and chosen.id != COMPOSITE and registry().kernel(chosen) is not contract.composite:
            found.add(name.removeprefix("fused."))
    return found


def _decode(known: Known, vae: Path, grid: Grid, free: int | None) -> DecodePlan:
    """As the pipeline decides it once sampling is done."""
    config = read_json(vae / "config.json") if vae.is_dir() else {}  # an official file holds Wan's own, the default
    _, patch_h, patch_w = known.report.config.patch_size
    latent, dtype = (grid[0], patch_h * grid[1], patch_w * grid[2]), getattr(torch, known.config.vae_dtype)
    whole, ranks = decode_peak(config, latent, dtype), known.parallel.replica
    asked = known.config.vae
    if not tiles("on" if asked.parallel == "on" else asked.tiling, needed=whole, free=free):
        return DecodePlan(with_workspace(whole, known.device))
    helping = min(ranks, sum(map(len, tiles_of(*latent[1:])))) if _may_share(known) else 1
    if helping == 1:
        return DecodePlan(with_workspace(decode_peak(config, latent, dtype, tiled=True), known.device), tiled=True)
    first, *others = shared_peaks(config, latent, dtype, ranks)
    return DecodePlan(with_workspace(first, known.device), with_workspace(max(others), known.device), True, helping)


def _may_share(known: Known) -> bool:
    return may_share(known.config.vae.tiling, known.config.vae.parallel, known.parallel.replica)
