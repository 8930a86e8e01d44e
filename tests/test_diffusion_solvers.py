"""Solvers against diffusers, against known solutions, and guidance against fp64."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from ospnext.diffusion import SOLVERS, FlowMatchSchedule, guide, make_solver, needs_guidance
from ospnext.errors import ConfigError, MissingDependencyError, OSPNextError

FP32_ULP = 2.0**-24
SHAPE = (2, 4, 3, 6, 5)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(name, sigmas, latents, velocity_at):
    solver = make_solver(name, sigmas)
    for i in range(len(sigmas) - 1):
        latents = solver.step(i, velocity_at(i, latents), latents)
    return latents


@pytest.mark.parametrize("shift", [1.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_euler_is_diffusers_euler(shift, num_steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    velocities = randn(num_steps, *SHAPE, seed=1)
    start = randn(*SHAPE, seed=0)
    ours = run("euler", FlowMatchSchedule(shift=shift).sigmas(num_steps), start, lambda i, _: velocities[i])

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    theirs = start
    for velocity, timestep in zip(velocities, scheduler.timesteps, strict=True):
        theirs = scheduler.step(velocity, timestep, theirs).prev_sample

    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    deltas = (shift * u / (1 + (shift - 1) * u)).diff()
    exact = start.double() + (deltas.view(-1, 1, 1, 1, 1, 1) * velocities.double()).sum(0)
    # The yardstick is diffusers' own fp32 error; at one step both may be exact up to the last rounding.
    error = (ours.double() - exact).abs().max()
    yardstick = (theirs.double() - exact).abs().max()
    assert error <= 2 * yardstick + FP32_ULP * exact.abs().max()
    assert yardstick < 1e-5  # they solve the same problem


def test_euler_step_is_bitwise_diffusers_euler_step_on_the_same_sigmas():
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = FlowMatchSchedule(shift=7.0).sigmas(50)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigmas[:-1].numpy())
    assert torch.equal(scheduler.sigmas, sigmas)
    latents, velocity = randn(*SHAPE, seed=0), randn(*SHAPE, seed=1)
    for i in (0, 1, 30, 49):
        scheduler.set_begin_index(i)
        scheduler._step_index = None
        theirs = scheduler.step(velocity, scheduler.timesteps[i], latents).prev_sample
        assert torch.equal(make_solver("euler", sigmas).step(i, velocity, latents), theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
def test_unipc_is_diffusers_unipc(shift, num_steps):
    """diffusers shifts the sigmas itself and finds its steps by timestep; we hand it shifted ones and count."""
    from diffusers import UniPCMultistepScheduler

    velocities = randn(num_steps, *SHAPE, seed=1)
    start = randn(*SHAPE, seed=0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_steps + 1)[:-1])

    sigmas = FlowMatchSchedule(shift=shift).sigmas(num_steps)
    # All but the first are one and the same fp32 number, so the steps can be compared bit by bit.
    assert torch.equal(scheduler.sigmas[1:], sigmas[1:])
    assert scheduler.sigmas[0] == np.float32(1 - 1e-6)

    ours = theirs = start
    solver = make_solver("unipc", sigmas)
    for i, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocities[i], timestep, theirs).prev_sample
        ours = solver.step(i, velocities[i], ours)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), f"step {i}"
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 5, 50, 300])
def test_a_straight_path_is_followed_exactly(name, num_steps):
    """With the constant velocity eps - x0, every solver must arrive at x0 whatever the steps are.

    At 300 steps the first timesteps are equal as integers, which must not matter.
    """
    x0, eps = randn(*SHAPE, seed=0), randn(*SHAPE, seed=1)
    end = run(name, FlowMatchSchedule(shift=5.0).sigmas(num_steps), eps, lambda i, _: eps - x0)
    # Three fp32 roundings a step at the size of the numbers; UniPC also starts at sigma 1 - 1e-6 instead of 1.
    size = (x0.abs() + eps.abs()).max()
    tolerance = size * (3 * (num_steps + 1) * FP32_ULP + (1.1e-6 if name == "unipc" else 0))
    assert (end - x0).abs().max() <= tolerance


def gaussian_error(name: str, num_steps: int, mean: float = 0.7, std: float = 0.4) -> float:
    """Error at sigma 0 for data N(mean, std^2), whose velocity is linear in x and whose trajectories are known."""
    sigmas = FlowMatchSchedule(shift=1.0).sigmas(num_steps)

    def velocity_at(i: int, x: torch.Tensor) -> torch.Tensor:
        sigma = float(sigmas[i])
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        slope = (sigma - (1 - sigma) * std**2) / variance  # d log sqrt(variance) / d sigma
        return slope * (x - (1 - sigma) * mean) - mean

    start = randn(1, 4, 8, 8, seed=0)
    end = run(name, sigmas, start, velocity_at)
    return float((end - (mean + std * start)).abs().max())


def test_convergence_order():
    steps = (16, 32, 64, 128)
    errors = {name: [gaussian_error(name, n) for n in steps] for name in SOLVERS}
    order = {name: -np.polyfit(np.log(steps), np.log(error), 1)[0] for name, error in errors.items()}
    assert order["euler"] == pytest.approx(1, abs=0.05)
    assert order["unipc"] > 1.5
    assert all(unipc < euler / 5 for unipc, euler in zip(errors["unipc"], errors["euler"], strict=True))


@pytest.mark.parametrize("name", SOLVERS)
def test_velocity_may_be_low_precision_but_the_step_is_fp32(name):
    sigmas = FlowMatchSchedule().sigmas(3)
    latents, velocity = randn(*SHAPE, seed=0), randn(*SHAPE, seed=1).bfloat16()
    low, upcast = (make_solver(name, sigmas).step(0, v, latents) for v in (velocity, velocity.float()))
    assert low.dtype == torch.float32
    assert torch.equal(low, upcast)
    with pytest.raises(ConfigError, match="latents must stay fp32"):
        make_solver(name, sigmas).step(0, velocity, latents.bfloat16())
    with pytest.raises(ConfigError, match="one shape"):
        make_solver(name, sigmas).step(0, velocity[:1], latents)


@pytest.mark.parametrize("name", SOLVERS)
def test_no_step_reads_a_value_back(name):
    """On the meta device there are no values, so anything that made the host wait for the device would raise."""
    latents = torch.empty(SHAPE, device="meta")
    end = run(name, FlowMatchSchedule().sigmas(4), latents, lambda i, x: torch.empty_like(x))
    assert end.device.type == "meta" and end.shape == SHAPE


def test_euler_takes_steps_in_any_order_and_unipc_refuses():
    sigmas = FlowMatchSchedule().sigmas(3)
    latents, velocity = randn(*SHAPE, seed=0), randn(*SHAPE, seed=1)
    euler = make_solver("euler", sigmas)
    last = euler.step(2, velocity, latents)
    euler.step(0, velocity, latents)
    assert torch.equal(euler.step(2, velocity, latents), last)

    unipc = make_solver("unipc", sigmas)
    with pytest.raises(OSPNextError, match="step 1, but the next one is step 0"):
        unipc.step(1, velocity, latents)
    for i in range(3):
        unipc.step(i, velocity, latents)
        with pytest.raises(OSPNextError, match=f"step {i}, but the next one is"):
            unipc.step(i, velocity, latents)
    with pytest.raises(OSPNextError, match="the run is complete"):
        unipc.step(0, velocity, latents)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("i", [-1, 3])
def test_steps_that_do_not_exist(name, i):
    latents = torch.zeros(SHAPE)
    with pytest.raises(ConfigError, match="steps 0 to 2"):
        make_solver(name, FlowMatchSchedule().sigmas(3)).step(i, latents, latents)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (torch.tensor([1.0, 0.0], dtype=torch.float64), "fp32"),
        (torch.tensor([1.0]), "num_steps"),
        (torch.tensor([[1.0, 0.0]]), "num_steps"),
        (torch.tensor([1.0, 0.5]), "exactly 0"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), "strictly"),
        (torch.tensor([1000.0, 500.0, 0.0]), "at most 1"),
        (torch.tensor([1.0, float("nan"), 0.0]), "strictly"),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_sigmas_that_are_no_schedule(name, sigmas, message):
    with pytest.raises(ConfigError, match=message):
        make_solver(name, sigmas)


def test_unknown_solver_lists_the_known():
    with pytest.raises(ConfigError, match="'heun'; solvers: euler, unipc"):
        make_solver("heun", FlowMatchSchedule().sigmas(3))


def test_only_unipc_needs_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sigmas = FlowMatchSchedule().sigmas(3)
    make_solver("euler", sigmas)
    with pytest.raises(MissingDependencyError, match=r"ospnext\[t2v\]"):
        make_solver("unipc", sigmas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 7.5])
def test_guide_is_fp32_whatever_comes_in(dtype, scale):
    v_cond, v_uncond = randn(*SHAPE, seed=0).to(dtype), randn(*SHAPE, seed=1).to(dtype)
    guided = guide(v_cond, v_uncond, scale)
    c, u = v_cond.double(), v_uncond.double()
    assert guided.dtype == torch.float32
    exact = u + scale * (c - u)
    # Difference, product and sum round once each.
    assert ((guided.double() - exact).abs() <= 3 * FP32_ULP * (u.abs() + scale * (c - u).abs())).all()


def test_guidance_is_off_up_to_one():
    assert [needs_guidance(g) for g in (0.0, 1.0, 1.01, 5)] == [False, False, True, True]
