"""The plan of a run before anything is loaded: tokens, kernels and why, memory, arithmetic. What `--dry-run` prints."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ospnext.generation import quant_plan
from ospnext.generation.config import VideoConfig
from ospnext.generation.jobs import Run, VideoJob
from ospnext.generation.memory import Known, MemoryPlan, plan_memory
from ospnext.generation.parallel import idle_replicas, token_grid
from ospnext.generation.quantization import quant_policy
from ospnext.generation.videos import transformer_overrides
from ospnext.models.config import TransformerConfig
from ospnext.models.flops import forward_flops
from ospnext.models.layout import block_orders
from ospnext.models.loading import LoadReport, inspect_checkpoint
from ospnext.models.parallelize import rank_tokens
from ospnext.models.quant_policy import QuantPolicy
from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts.attention import AttentionRequest
from ospnext.ops.device import Device
from ospnext.ops.explain import candidate_lines
from ospnext.ops.policy import current_policy
from ospnext.ops.registry import registry
from ospnext.ops.select import Decision, select
from ospnext.parallel.config import ALONE, ParallelConfig
from ospnext.pipelines.layout import Layout, detect_layout
from ospnext.sparse import Grid, skiparse_plan


@dataclass(frozen=True)
class SizePlan:
    """What every video of one size asks for. Memory in bytes."""

    video: VideoConfig
    count: int
    grid: Grid
    subsequences: dict[str, tuple[int, ...]]
    decisions: dict[str, Decision]
    forward_tflops: float
    forwards: int
    needs: MemoryPlan
    #: Of a sample on each of the ranks that share it.
    rank_tokens: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def video_tflops(self) -> float:
        return self.forward_tflops * self.forwards

    @property
    def memory(self) -> dict[str, int]:
        return self.needs.parts

    @property
    def peak_memory(self) -> int:
        return self.needs.peak


@dataclass(frozen=True)
class Plan:
    """The plan of a run; `rate` is the FLOP/s of a matrix product measured on the device just now, `videos` the sizes
    in the order in which replicas take turns, and `local_ranks` are on the host of the first rank.
    """

    checkpoint: LoadReport
    device: torch.device
    policy: str
    free_memory: int | None
    rate: float
    sizes: tuple[SizePlan, ...]
    quant: QuantPolicy | None = None
    layout: ParallelConfig = ALONE
    videos: tuple[VideoConfig, ...] = ()
    local_ranks: int = 1

    @property
    def rank_tflops(self) -> float:
        """Of a rank of the replica that has most to make."""
        of_video, dp = {size.video: size.video_tflops for size in self.sizes}, self.layout.dp
        return max(sum(of_video[video] for video in self.videos[i::dp]) for i in range(dp)) / self.layout.replica

    @property
    def host_memory(self) -> int:
        """Bytes of all ranks on the host of the first one, where the first of each replica comes before its others."""
        leading = -(-self.local_ranks // self.layout.replica)
        others = self.local_ranks - leading
        return max(leading * size.needs.peak + others * size.needs.peak_of_others for size in self.sizes)

    def text(self) -> str:
        lines = [str(self.checkpoint), f"device    {self.device}   policy: {self.policy}"]
        if self.layout.world > 1:
            lines.append(f"ranks     {self.layout.world}: {self.layout}")
        if idle := idle_replicas(self.layout, len(self.videos)):
            lines.append(f"          {idle}")
        if self.quant is not None:
            lines.append(f"quantize  {quant_plan.in_a_line(self.quant)}")
        for size in self.sizes:
            lines += ["", *_size_lines(size)]
        total = self.rank_tflops
        lines += [
            "",
            f"time     at least {_duration(total * 1e12 / self.rate)}: {total:.4g} TFLOP in the transformer"
            f"{' of a rank' * (self.layout.world > 1)}, at the {self.rate / 1e12:.3g} TFLOP/s a matrix product reaches "
            "here now",
            f"memory   about {self._memory()}",
        ]
        return "\n".join(lines)

    def _memory(self) -> str:
        need = max(size.peak_memory for size in self.sizes)
        said = f"{_gib(need)} at the peak{' of the first rank' * (self.layout.world > 1)}"
        if self.device.type == "cpu" and self.local_ranks > 1:  # they share what is free
            need = self.host_memory
            said += f" and {_gib(need)} of the {self.local_ranks} on one host"
        return f"{said}, {_verdict(need, self.free_memory, self.device)}"


def _verdict(need: int, free: int | None, device: torch.device) -> str:
    if free is None:
        return f"free on {device}: unknown"
    return f"{_gib(free)} free on {device}: {'fits' if need <= free else 'does NOT fit'}"


def make_plan(
    run: Run,
    todo: Sequence[VideoJob],
    device: torch.device,
    parallel: ParallelConfig = ALONE,
    local_ranks: int | None = None,
) -> Plan:
    """Plan the videos of `todo`, made by ranks as `parallel` says, `local_ranks` of them on this host (None: all).
    Reads file headers only; measures one matrix product for a fraction of a second.
    """
    config = run.config
    layout = detect_layout(run.model, ("transformer", "text_encoder", "vae"))
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    report = inspect_checkpoint(layout.transformer, dtype=dtype, config_overrides=transformer_overrides(config))
    policy = quant_policy(config)
    free = Device(device).free_memory()
    known = Known(config, report, quant_plan.planned(report, policy), policy, device, free, parallel)
    videos = tuple(job.video for job in todo or run.jobs)
    sizes = tuple(_plan_size(video, count, known, layout) for video, count in Counter(videos).items())
    return Plan(
        checkpoint=report,
        device=device,
        policy=str(current_policy()),
        free_memory=known.free,
        rate=_matmul_rate(device, report.dtype),
        sizes=sizes,
        quant=policy,
        layout=parallel,
        videos=videos,
        local_ranks=parallel.world if local_ranks is None else local_ranks,
    )


def _plan_size(video: VideoConfig, count: int, known: Known, layout: Layout) -> SizePlan:
    report, device = known.report, known.device
    config = report.config
    grid = token_grid(video)
    plan = skiparse_plan(grid, config.sparse_ratio)
    kinds = set(block_orders(config.block_kinds)) if config.sparse else set()
    return SizePlan(
        video=video,
        count=count,
        grid=grid,
        subsequences={kind: tuple(n for n in plan.order(kind).lengths if n) for kind in sorted(kinds, reverse=True)},
        decisions=_decisions(config, grid, report.dtype, device)
        | quant_plan.decisions(config, plan.tokens, report.dtype, device, known.quantization)
        | quant_plan.compat_decisions(known.policy, report.dtype, device),
        forward_tflops=forward_flops(config, grid).total / 1e12,
        forwards=known.config.sampling.num_inference_steps * known.branches,
        needs=plan_memory(known, layout, grid),
        rank_tokens=rank_tokens(config, grid, known.parallel) if known.parallel.sequence > 1 else (),
    )


def _decisions(config: TransformerConfig, grid: Grid, dtype: torch.dtype, device: torch.device) -> dict[str, Decision]:
    """The selection for each kind of attention that a block of this model asks for."""
    tokens, plan = math.prod(grid), skiparse_plan(grid, config.sparse_ratio)
    policy, known = current_policy(), registry()

    def decide(batch: int, q_len: int, kv_len: int, packed: bool = False) -> Decision:
        request = AttentionRequest(
            device.type, dtype, batch, q_len, kv_len, config.num_heads, config.head_dim, packed=packed
        )
        return select(CONTRACTS["attention"], request, policy, known)

    found = {"text cross-attention": decide(1, tokens, config.text_len)}
    if "full" in config.block_kinds:
        found["full self-attention"] = decide(1, tokens, tokens)
    for kind in ("token", "group"):
        if kind in config.block_kinds:
            lengths = [n for n in plan.order(kind).lengths if n]
            longest = max(lengths)
            found[f"{kind} self-attention"] = decide(len(lengths), longest, longest, packed=len(set(lengths)) > 1)
    return found


def _matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product in `dtype`, measured for about `seconds`."""
    n = 512 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    surface = Device(device)
    a @ a
    surface.synchronize()
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        surface.synchronize()
        products += 1
    return products * 2 * n**3 / (time.perf_counter() - started)


def _size_lines(size: SizePlan) -> list[str]:
    video = size.video
    t, h, w = size.grid
    lines = [
        f"{size.count} x {video.num_frames} frames of {video.height}x{video.width}",
        f"  tokens      {size.tokens:,} ({t} x {h} x {w})",
    ]
    for kind, lengths in size.subsequences.items():
        lines.append(f"  {kind:<11} {len(lengths)} subsequences of {_lengths(lengths)} tokens")
    if size.rank_tokens:
        fewest, most = min(size.rank_tokens), max(size.rank_tokens)
        lines.append(f"  rank        {f'{most:,}' if fewest == most else f'{fewest:,} to {most:,}'} tokens")
    lines.append(f"  arithmetic  {size.forward_tflops:.4g} TFLOP a forward, {size.forwards} forwards a video")
    lines += _memory_lines(size.needs)
    for name, decision in size.decisions.items():
        lines.append(f"  {name}: {decision.chosen_id or 'NOTHING takes it'}")
        lines += candidate_lines(decision, unavailable=False)
    return lines


def _memory_lines(needs: MemoryPlan) -> Iterator[str]:
    for name, amount in needs.parts.items():
        yield f"  memory      {_gib(amount):>10}  {name}{needs.remark(name)}"
        yield from (f"  {_gib(part):>26}  {what}" for what, part in needs.within(name).items())


def _lengths(lengths: tuple[int, ...]) -> str:
    return f"{lengths[0]:,}" if len(set(lengths)) == 1 else ", ".join(f"{n:,}" for n in lengths)


def _gib(amount: int) -> str:
    return f"{amount / 2**30:,.2f} GiB" if amount >= 2**27 else f"{amount / 2**20:,.2f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
