"""Training steps of a sharded model on 4 ranks, in every layout of them, and of one process; both from one script.

    python tests/parallel_training.py FOLDER      writes FOLDER/results.json

Ranks are forked from a process that has imported everything and knows what one process finds. Everything is in fp64, so
that a difference is a mistake and no rounding; the one case of mixed precision is compared bit for bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from parallel_loading import loaded, memory, write_checkpoints
from small_models import SMALL, random_inputs, random_model, sparse
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ospnext.errors import CheckpointError, ConfigError
from ospnext.models import OSPNextTransformer, QuantPolicy, quantize_model
from ospnext.models.loading import parameter_dtype
from ospnext.models.parallelize import share_samples
from ospnext.models.sharding import shard
from ospnext.ops import use_backend
from ospnext.ops.collective import all_gather, count_bytes
from ospnext.parallel import training_state
from ospnext.parallel.config import ParallelConfig
from ospnext.parallel.fsdp import fsdp_mesh
from ospnext.parallel.mesh import Mesh, make_mesh
from ospnext.parallel.training_state import load_training_state, save_training_state

WORLD, STEPS, TIMEOUT = 4, 3, 120.0
CONFIG = sparse(SMALL.replace(dim=48, num_heads=4, ffn_dim=50, num_layers=4, out_dim=5), num_full_blocks=0)
GRID = (2, 5, 6)
LAYOUTS = ((1, 4, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1))
#: (dp, ssp, ulysses) that writes a checkpoint after the first step, and those that go on from it.
SAVED, RESUMED = (2, 2, 1), ((4, 1, 1), (1, 4, 1))


@dataclass(frozen=True)
class Case:
    dp: int
    ssp: int
    ulysses: int
    optimizer: str = "sgd"
    quant: bool = False
    checkpointing: bool = False
    #: What is wrong on purpose.
    mutant: str = ""

    @property
    def name(self) -> str:
        words = [f"dp{self.dp}-ssp{self.ssp}-ulysses{self.ulysses}", self.optimizer]
        words += ["hif8"] * self.quant + ["checkpointing"] * self.checkpointing + [self.mutant] * bool(self.mutant)
        return "-".join(words)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(dp=self.dp, ssp=self.ssp, ulysses=self.ulysses)

    @property
    def reference(self) -> str:
        return f"{self.optimizer}-{self.quant}-{self.samples}"

    @property
    def samples(self) -> int:
        """Of a step, by all ranks together: more than one for a replica, or another one for each."""
        return max(2, self.dp)


CASES = (
    *(Case(*layout) for layout in LAYOUTS),
    *(Case(*layout, "adamw", checkpointing=True) for layout in LAYOUTS),
    Case(1, 4, 1, quant=True),
    Case(2, 1, 2, quant=True, checkpointing=True),
    Case(4, 1, 1, quant=True, checkpointing=True),
    Case(2, 2, 1, quant=True),
    Case(2, 2, 1, mutant="summed"),
    Case(4, 1, 1, mutant="one-sample-for-all"),
    Case(2, 2, 1, quant=True, mutant="own-scales"),
)


def fresh(case: Case) -> OSPNextTransformer:
    model = random_model(CONFIG)
    model.gradient_checkpointing = case.checkpointing
    return quantize_model(model, QuantPolicy(quant="hif8", quant_attn="hif8", blocks="1-2")) if case.quant else model


def optimizer_of(case: Case, model: OSPNextTransformer) -> torch.optim.Optimizer:
    """AdamW divides by the size of a gradient: with an eps of 1e-4, a difference of rounding stays one of rounding even
    where a gradient is 0.
    """
    if case.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def batch(step: int, samples: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(latents, timestep, text, target) of each sample."""
    for sample in range(samples):
        seed = 10 * step + sample
        latents, timestep, text = random_inputs(CONFIG, GRID, seed=seed)
        target = random_inputs(CONFIG.replace(in_dim=CONFIG.out_dim), GRID, seed=1000 + seed)[0]
        yield latents, timestep, text, target


def train(
    model: OSPNextTransformer,
    optimizer: torch.optim.Optimizer,
    steps: range,
    of_step: int,
    replica: int = 0,
    replicas: int = 1,
) -> list[float]:
    """The mean loss of each step. Samples go through one by one, so that quantization sees each alone in any layout."""
    losses = []
    for step in steps:
        first = replica * of_step // replicas
        samples = list(batch(step, of_step))[first : first + max(1, of_step // replicas)]
        total = torch.zeros((), dtype=torch.float64)
        for number, (latents, timestep, text, target) in enumerate(samples, 1):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(number == len(samples))
            loss = (model(latents, timestep, text) - target).square().mean() / len(samples)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(_mean(total).item())
    return losses


def _mean(t: Tensor) -> Tensor:
    return all_gather(t[None]).mean(0)


def parameters(model: OSPNextTransformer) -> dict[str, Tensor]:
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


# ---- one process


def alone() -> dict[str, Any]:
    """By reference: losses and parameters."""
    found = {}
    for case in CASES:
        if case.reference not in found:
            model = fresh(case)
            losses = train(model, optimizer_of(case, model), range(STEPS), case.samples)
            found[case.reference] = losses, parameters(model)
    return found


# ---- ranks


def sharded(case: Case, mesh: Mesh, replicas: int = 1) -> OSPNextTransformer:
    model = fresh(case)
    share_samples(model, mesh.sequence, share_scales=case.mutant != "own-scales")
    shard(model, fsdp_mesh("cpu", TIMEOUT, replicas=replicas))
    if case.mutant == "summed":
        model.set_gradient_divide_factor(1.0)  # type: ignore[operator]
    return model


def trained(case: Case, mesh: Mesh, reference: tuple[list[float], dict[str, Tensor]]) -> dict[str, Any]:
    model = sharded(case, mesh)
    replica = 0 if case.mutant == "one-sample-for-all" else mesh.place.dp
    steps = range({"": STEPS, "own-scales": 1}.get(case.mutant, 2))  # the second loss tells of the first step
    with count_bytes() as counted:
        losses = train(model, optimizer_of(case, model), steps, case.samples, replica, case.dp)
    return {
        "losses": [abs(losses[step] - reference[0][step]) / reference[0][step] for step in steps],
        "parameters": {} if case.mutant else off(parameters(model), reference[1]),
        "exchanges": counted.total_calls("all_to_all"),
        "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
    }


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((t - wanted[name]).norm() / wanted[name].norm()).item() for name, t in found.items()}


def mixed_precision(mesh: Mesh) -> dict[str, Any]:
    """All ranks compute one sample, by parameters kept in fp32 and computed with in bf16: forward and gradients are
    those of one process whose model is in bf16, but for what it keeps in fp32.
    """
    model, expected = random_model(CONFIG, dtype=torch.float32), random_model(CONFIG, dtype=torch.float32)
    for name, parameter in expected.named_parameters():
        parameter.data = parameter.data.to(parameter_dtype(name, torch.bfloat16))
    shard(model, fsdp_mesh("cpu", TIMEOUT, replicas=2), param_dtype=torch.bfloat16)
    latents, timestep, text = random_inputs(CONFIG, GRID, dtype=torch.float32)
    seen: dict[str, str] = {}
    hook = model.blocks[0].register_forward_pre_hook(
        lambda block, given: seen.update(
            {n: str(p.dtype) for n, p in block.named_parameters()}, x=str(given[0].dtype), time=str(given[1].dtype)
        )
    )
    velocities = [m(latents, timestep, text) for m in (model, expected)]
    hook.remove()
    for velocity in velocities:
        velocity.square().sum().backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return {
        "velocity": torch.equal(*velocities),
        "gradients": off(gradients, {name: p.grad.float() for name, p in expected.named_parameters()}),
        "dtypes": seen,
        "stored": sorted({str(p.dtype) for p in model.parameters()} | {str(p.grad.dtype) for p in model.parameters()}),
    }


def encoded_text(mesh: Mesh, reference: OSPNextTransformer) -> dict[str, Any]:
    """Text that was encoded before, in a call of its own; then a forward without gradients."""
    model = sharded(Case(4, 1, 1), mesh)
    latents, timestep, text, _ = next(batch(0, 1))
    for one in (model, reference):
        one.zero_grad()
        one(latents, timestep, one.encode_text(text)).square().sum().backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        equal = torch.equal(model(latents, timestep, model.encode_text(text)), reference(latents, timestep, text))
    return {
        "gradients": off(gradients, {name: p.grad for name, p in reference.named_parameters()}),
        "velocity": equal,
        "sharded after": all(hasattr(p, "full_tensor") for p in model.parameters()),
    }


def resumed(folder: Path, meshes: dict[tuple[int, int, int], Mesh]) -> dict[str, Any]:
    """Losses after a checkpoint of SAVED: of RESUMED layouts, and of SAVED if it goes on itself."""
    found = {}
    case = Case(*SAVED, "adamw")
    model = sharded(case, meshes[SAVED], replicas=2)
    optimizer = optimizer_of(case, model)
    train(model, optimizer, range(1), 2, meshes[SAVED].place.dp, case.dp)
    training_state.FILE_BYTES = 200_000  # several files for each rank
    save_training_state(folder / "state", model, optimizer, progress={"step": 1})
    found["uninterrupted"] = train(model, optimizer, range(1, STEPS), 2, meshes[SAVED].place.dp, case.dp)
    for layout in RESUMED:
        case = Case(*layout, "adamw")
        model = sharded(case, meshes[layout])
        optimizer = optimizer_of(case, model)
        for group in optimizer.param_groups:
            group["lr"] = 123.0  # the checkpoint says better
        step = load_training_state(folder / "state", model, optimizer)["step"]
        found["-".join(map(str, layout))] = train(
            model, optimizer, range(step, STEPS), 2, meshes[layout].place.dp, case.dp
        )
    return found


def one_rank_fails(folder: Path, mesh: Mesh) -> dict[str, Any]:
    """What every rank is told when one of them cannot write, and what is left."""
    model = sharded(Case(4, 1, 1), mesh)
    optimizer = optimizer_of(Case(4, 1, 1), model)
    write = training_state._write
    if dist.get_rank() == 2:
        training_state._write = _no_space
    told = ""
    try:
        # Within the group: the others are in the middle of writing when this rank says what happened to it.
        save_training_state(folder / "failed", model, optimizer, timeout=20.0)
    except CheckpointError as error:
        told = str(error)
    finally:
        training_state._write = write
    return {"told": told, "left": sorted(file.name for file in folder.iterdir() if "failed" in file.name)}


def refused(mesh: Mesh) -> dict[str, str]:
    """What is said of calls that are wrong; the same on every rank."""
    model, compiled = sharded(Case(4, 1, 1), mesh), fresh(Case(4, 1, 1))
    compiled.blocks[1]._compiled_call_impl = compiled.blocks[1].forward  # as `compile` does, at no cost
    before = torch.optim.SGD(fresh(Case(4, 1, 1)).parameters(), lr=0.1)
    wrong = {
        "twice": lambda: shard(model, fsdp_mesh("cpu", TIMEOUT)),
        "compiled": lambda: shard(compiled, fsdp_mesh("cpu", TIMEOUT)),
        "replicas": lambda: fsdp_mesh("cpu", TIMEOUT, replicas=3),
        "optimizer made before": lambda: save_training_state("nowhere", model, before),
        "quantized after": lambda: quantize_model(model, QuantPolicy(quant="hif8")),
    }
    said = {}
    for name, call in wrong.items():
        try:
            call()
        except (ConfigError, CheckpointError) as error:
            said[name] = str(error)
    return said


def _no_space(tensors: dict[str, Tensor], staging: Path) -> None:
    from torch.distributed.checkpoint import filesystem

    def refuse(*arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    original = filesystem.FileSystem.create_stream
    filesystem.FileSystem.create_stream = refuse  # type: ignore[assignment]
    try:
        _WRITE(tensors, staging)
    finally:
        filesystem.FileSystem.create_stream = original  # type: ignore[method-assign]


_WRITE = training_state._write


def rank_main(rank: int, folder: Path, reference: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {}
    with use_backend("reference"):
        meshes = {layout: make_mesh(Case(*layout).parallel, "cpu", TIMEOUT) for layout in LAYOUTS}
        for case in CASES:
            mesh = meshes[case.dp, case.ssp, case.ulysses]
            found[case.name] = trained(case, mesh, reference[case.reference])
        of_samples = meshes[4, 1, 1]
        found["mixed precision"] = mixed_precision(of_samples)
        found["encoded text"] = encoded_text(of_samples, random_model(CONFIG))
        found["resumed"] = resumed(folder, meshes)
        found["loaded"] = loaded(folder, fsdp_mesh("cpu", TIMEOUT, replicas=2))
        found["memory"] = memory(folder, fsdp_mesh("cpu", TIMEOUT))
        found["refused"] = refused(of_samples)
        found["one rank fails"] = one_rank_fails(folder, of_samples)
    told: list[Any] = [None] * WORLD
    dist.all_gather_object(told, found["one rank fails"])
    found["one rank fails"] = told
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with use_backend("reference"):
        reference = alone()
        write_checkpoints(folder, CONFIG)
        mp.start_processes(rank_main, (folder, reference), WORLD, start_method="fork")
        results = json.loads((folder / "results.json").read_text())
        model = fresh(Case(1, 1, 1))
        optimizer = optimizer_of(Case(1, 1, 1, "adamw"), model)
        step = load_training_state(folder / "state", model, optimizer)["step"]
        results["resumed"]["alone"] = train(model, optimizer, range(step, STEPS), 2)
        results["resumed"]["expected"] = reference[Case(*SAVED, "adamw").reference][0][1:]
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
