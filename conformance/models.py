"""Whole models on the backend under test against the fp64 oracle: each block by itself, the forward, the gradients of
every parameter, and four steps of sampling.

Weights and inputs are random, made on the CPU and rounded to the dtype under test; the oracle takes the rounded values.
The yardstick is the oracle's formulas with every intermediate in that dtype. Both run on the CPU, without ospnext.ops.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ospnext import ops
from ospnext.diffusion import FlowMatchSchedule, make_solver
from ospnext.models import OSPNextTransformer, TransformerConfig
from ospnext.models.layout import block_orders
from ospnext.models.loading import parameter_dtype
from ospnext.ops.contracts.attention import DTYPES
from ospnext.ops.tolerance import Verdict, factor_of, judge
from ospnext.sparse import skiparse_plan

from . import oracle_sparse
from .check import Check, Target
from .oracle_dense import Weights, embed_patches, embed_text, embed_time, named_weights

#: Small, with heads as wide as a kernel may ask for. Blocks: full, full, token, group, token, group, full, full.
SPARSE = TransformerConfig(
    dim=64,
    ffn_dim=96,
    num_heads=2,
    num_layers=8,
    freq_dim=16,
    text_dim=24,
    text_len=13,
    in_dim=5,
    out_dim=5,
    skiparse_model_type="dual_end",
    sparse_ratio=2,
    num_full_blocks=4,
)
CONFIGS = {
    "dual_end-k2": SPARSE,
    "dual_end-k3": SPARSE.replace(sparse_ratio=3),
    "full": SPARSE.replace(num_layers=2, skiparse_model_type="full", sparse_ratio=1, num_full_blocks=0),
}
#: Tokens. Neither side is a multiple of k^2: subsequences differ in length, and the oracle has pads to ignore. Nor is
#: the switch its own inverse, as it is on (2, 7, 9) with k = 2: taken the wrong way round it must not go unnoticed.
BATCH, GRID = 2, (2, 7, 10)
STEPS = 4

#: On top of the factor for gradients, since each passes through several layers, and those of queries and keys nearly
#: cancel: a few roundings on the way decide whose error is the larger. Worst ratio with 1 here, over 10 seeds, both
#: sparse shapes and both kernels of the reference backend: 2.5 in fp32 (flash; 1.9 by the plain formulas), 0.9 in bf16.
#: Gradients that are zero but for rounding need no floor of their own: the yardstick's rounding is one.
ACCUMULATION = {torch.float32: 4.0, torch.bfloat16: 1.5}

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """A model and its inputs: all that follows from a shape, a dtype and a seed."""

    config: TransformerConfig
    dtype: torch.dtype
    seed: int = 0

    @property
    def kinds(self) -> list[str]:
        """By the oracle, which does not read the model's own block layout."""
        layers = self.config.num_layers
        return (
            oracle_sparse.block_kinds(layers, self.config.num_full_blocks) if self.config.sparse else ["full"] * layers
        )


Measure = Callable[[Subject, Target], Mapping[str, Verdict]]


def checks() -> Iterator[Check]:
    for name, tag, measures in (
        ("dual_end-k2", "fp32", (blocks, backward, sampling)),
        ("dual_end-k2", "bf16", (blocks, backward, sampling)),
        ("dual_end-k3", "fp32", (blocks,)),
        ("full", "fp32", (blocks,)),
    ):
        for measure in measures:
            yield Check(
                id=f"model/required/{name}-{tag}-{measure.__name__}",
                level="required",
                run=functools.partial(measure, Subject(CONFIGS[name], DTYPES[tag])),
                group=f"model/{name}",
            )


# ---- what is run on the backend under test
# ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def blocks(subject: Subject, target: Target) -> Mapping[str, Verdict]:
    """Each block fed with the oracle's stream, so that the first wrong one is told from those after it; then the whole
    forward, which adds the embeddings and the head.
    """
    verdicts, forced = {}, forced_blocks(subject)
    with ops.use_backend(target.backend, fallback=()):
        model = model_under_test(subject, target)
        latents, timestep, text = (t.to(target.device) for t in random_inputs(subject))
        time_B6C, embedded_text = forced.time_B6C.to(model.blocks[0].modulation), forced.text_BLC.to(target.device)
        rasters = stream_orders(subject)
        for index, (block, plan) in enumerate(zip(model.blocks, model.layout(GRID, BATCH).blocks, strict=True)):
            x_BNC = forced.inputs[index][:, rasters[index]].to(target.device)
            found = block(x_BNC, time_B6C, block.cross_attn.project_text(embedded_text), plan).cpu()
            raster_BNC = torch.empty_like(found)
            raster_BNC[:, rasters[index + 1]] = found
            expected = forced.oracles[index], forced.yardsticks[index]
            verdicts[f"block{index}-{subject.kinds[index]}"] = judge(raster_BNC, *expected)
        found = model(latents, timestep, text)
    # The velocity of a bf16 model is fp32, but of values that bf16 holds: going back loses nothing, and brings the
    # bounds of the dtype that was computed in.
    verdicts["velocity"] = judge(found.to(subject.dtype), *both(expected_velocity, subject))
    return verdicts


def backward(subject: Subject, target: Target) -> Mapping[str, Verdict]:
    """Gradients of a random projection of the velocity: of every parameter, the latents and the text."""
    with ops.use_backend(target.backend, fallback=()):
        model = model_under_test(subject, target)
        latents, timestep, text = (t.to(target.device) for t in random_inputs(subject))
        found = gradients(dict(model.named_parameters()), model, latents, timestep, text)
    oracle, yardstick = both(expected_gradients, subject)
    factor = ACCUMULATION[subject.dtype] * factor_of("d")
    # Parameters that stay fp32 in a bf16 model have fp32 gradients, computed from bf16 ones: bounds are those of bf16.
    return {
        f"d{name}": judge(value.to(subject.dtype), oracle[name], yardstick[name], factor)
        for name, value in found.items()
    }


@torch.no_grad()
def sampling(subject: Subject, target: Target) -> Mapping[str, Verdict]:
    """Euler steps from noise, each from where the last one ended; latents are fp32 throughout."""
    noise, _, text = random_inputs(subject)
    sigmas = FlowMatchSchedule().sigmas(STEPS)
    solver, found = make_solver("euler", sigmas), [noise.float().to(target.device)]
    with ops.use_backend(target.backend, fallback=()):
        model = model_under_test(subject, target)
        context = model.encode_text(text.to(target.device))
        for step, timestep in enumerate(FlowMatchSchedule.timesteps(sigmas)[:-1]):
            velocity = model(found[-1], timestep.expand(BATCH).to(target.device), context)
            found.append(solver.step(step, velocity, found[-1]))
    expected = zip(found[1:], *both(expected_samples, subject), strict=True)
    return {f"latents{step}": judge(*triple) for step, triple in enumerate(expected, start=1)}


def model_under_test(subject: Subject, target: Target) -> OSPNextTransformer:
    """As the loader makes it, some parameters of a bf16 model in fp32. To be called under the policy of the check: a
    model binds its operators when it is made.
    """
    model = OSPNextTransformer(subject.config)
    weights = random_weights(subject).items()
    state = {name: value.to(target.device, parameter_dtype(name, subject.dtype)) for name, value in weights}
    model.load_state_dict(state, assign=True)
    return model


def stream_orders(subject: Subject) -> list[Tensor]:
    """Raster indices [N] of the stream before each block and after the last."""
    plan = skiparse_plan(GRID, subject.config.sparse_ratio)
    orders = [plan.order(kind).raster for kind in block_orders(subject.config.block_kinds)]
    return [*orders, orders[-1]]


# ---- weights, inputs and what is expected of them: on the CPU, kept for the checks that share them
# ------------------------------------------------------------------------------------------------------


@functools.cache
def random_weights(subject: Subject) -> dict[str, Tensor]:
    """Every parameter random and far from what initialisation would give it: no zero head, no unit norm weight.

    Matrices have variance 1 / fan_in, so that signals keep their size and an error anywhere reaches the output. Queries
    and keys are long, so that attention is sharp: a mean over all tokens would hide a wrong rotation in bf16.
    """
    generator = torch.Generator().manual_seed(subject.seed)
    weights = {}
    for name, parameter in OSPNextTransformer(subject.config).named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            values = 2 + 0.6 * values
        elif name.endswith("norm3.weight"):
            values = 1 + 0.3 * values
        elif parameter.ndim > 1 and not name.endswith("modulation"):
            values = values / parameter[0].numel() ** 0.5
        else:
            values = 0.3 * values
        weights[name] = values.to(subject.dtype)
    return weights


@functools.cache
def random_inputs(subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, timestep, text); the timestep is fp32 as in sampling, and each sample has its own."""
    generator = torch.Generator().manual_seed(subject.seed + 1)
    config, (t, h, w), (_, ph, pw) = subject.config, GRID, subject.config.patch_size
    latents = torch.randn(BATCH, config.in_dim, t, h * ph, w * pw, generator=generator)
    text = torch.randn(BATCH, config.text_len, config.text_dim, generator=generator)
    return latents.to(subject.dtype), 1000 * torch.rand(BATCH, generator=generator), text.to(subject.dtype)


@dataclass(frozen=True, eq=False)
class ForcedBlocks:
    """What every block is given, in the dtype under test and in raster order [B, N, C], and what it must return."""

    time_B6C: Tensor
    text_BLC: Tensor
    inputs: list[Tensor]
    oracles: list[Tensor]
    yardsticks: list[Tensor]


@functools.cache
@torch.no_grad()
def forced_blocks(subject: Subject) -> ForcedBlocks:
    exact, rounded = both(weights_in, subject)
    latents, timestep, text = (t.double() for t in random_inputs(subject))
    time_B6C, text_BLC = (t.to(subject.dtype) for t in (embed_time(exact, timestep)[1], embed_text(exact, text)))
    x_BTHWC = embed_patches(exact, latents)
    forced = ForcedBlocks(time_B6C, text_BLC, [], [], [])
    for index, kind in enumerate(subject.kinds):
        given = [t.to(subject.dtype) for t in (x_BTHWC, time_B6C, text_BLC)]
        yardstick = oracle_sparse.raster_block(rounded, index, kind, *given, subject.config.sparse_ratio)
        x_BTHWC = oracle_sparse.raster_block(
            exact, index, kind, *(t.double() for t in given), subject.config.sparse_ratio
        )
        for kept, value in zip(
            (forced.inputs, forced.oracles, forced.yardsticks), (given[0], x_BTHWC, yardstick), strict=True
        ):
            kept.append(value.flatten(1, 3))
    return forced


@functools.cache
def weights_in(subject: Subject, dtype: torch.dtype) -> Weights:
    tensors = {name: value.to(dtype) for name, value in random_weights(subject).items()}
    return named_weights(tensors, subject.config)


def inputs_in(subject: Subject, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    latents, timestep, text = random_inputs(subject)
    return latents.to(dtype), timestep, text.to(dtype)


@functools.cache
@torch.no_grad()
def expected_velocity(subject: Subject, dtype: torch.dtype) -> Tensor:
    return oracle_sparse.velocity(weights_in(subject, dtype), subject.config, *inputs_in(subject, dtype))


@functools.cache
def expected_gradients(subject: Subject, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {name: value.clone().requires_grad_() for name, value in weights_in(subject, dtype).tensors.items()}
    forward = functools.partial(oracle_sparse.velocity, named_weights(tensors, subject.config), subject.config)
    return gradients(tensors, forward, *inputs_in(subject, dtype))


def gradients(
    parameters: Mapping[str, Tensor], forward: Callable[..., Tensor], latents: Tensor, timestep: Tensor, text: Tensor
) -> dict[str, Tensor]:
    """Of a random projection of the velocity, whose coefficients every dtype can hold."""
    leaves = {"latents": latents.clone().requires_grad_(), "text": text.clone().requires_grad_(), **parameters}
    velocity = forward(leaves["latents"], timestep, leaves["text"])
    probe = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(velocity)
    return dict(zip(leaves, torch.autograd.grad(velocity, list(leaves.values()), probe), strict=True))


@functools.cache
@torch.no_grad()
def expected_samples(subject: Subject, dtype: torch.dtype) -> list[Tensor]:
    """Latents after each step; the yardstick rounds them before the model alone, and keeps them in fp32 itself."""
    weights, (noise, _, text) = weights_in(subject, dtype), inputs_in(subject, dtype)
    sigmas = FlowMatchSchedule().sigmas(STEPS).tolist()
    samples = [noise.to(torch.promote_types(dtype, torch.float32))]
    for now, following in itertools.pairwise(sigmas):
        timestep = torch.full((BATCH,), 1000 * now, dtype=torch.float64)
        velocity = oracle_sparse.velocity(weights, subject.config, samples[-1].to(dtype), timestep, text)
        samples.append(samples[-1] + (following - now) * velocity)
    return samples[1:]


def both(expected: Callable[[Subject, torch.dtype], T], subject: Subject) -> tuple[T, T]:
    """(oracle, yardstick): the same formulas in fp64 and in the dtype under test."""
    return expected(subject, torch.float64), expected(subject, subject.dtype)
