"""Steps of training by ranks that share each sample and divide the parameters (FSDP2), beside one process.

    torchrun --nproc-per-node 2 benchmarks/training_across_ranks.py --out FILE
    OSPNEXT_BACKEND=reference torchrun --nproc-per-node 2 benchmarks/training_across_ranks.py      # over gloo

A tiny model of random weights, the same sample on all ranks. One process is each rank by itself; where matrix products
are in bf16, it has a shard of its own that holds everything, and the ranks only take the mean of equal gradients."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ospnext.bench.report import table
from ospnext.bench.versions import versions
from ospnext.bench.weights import random_inputs, random_state
from ospnext.bench.workload import workload
from ospnext.cli.ranks import Ranks, ranks_of_command
from ospnext.generation.backend_choice import chosen_backend
from ospnext.models import OSPNextTransformer
from ospnext.models.parallelize import divisible, share_samples
from ospnext.models.sharding import shard
from ospnext.parallel.config import legal
from ospnext.parallel.fsdp import fsdp_mesh
from ospnext.parallel.groups import SequenceParallel

WORK = workload("tiny", "96x160", 9)
STEPS, TIMEOUT = 3, 60.0


@dataclass(frozen=True)
class Trained:
    """The loss of each step, and what all of them add to the parameters."""

    losses: list[float]
    changes: dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with ranks_of_command() as ranks, chosen_backend(None) as kind:
        if ranks.world is None:
            parser.error("start this with torchrun --nproc-per-node 2, or more: see the top of the file")
        where = ranks.device(kind)
        with ranks.in_step():
            ranks.agree({}, where)
        with ranks.watched(TIMEOUT):
            text = "\n".join(report(ranks, where)) + "\n"
            ranks.wait_for_all()
    ranks.say(text)
    if ranks.first and arguments.out:
        arguments.out.write_text(text)


def report(ranks: Ranks, where: torch.device) -> Iterator[str]:
    said, world = versions(where), ranks.world or 1
    yield from ("# Training across ranks", "")
    yield f"{world} ranks, {said.get('device_name', where)}, backend {said['backend']}, torch {torch.__version__}."
    yield f"{STEPS} steps of SGD with momentum, parameters in fp32, blocks checkpointed on the ranks. Relative"
    yield "differences: the largest of a loss, and of what steps change in a parameter, each as a whole."
    one = trained(None, None, 1, where)
    alone = trained(None, torch.bfloat16, world, where)
    rows = [["one process: bf16 and fp32", *off(alone, one)]]
    for layout in legal(divisible(WORK.config), world):
        if layout.sequence == world:
            mesh = ranks.mesh(layout, where, TIMEOUT, "plain")
            assert mesh is not None
            name = f"ssp {layout.ssp}, ulysses {layout.ulysses}"
            rows.append([f"fp32: {name}", *off(trained(mesh.sequence, torch.float32, 1, where), one)])
            found = trained(mesh.sequence, torch.bfloat16, 1, where)
            rows += [[f"bf16: {name}", *off(found, alone)], [f"bf16: {name}, and fp32", *off(found, one)]]
    yield from ("", *table(["steps", "losses", "changes"], rows))


def trained(
    sequence: SequenceParallel | None, param_dtype: torch.dtype | None, replicas: int, where: torch.device
) -> Trained:
    """Of a model that ranks share; with `sequence` None each by itself. It is divided among ranks unless `param_dtype`
    is None, or among one where there are as many replicas."""
    with torch.device("meta"):
        model = OSPNextTransformer(WORK.config)
    start = random_state(WORK.config, where, torch.float32)
    model.load_state_dict({name: values.clone() for name, values in start.items()}, assign=True)
    if param_dtype is not None:
        share_samples(model, sequence)
        shard(model, fsdp_mesh(where.type, TIMEOUT, replicas=replicas), param_dtype=param_dtype)
        model.gradient_checkpointing = True
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    losses = []
    for step in range(STEPS):
        inputs = random_inputs(WORK, where, torch.float32, seed=step)
        target = random_inputs(WORK, where, torch.float32, seed=1000 + step).latents_BCTHW
        velocity = model(inputs.latents_BCTHW, inputs.timestep_B, inputs.text_BLC)
        loss = (velocity - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(losses, {name: whole(values.detach()) - start[name] for name, values in model.named_parameters()})


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def off(found: Trained, expected: Trained) -> list[str]:
    losses = max(abs(a - b) / abs(b) for a, b in zip(found.losses, expected.losses, strict=True))
    changes = max(
        ((t - expected.changes[n]).norm() / expected.changes[n].norm()).item() for n, t in found.changes.items()
    )
    return [f"{losses:.1e}", f"{changes:.1e}"]


if __name__ == "__main__":
    main()
