"""Pipelines of several ranks beside those of one process, in every layout, and a command line that is refused. Run by
test_parallel_generate.py.

    python tests/parallel_pipelines.py CHECKPOINT RESULTS.json

Ranks are forked from a process that has imported everything: starting one costs nothing. No text encoder and no
autoencoder: embeddings go in, latents come out."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ospnext.cli import main
from ospnext.models import OSPNextTransformer, preset, quantize_model
from ospnext.models.parallelize import share_samples
from ospnext.models.quant_policy import QuantPolicy
from ospnext.ops.collective import all_gather
from ospnext.parallel.config import ParallelConfig
from ospnext.parallel.mesh import Mesh, make_mesh
from ospnext.pipelines.text_to_video import OSPNextPipeline

WORLD, TIMEOUT = 4, 60.0
#: 2 x 8 x 10 tokens, of which every rank holds an even number.
VIDEO: dict[str, Any] = {"height": 128, "width": 160, "num_frames": 5}
STEPS, GUIDANCE = 3, 5.0


@dataclass(frozen=True)
class Case:
    dp: int
    cfg: int
    ssp: int
    ulysses: int
    quant: bool = False
    share_scales: bool = True

    @property
    def name(self) -> str:
        words = f"dp{self.dp}-cfg{self.cfg}-ssp{self.ssp}-ulysses{self.ulysses}"
        return words + "-hif8" * self.quant + "-own-scales" * (not self.share_scales)

    @property
    def bitwise(self) -> bool:
        """SSP leaves the tokens of a subsequence and the order of every sum as they are, and branches are computed
        apart anyway; Ulysses lines up tokens in another order.
        """
        return self.ulysses == 1 and self.share_scales


CASES = (
    Case(1, 1, 4, 1),
    Case(1, 2, 2, 1),
    Case(2, 2, 1, 1),
    Case(2, 1, 2, 1),
    Case(2, 1, 1, 2),
    Case(1, 2, 1, 2),
    Case(1, 1, 2, 2),
    Case(1, 1, 4, 1, quant=True),
    Case(1, 1, 4, 1, quant=True, share_scales=False),
)


def pipeline(quant: bool, dtype: torch.dtype = torch.float32) -> OSPNextPipeline:
    config = preset("tiny").replace(num_heads=4)
    model = OSPNextTransformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # training starts from a head of zeros
        model.head.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    if quant:
        quantize_model(model, QuantPolicy("hif8", "hif8"), store=True)
    made = OSPNextPipeline(model.to(dtype), None, None, batched_guidance="off")
    made.set_progress_bar_config(disable=True)
    return made


def sampled(pipe: OSPNextPipeline, seed: int = 0) -> Tensor:
    """Latents of a prompt and a noise that `seed` decides."""
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(seed)
    text = torch.randn(2, 1, config.text_len, config.text_dim, generator=generator)
    output = pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        generator=generator,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="latent",
        **VIDEO,
    )
    return output.frames  # type: ignore[union-attr]


@dataclass(frozen=True)
class Alone:
    """What one process samples, plain and in HiFloat8, and what it would without roundings."""

    plain: Tensor
    quant: Tensor
    exact: Tensor


def compared(case: Case, one: Alone) -> dict[str, Any]:
    """One layout: every rank but the first of its replica is given another prompt and another noise."""
    mesh = make_mesh(ParallelConfig(case.dp, case.cfg, case.ssp, case.ulysses), "cpu", TIMEOUT)
    together = pipeline(case.quant).share(mesh)
    if not case.share_scales:
        share_samples(together.transformer, mesh.sequence, share_scales=False)
    found = sampled(together, seed=0 if mesh.leads else 1 + dist.get_rank())
    alone, exact = (one.quant, one.quant) if case.quant else (one.plain, one.exact)
    return {
        "bitwise": torch.equal(found, alone),
        "agree": bool((all_gather(found[None]) == found).all()),
        "off": (found - exact).abs().max().item(),
        "yardstick": (alone - exact).abs().max().item(),
        "largest": exact.abs().max().item(),
    }


def decided(mesh: Mesh) -> list[bool]:
    """Whether branches share a forward where one rank alone has no memory for it: on every rank."""
    pipe = pipeline(quant=False).share(mesh)
    pipe.batched_guidance = "off" if dist.get_rank() == 2 else "on"
    sampled(pipe)
    return [bool(b) for b in all_gather(torch.tensor([int(pipe.decided["batched"])])).tolist()]


def refused(rank: int, port: int, argv: list[str]) -> dict[str, Any]:
    """What a rank of a command says and ends with."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, WORLD, rank, WORLD, "127.0.0.1", port)), strict=True))
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(["generate", "a fox", *argv])
        except SystemExit as stop:
            code = stop.code
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def rank_main(rank: int, one: Alone, ports: list[int], checkpoint: str, folder: str) -> None:
    here = ["--model", checkpoint, "--output", str(Path(folder) / "out"), "transformer.num_full_blocks=0"]
    missing = here[:1] + ([checkpoint] if rank != 2 else [f"{checkpoint}-elsewhere"]) + here[2:]
    seed = "seed=1" if rank == 1 else "seed=0"
    commands = {
        "size": [*here, "parallel.ssp=3"],
        "one rank": missing,
        "differing": [*here, seed],
        "dry run": [*here, "--dry-run"],
    }
    found: dict[str, Any] = {
        name: refused(rank, port, argv) for (name, argv), port in zip(commands.items(), ports, strict=False)
    }
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found |= {case.name: compared(case, one) for case in CASES}
    found["batched"] = decided(make_mesh(ParallelConfig(ssp=4), "cpu", TIMEOUT))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; another process may take one in between, which is rare."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


if __name__ == "__main__":
    torch.set_num_threads(1)
    one = Alone(
        sampled(pipeline(quant=False)), sampled(pipeline(quant=True)), sampled(pipeline(False, torch.float64)).float()
    )
    mp.start_processes(rank_main, (one, free_ports(4), *sys.argv[1:]), WORLD, start_method="fork")
