"""One video by one process and by two ranks, in each way to share the work: latents and frames compared.

    python benchmarks/video_across_ranks.py --out benchmarks/results/video_across_ranks.md
    OSPNEXT_BACKEND=reference python benchmarks/video_across_ranks.py        # on a CPU, over gloo

It starts the ranks itself, and each of them runs `ospnext generate` with a small checkpoint of random weights, one
layout after the other. Frames are compared before they would be encoded: H.264 shows more of a difference than there
is. A layout that fails is a row with its error; the others go on in fresh processes."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ospnext.bench.report import table
from ospnext.bench.versions import versions
from ospnext.cli import main as ospnext
from ospnext.generation import videos
from ospnext.generation.backend_choice import chosen_backend
from ospnext.pipelines import write_random_checkpoint
from ospnext.pipelines.text_to_video import OSPNextPipeline

RANKS = 2
PROMPTS = ("a red fox trots through fresh snow", "a dog")
#: 2 x 3 x 17 tokens, which do not divide evenly; two tiles of a decode.
SETTINGS = ("video.height=48", "video.width=272", "video.num_frames=5", "sampling.num_inference_steps=3")
SETTINGS += ("sampling.negative_prompt=''", "sampling.batched_guidance=off", "parallel.timeout=60")
ALONE, IN_TILES = "one process", "one process, vae.parallel=on"
#: Layout -> (settings, which run of one process it is compared with; None for these themselves).
RUNS: dict[str, tuple[tuple[str, ...], str | None]] = {
    ALONE: ((), None),
    IN_TILES: (("vae.parallel=on",), None),
    "cfg 2": (("parallel.cfg=2",), ALONE),
    "ssp 2": (("parallel.cfg=1", "parallel.ssp=2"), ALONE),
    "ulysses 2": (("parallel.cfg=1", "parallel.ssp=1", "parallel.ulysses=2"), ALONE),
    "dp 2": (("parallel.dp=2",), ALONE),
    "ssp 2, vae.parallel=on": (("parallel.cfg=1", "parallel.ssp=2", "vae.parallel=on"), IN_TILES),
}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Job:
    """A run of `ospnext generate`; its ranks meet at `port`."""

    name: str
    dtype: str
    port: int = 0

    @property
    def folder(self) -> str:
        return f"{self.dtype} {self.name}".replace(" ", "-")

    @property
    def alone(self) -> bool:
        return RUNS[self.name][1] is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default=";".join(RUNS), help="some of the runs, separated by semicolons")
    parser.add_argument("--dtypes", default="fp32,bf16", help="(default: fp32,bf16)")
    parser.add_argument("--limit", type=float, default=600, help="seconds for all runs together (default: 600)")
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        serve(arguments.folder, arguments.rank)
        return
    jobs = [Job(name, dtype) for dtype in arguments.dtypes.split(",") for name in arguments.runs.split(";")]
    with tempfile.TemporaryDirectory(prefix="ospnext-video-") as folder:
        write_random_checkpoint(Path(folder) / "checkpoint", "tiny", seed=0)
        (Path(folder) / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        failed = run(jobs, Path(folder), arguments.limit)
        text = "\n".join(report(jobs, failed, Path(folder))) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


# ---- the processes


def run(jobs: Sequence[Job], folder: Path, limit: float) -> dict[Job, str]:
    """Run them all, as far as they come in `limit` seconds; the errors of those that failed."""
    failed, left, ends = {}, list(jobs), time.monotonic() + limit
    while left:
        if time.monotonic() > ends:
            return failed | dict.fromkeys(left, f"not run: no time was left of {limit:g} s")
        said = in_one_set(left, folder, ends)
        undone = [job for job in left if not made(job, folder)]
        if undone:
            failed[undone[0]] = said
        left = undone[1:]
    return failed


def in_one_set(jobs: Sequence[Job], folder: Path, ends: float) -> str:
    """Ranks that run these jobs one after the other, until one fails or the clock is at `ends`; what they have said."""
    given = [asdict(Job(job.name, job.dtype, port)) for job, port in zip(jobs, free_ports(len(jobs)), strict=True)]
    (folder / "jobs.json").write_text(json.dumps(given))
    logs = [folder / f"{rank}.log" for rank in range(RANKS)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, __file__, "--rank", str(rank), "--folder", str(folder)]
            with log.open("w") as file:
                processes.append(subprocess.Popen(command, stdout=file, stderr=file))
        while any(process.poll() is None for process in processes) and time.monotonic() < ends:
            time.sleep(0.1)
            if any(process.poll() for process in processes):  # the others are ended by their watch
                ends = min(ends, time.monotonic() + 90)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return " / ".join(f"rank {rank}: {last_lines(log.read_text())}" for rank, log in enumerate(logs))


def last_lines(text: str) -> str:
    return " ".join(" ".join(text.split("\n")[-12:]).split())[-800:] or "(nothing said)"


def made(job: Job, folder: Path) -> bool:
    return all((folder / job.folder / f"{rank}.done").exists() for rank in range(1 if job.alone else RANKS))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; another process may take one in between, which is rare."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


# ---- the side of a rank


def serve(folder: Path, rank: int) -> None:
    for given in json.loads((folder / "jobs.json").read_text()):
        job = Job(**given)
        if job.alone and rank > 0:
            continue  # to the next one, where it waits for the others
        variables = {"RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": RANKS}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job.port}
        for name, value in variables.items():
            if job.alone:
                os.environ.pop(name, None)
            else:
                os.environ[name] = str(value)
        generate(job, folder)
        (folder / job.folder / f"{rank}.done").touch()


def generate(job: Job, folder: Path) -> None:
    """`ospnext generate`, which writes latents and frames under the names of the videos.

    Raises:
        SystemExit: it failed, and has said why.
    """
    sampled: list[Tensor] = []
    decode = OSPNextPipeline._decode

    def noted(pipe: OSPNextPipeline, latents: Tensor) -> Tensor | None:
        sampled.append(latents.float().cpu())
        return decode(pipe, latents)

    def write(frames: Any, path: Path, *options: float) -> None:
        torch.save({"latents": sampled[-1], "frames": torch.as_tensor(frames).float().cpu()}, path)

    given = ["--prompts", str(folder / "prompts.txt"), "--model", str(folder / "checkpoint"), "--quiet"]
    given += ["--output", str(folder / job.folder), f"dtype={DTYPES[job.dtype]}"]
    with (
        patch.object(OSPNextPipeline, "_decode", noted),
        patch.object(videos, "to_uint8", lambda frames: frames),
        patch.object(videos, "write_mp4", write),
        patch.object(videos, "require"),  # the encoder, which is not used
    ):
        if code := ospnext(["generate", *given, *SETTINGS, *RUNS[job.name][0]]):
            raise SystemExit(code)


# ---- the report


def report(jobs: Sequence[Job], failed: dict[Job, str], folder: Path) -> Iterator[str]:
    with chosen_backend(None) as where:
        said = versions(where)
    height, width, frames, steps = (word.split("=")[1] for word in SETTINGS[:4])
    yield from ("# One video across ranks", "")
    yield f"{RANKS} ranks, {said.get('device_name', where)}, backend {said['backend']}, torch {torch.__version__}."
    yield f"{len(PROMPTS)} videos of {frames} frames of {height}x{width}, {steps} steps with guidance, by a tiny model"
    yield "of random weights, compared with those of one process. Frames in 1/255; `equal` is the part of values with"
    yield "the same bits."
    rows = []
    for job in jobs:
        with_what = RUNS[job.name][1]
        other = job if with_what is None else Job(with_what, job.dtype)
        if job in failed or not made(other, folder):
            rows.append(
                [f"{job.dtype}: {job.name}", "FAILED" if job in failed else "nothing to compare with", *[""] * 4]
            )
        elif with_what is not None:
            rows.append([f"{job.dtype}: {job.name}", *compared(folder / job.folder, folder / other.folder)])
    pair = [Job(ALONE, dtype) for dtype in reversed(DTYPES)]
    if all(job in jobs and made(job, folder) for job in pair):
        rows.append([f"{ALONE}: bf16 and fp32", *compared(*(folder / job.folder for job in pair))])
    head = ["videos", "latents, largest difference", "equal", "frames, largest difference", "equal", "PSNR, dB"]
    yield from ("", *table(head, rows))
    for job, error in failed.items():
        yield from ("", f"{job.dtype}: {job.name} FAILED: {error}")


def compared(a: Path, b: Path) -> list[str]:
    latents, frames = ([together(folder, part) for folder in (a, b)] for part in ("latents", "frames"))
    mse = (frames[0] - frames[1]).double().square().mean().item()
    psnr = f"{10 * torch.tensor(1 / mse).log10().item():.1f}" if mse else "identical"
    return [*difference(*latents), *difference(*frames, scale=255), psnr]


def difference(a: Tensor, b: Tensor, scale: float = 1) -> list[str]:
    return [f"{scale * (a - b).abs().max().item():.3g}", f"{(a == b).float().mean().item():.2%}"]


def together(folder: Path, part: str) -> Tensor:
    return torch.stack([torch.load(folder / f"video_{i}.mp4", weights_only=True)[part] for i in range(len(PROMPTS))])


if __name__ == "__main__":
    main()
