"""One video by two backends: the same small checkpoint with random weights, prompt and seed; pixels compared.

    python benchmarks/video_between_backends.py --backends cuda,reference --out benchmarks/results/video_cuda_h200.md
    python benchmarks/video_between_backends.py --backends reference,reference       # on a CPU: all zeros

The first backend's bf16 is held to what bf16 itself changes: the second backend's bf16 against its fp32. Random weights
make noise for a video, in which errors of rounding grow over the steps as in a real one."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ospnext.bench.report import table
from ospnext.bench.versions import versions
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models.quant_policy import QuantPolicy
from ospnext.ops.device import default_device
from ospnext.pipelines import OSPNextPipeline
from ospnext.pipelines.random_checkpoint import write_random_checkpoint

VIDEO = {"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 6}
PROMPT, NEGATIVE = "a red fox trots through fresh snow", "blurry, low quality"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMS = {"": None, "hif8": QuantPolicy(quant="hif8", quant_attn="hif8")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="cuda,reference", help="two of them (default: cuda,reference)")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    text = "\n".join(report(*arguments.backends.split(","))) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def report(one: str, other: str) -> Iterator[str]:
    videos, where = {}, []
    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder) / "checkpoint", "tiny", seed=0)
        for side, backend in enumerate((one, other)):
            with chosen_backend(backend), torch.no_grad():
                found = versions(default_device())
                where.append(f"{backend} on {found.get('device_name', default_device())}")
                for form, dtype in itertools.product(FORMS, DTYPES):
                    videos[side, form, dtype] = generate(Path(folder) / "checkpoint", form, dtype)
    height, width, frames, steps = VIDEO.values()
    yield from ("# One video by two backends", "")
    yield f"{where[0]}; {where[1]}; torch {torch.__version__}. {frames} frames of {height}x{width}, {steps} steps with"
    yield "guidance, a tiny transformer with random weights. Pixels in 1/255."
    rows = []
    for form, dtype in itertools.product(FORMS, DTYPES):
        name = " ".join(filter(None, (dtype, form)))
        rows.append([f"{name}: {one} and {other}", *compared(videos[0, form, dtype], videos[1, form, dtype])])
    for form in FORMS:
        name = " ".join(filter(None, ("bf16 and fp32", form)))
        rows.append([f"{other} alone: {name}", *compared(videos[1, form, "bf16"], videos[1, form, "fp32"])])
    rows.append([f"{other} alone: fp32 hif8 and fp32", *compared(videos[1, "hif8", "fp32"], videos[1, "", "fp32"])])
    yield from ("", *table(["videos", "mean difference", "largest", "PSNR, dB"], rows))


def generate(checkpoint: Path, form: str, dtype: str) -> Tensor:
    """Frames [T, 3, H, W] fp32 in 0..1, on the CPU."""
    policy = FORMS[form]
    pipe = OSPNextPipeline.from_pretrained(checkpoint, dtype=DTYPES[dtype], device=default_device(), quant=policy)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    frames = pipe(PROMPT, NEGATIVE, generator=generator, output_type="pt", **VIDEO).frames
    return frames[0].float().cpu()


def compared(a: Tensor, b: Tensor) -> list[str]:
    error = (a - b).double().abs()
    mse = error.square().mean().item()
    psnr = f"{10 * torch.tensor(1 / mse).log10().item():.1f}" if mse else "identical"
    return [f"{255 * error.mean().item():.3g}", f"{255 * error.max().item():.3g}", psnr]


if __name__ == "__main__":
    main()
