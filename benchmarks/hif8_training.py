"""A tiny OSP-Next learns a small set of clips by flow matching, in bf16 and in HiF8, from the same start on the same
batches: loss curves, their ends, and how the gradients agree.

    python benchmarks/hif8_training.py --out benchmarks/results

Writes hif8_training.csv and hif8_training.md. Models compute in bf16; AdamW moves fp32 copies of the parameters, which
are rounded to bf16 after each step, as usual in mixed precision."""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ospnext.models import OSPNextTransformer, TransformerConfig
from ospnext.models.quantization import QuantPolicy, quantize_model

CONFIG = TransformerConfig(
    dim=96, ffn_dim=256, num_heads=4, num_layers=2, freq_dim=64, text_dim=32, text_len=8, in_dim=8, out_dim=8,
    skiparse_model_type="dual_end", sparse_ratio=2, num_full_blocks=0,
)  # fmt: skip
GRID, CLIPS, BATCH = (2, 6, 8), 16, 8
STEPS, SEEDS, LEARNING_RATE = 200, (0, 1, 2), 3e-3
#: Steps whose mean loss stands for the begin and the end of a curve.
WINDOW = 20
#: fp32 is there to tell what chance does: how far two curves drift apart without any HiF8.
RUNS = {
    "bf16": (QuantPolicy(), torch.bfloat16),
    "fp32": (QuantPolicy(), torch.float32),
    "hif8": (QuantPolicy("hif8"), torch.bfloat16),
    "hif8+attention": (QuantPolicy("hif8", "hif8"), torch.bfloat16),
}


class Clips:
    """Clips of one colour, each with its text. A batch is mixed with noise, (1 - share) clip + share noise, and its
    velocity is noise - clip. Only attention, to the other tokens or to the text, can tell the colour from the noise.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        t, h, w = GRID
        colours = torch.randn(CLIPS, CONFIG.in_dim, 1, 1, 1, generator=generator)
        self.clips = colours.expand(-1, -1, t, 2 * h, 2 * w)
        self.texts = torch.randn(CLIPS, CONFIG.text_len, CONFIG.text_dim, generator=generator)
        self.seed = seed

    def batch(self, step: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """(latents, timestep, text), velocity: the same for every model."""
        generator = torch.Generator().manual_seed(self.seed * 100_000 + step)
        chosen = torch.randint(CLIPS, (BATCH,), generator=generator)
        clips, share = self.clips[chosen], torch.rand(BATCH, generator=generator)
        noise = torch.randn(clips.shape, generator=generator)
        mixed = torch.lerp(clips, noise, share[:, None, None, None, None])
        return (mixed, share * 1000, self.texts[chosen]), noise - clips


def loss_of(model: OSPNextTransformer, clips: Clips, step: int) -> Tensor:
    inputs, velocity = clips.batch(step)
    return F.mse_loss(model(*inputs), velocity.to(torch.float64 if model.dtype == torch.float64 else torch.float32))


def fresh(seed: int, dtype: torch.dtype) -> OSPNextTransformer:
    """Wan's start, but for the head: from zero, all other gradients of the first step would be zero too."""
    model, generator = OSPNextTransformer(CONFIG), torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        model.head.head.weight.normal_(std=0.02, generator=generator)
    return model.to(torch.bfloat16).to(dtype)


def train(policy: QuantPolicy, dtype: torch.dtype, seed: int) -> tuple[list[float], OSPNextTransformer]:
    model, clips = quantize_model(fresh(seed, dtype), policy), Clips(seed)
    masters = [p.detach().float().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, clips, step)
        loss.backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
    return losses, model


@torch.no_grad()
def without_blocks(model: OSPNextTransformer, seed: int) -> tuple[float, float]:
    """Mean loss on fresh batches, of the model and with blocks that do nothing: what quantized layers are there for."""
    clips, steps = Clips(seed), range(STEPS, STEPS + WINDOW)
    whole = statistics.mean(loss_of(model, clips, step).item() for step in steps)

    def skip(block, given, out):
        x, plan = given[0], given[3]
        return x if plan.switch is None else x[:, plan.switch]

    handles = [block.register_forward_hook(skip) for block in model.blocks]
    skipped = statistics.mean(loss_of(model, clips, step).item() for step in steps)
    for handle in handles:
        handle.remove()
    return whole, skipped


def gradients(state: dict[str, Tensor], policy: QuantPolicy, seed: int, step: int, dtype: torch.dtype) -> Tensor:
    """Those of the weights that HiF8 quantizes, in one vector, of a model with these parameters."""
    model = OSPNextTransformer(CONFIG)
    model.load_state_dict(state)
    model = quantize_model(model.to(dtype), policy)
    names = RUNS["hif8"][0].linear_names(CONFIG.num_layers)
    weights = [model.get_parameter(f"{name}.weight") for name in names]
    found = torch.autograd.grad(loss_of(model, Clips(seed), step), weights)
    return torch.cat([g.double().flatten() for g in found])


def cosines(state: dict[str, Tensor], seed: int, step: int) -> dict[str, float]:
    """Of gradients with those of the plain model in fp64."""
    exact = gradients(state, QuantPolicy(), seed, step, torch.float64)
    return {
        name: F.cosine_similarity(gradients(state, policy, seed, step, dtype), exact, dim=0).item()
        for name, (policy, dtype) in RUNS.items()
    }


def summary(
    curves: dict[tuple[str, int], list[float]],
    at_first: list[dict[str, float]],
    at_last: list[dict[str, float]],
    ablation: list[tuple[float, float]],
    took: float,
) -> str:
    whole, skipped = (statistics.mean(column) for column in zip(*ablation, strict=True))
    lines = [
        "# Training in HiF8",
        "",
        f"A model of {CONFIG.num_layers} sparse blocks and {CONFIG.dim} channels learns {CLIPS} clips of one colour,",
        f"{GRID[0] * GRID[1] * GRID[2]} tokens, by flow matching: {STEPS} steps of AdamW at {LEARNING_RATE:g}, batch",
        f"{BATCH}, same start and batches for all, {len(SEEDS)} seeds. Losses are means of the first and last",
        f"{WINDOW} steps.",
        f"Reference backend on a CPU, torch {torch.__version__}, {took:.0f} s. Curves: hif8_training.csv.",
        "",
        "| | seed | first step | first steps | last steps | of bf16 | gradient, step 0 | gradient, end |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in RUNS:
        rows = []
        for i, seed in enumerate(SEEDS):
            curve, end = curves[name, seed], statistics.mean(curves[name, seed][-WINDOW:])
            rows.append(
                (
                    curve[0],
                    statistics.mean(curve[:WINDOW]),
                    end,
                    end / statistics.mean(curves["bf16", seed][-WINDOW:]),
                    at_first[i][name],
                    at_last[i][name],
                )
            )
            lines.append(f"| {name} | {seed} | {' | '.join(f'{value:.4f}' for value in rows[-1])} |")
        means = (statistics.mean(column) for column in zip(*rows, strict=True))
        lines.append(f"| {name} | mean | {' | '.join(f'{value:.4f}' for value in means)} |")
    lines += [
        "",
        "The gradient columns are cosines with the gradient of the plain model in fp64, of the quantized weights and",
        "on one batch: with the first parameters, and with those at which the bf16 run ended.",
        "",
        "Later on curves drift apart by chance, as that of fp32 does from that of bf16: compare the ratios of HiF8",
        "with those. So few seeds cannot tell some percent from chance.",
        "",
        "That the quantized blocks matter: with blocks that do nothing, the loss of the trained bf16 models on fresh",
        f"batches is {skipped:.2f} instead of {whole:.2f}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    folder = parser.parse_args().out
    torch.set_num_threads(1)  # matrices are small
    started = time.perf_counter()
    curves, at_first, at_last, ablation = {}, [], [], []
    for seed in SEEDS:
        at_first.append(cosines(fresh(seed, torch.bfloat16).state_dict(), seed, 0))
        for name, (policy, dtype) in RUNS.items():
            curves[name, seed], model = train(policy, dtype, seed)
            if name == "bf16":
                ablation.append(without_blocks(model, seed))
                at_last.append(cosines(model.state_dict(), seed, STEPS))
    text = summary(curves, at_first, at_last, ablation, time.perf_counter() - started)
    print(text)
    (folder / "hif8_training.md").write_text(text + "\n")
    with (folder / "hif8_training.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *(f"{name} seed {seed}" for name in RUNS for seed in SEEDS)])
        for step in range(STEPS):
            losses = (curves[name, seed][step] for name in RUNS for seed in SEEDS)
            writer.writerow([step, *(f"{loss:.5f}" for loss in losses)])


if __name__ == "__main__":
    main()
