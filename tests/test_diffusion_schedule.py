"""The noise schedule against exact arithmetic and against diffusers; its config files in both directions."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ospnext.diffusion import (
    SOLVERS,
    FlowMatchSchedule,
    schedule_from_diffusers,
    schedule_to_diffusers,
    shift_sigma,
)
from ospnext.errors import ConfigError

FP32_ULP = 2.0**-24  # largest relative error of one fp32 rounding


def exact_sigmas(shift: float, num_steps: int) -> list[Fraction]:
    """The definition, in rational arithmetic."""
    s = Fraction(shift)
    us = [Fraction(num_steps - i, num_steps) for i in range(num_steps + 1)]
    return [s * u / (1 + (s - 1) * u) for u in us]


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 5.0, 7.0, 12.5])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 1000])
def test_sigmas_are_the_exact_ones_rounded_to_fp32(shift, num_steps):
    sigmas = FlowMatchSchedule(shift=shift).sigmas(num_steps)
    expected = torch.tensor([float(sigma) for sigma in exact_sigmas(shift, num_steps)], dtype=torch.float64)
    assert sigmas.dtype == torch.float32
    # fp64 arithmetic may send a value half way between two fp32 numbers to the other one: a hair over half an ulp.
    assert ((sigmas.double() - expected).abs() <= expected * FP32_ULP * (1 + 1e-6)).all()


def test_known_values_of_the_inference_schedule():
    schedule = FlowMatchSchedule(shift=7.0)
    sigmas = schedule.sigmas(50)
    torch.testing.assert_close(schedule.timesteps(sigmas)[:3], torch.tensor([1000, 997.09, 994.08]), rtol=0, atol=0.005)
    torch.testing.assert_close(sigmas[-4:], torch.tensor([0.3088, 0.2258, 0.1250, 0.0]), rtol=0, atol=5e-5)


def test_timesteps_are_not_rounded():
    sigmas = FlowMatchSchedule(shift=7.0).sigmas(50)
    timesteps = FlowMatchSchedule.timesteps(sigmas)
    assert timesteps.dtype == torch.float32
    exact = 1000 * sigmas.double()
    assert ((timesteps.double() - exact).abs() <= exact * FP32_ULP).all()


@pytest.mark.parametrize(
    ("tokens", "shift"), [(3600, 2.9039), (3840, 3.0243), (1560, 2.0559), (256, 1.6487), (4096, 3.1582)]
)
def test_dynamic_shift_known_values(tokens, shift):
    """720p, 768p, 480p, and the two ends of the line: exp(0.5) and exp(1.15)."""
    schedule = FlowMatchSchedule(dynamic_shift=True)
    assert schedule.shift_for(tokens) == pytest.approx(shift, abs=5e-5)
    static = FlowMatchSchedule(shift=schedule.shift_for(tokens))
    assert torch.equal(schedule.sigmas(20, spatial_tokens=tokens), static.sigmas(20))


def test_dynamic_shift_is_not_clamped_and_static_shift_ignores_the_size():
    assert FlowMatchSchedule(dynamic_shift=True).shift_for(8192) > FlowMatchSchedule(dynamic_shift=True).shift_for(4096)
    assert FlowMatchSchedule(shift=7.0).shift_for(3600) == FlowMatchSchedule(shift=7.0).shift_for() == 7.0


@settings(deadline=None, max_examples=100)
@given(shift=st.floats(0.02, 100), num_steps=st.integers(1, 300))
def test_sigmas_run_strictly_from_exactly_one_to_exactly_zero(shift, num_steps):
    sigmas = FlowMatchSchedule(shift=shift).sigmas(num_steps)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0].item() == 1.0 and sigmas[-1].item() == 0.0
    assert (sigmas[1:] < sigmas[:-1]).all()


@settings(deadline=None, max_examples=100)
@given(first=st.floats(0.05, 20), second=st.floats(0.05, 20))
def test_shifts_compose_by_multiplication(first, second):
    u = torch.linspace(1, 0, 65, dtype=torch.float64)
    # A handful of fp64 roundings per map; the outer one scales the relative error of the inner by at most 1 / second.
    rtol = 16 * 2.0**-53 * max(1.0, 1 / second)
    twice = shift_sigma(shift_sigma(u, first), second)
    torch.testing.assert_close(twice, shift_sigma(u, first * second), rtol=rtol, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_diffusers_euler_given_unshifted_sigmas_has_ours(shift, num_steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    schedule = FlowMatchSchedule(shift=shift)
    ours = schedule.sigmas(num_steps)
    # diffusers computes in fp32: one rounding each for u, s * u, (s - 1) * u, 1 + ..., and the division; ours has one.
    torch.testing.assert_close(ours, theirs.sigmas, rtol=6 * FP32_ULP, atol=0)
    torch.testing.assert_close(schedule.timesteps(ours)[:-1], theirs.timesteps, rtol=8 * FP32_ULP, atol=0)


def test_diffusers_dynamic_shifting_is_ours():
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = FlowMatchSchedule(dynamic_shift=True)
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20), mu=0.5 + (1.15 - 0.5) * (3600 - 256) / (4096 - 256))
    ours = schedule.sigmas(20, spatial_tokens=3600)
    # diffusers computes in fp32: exp(mu), u, 1 / u, - 1, +, and the division, of which 1 / u - 1 cancels near u = 1.
    torch.testing.assert_close(ours, theirs.sigmas, rtol=8 * FP32_ULP, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_interpolates_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 2, 4, 5, generator=generator).to(dtype) for _ in range(2))
    sigma_B = torch.tensor([0.0, 0.37, 1.0])
    noisy = FlowMatchSchedule.noise(x0, eps, sigma_B)
    assert noisy.dtype == torch.float32
    assert torch.equal(noisy[0], x0[0].float()) and torch.equal(noisy[2], eps[2].float())
    s = float(sigma_B[1])
    exact = s * eps[1].double() + (1 - s) * x0[1].double()
    magnitude = s * eps[1].double().abs() + (1 - s) * x0[1].double().abs()
    # 1 - sigma, two products and a sum: at most three roundings on the way to any one result.
    assert ((noisy[1].double() - exact).abs() <= 3 * FP32_ULP * magnitude).all()
    assert torch.equal(FlowMatchSchedule.noise(x0, eps, s)[1], noisy[1])


def test_noise_refuses_shapes_that_would_broadcast():
    x0 = torch.zeros(2, 4, 2)
    for eps, sigma in [(x0[0], 0.5), (x0, torch.zeros(4)), (x0, torch.zeros(2, 1))]:
        with pytest.raises(ConfigError, match="one shape"):
            FlowMatchSchedule.noise(x0, eps, sigma)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shift": 0}, "shift must be"),
        ({"shift": -3.0}, "shift must be"),
        ({"shift": float("nan")}, "shift must be"),
        ({"shift": "7.0"}, "shift must be"),
        ({"shift": True}, "shift must be"),
        ({"dynamic_shift": "no"}, "dynamic_shift must be"),
        ({"max_shift": float("inf")}, "max_shift must be"),
        ({"base_image_seq": 4096}, "the first smaller"),
        ({"base_image_seq": 0}, "positive integers"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        FlowMatchSchedule(**values)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True])
def test_step_count_must_be_a_positive_integer(num_steps):
    with pytest.raises(ConfigError, match="num_steps"):
        FlowMatchSchedule().sigmas(num_steps)


@pytest.mark.parametrize("tokens", [None, 0, 900.0])
def test_dynamic_shift_needs_the_size(tokens):
    with pytest.raises(ConfigError, match="spatial_tokens"):
        FlowMatchSchedule(dynamic_shift=True).sigmas(10, spatial_tokens=tokens)


def test_sigmas_that_fp32_cannot_separate_are_refused():
    with pytest.raises(ConfigError, match="closer together than fp32"):
        FlowMatchSchedule(shift=1e6).sigmas(50)


def test_dict_round_trip_and_unknown_keys():
    schedule = FlowMatchSchedule(shift=3.0, dynamic_shift=True, base_shift=0.25)
    assert FlowMatchSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    with pytest.raises(ConfigError, match="did you mean 'dynamic_shift'"):
        FlowMatchSchedule.from_dict({"dynamic_shfit": True})


SCHEDULES = [FlowMatchSchedule(shift=7.0), FlowMatchSchedule(dynamic_shift=True, max_shift=1.3, base_image_seq=128)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["static", "dynamic"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_config_file_survives_diffusers(schedule, solver, tmp_path):
    """Write ours, let diffusers load it, save it again with all its own keys, and read that back."""
    import diffusers

    config = schedule_to_diffusers(schedule, solver)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    assert scheduler.config.use_dynamic_shifting is schedule.dynamic_shift
    scheduler.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "scheduler_config.json").read_text())
    assert len(again) > len(config)
    assert schedule_from_diffusers(again) == (schedule, solver)


def test_reads_the_scheduler_of_diffusers_wan_pipelines():
    """A Wan checkpoint's scheduler: three settings, the rest at diffusers' defaults."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    config = {**wan.config, "_class_name": "UniPCMultistepScheduler"}
    assert schedule_from_diffusers(config) == (FlowMatchSchedule(shift=3.0), "unipc")
    # A missing shift means diffusers' default 1, not ours.
    assert schedule_from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler"})[0].shift == 1.0
    assert FlowMatchEulerDiscreteScheduler().config.shift == 1.0


@pytest.mark.parametrize("key", ["use_karras_sigmas", "shift_terminal", "thresholding", "made_up_key"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_settings_we_do_not_implement_are_refused_unless_off(key, solver):
    config = schedule_to_diffusers(FlowMatchSchedule(), solver)
    assert schedule_from_diffusers({**config, key: None}) == (FlowMatchSchedule(), solver)
    with pytest.raises(ConfigError, match=key):
        schedule_from_diffusers({**config, key: 0.1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler.*UniPCMultistepScheduler"),
        ({"prediction_type": "epsilon"}, "prediction_type must be 'flow_prediction'"),
        ({"solver_order": 3}, "solver_order must be 2"),
        ({"num_train_timesteps": 500}, "num_train_timesteps"),
        ({"disable_corrector": [0]}, "disable_corrector"),
    ],
)
def test_schedulers_that_compute_something_else_are_refused(change, message):
    config = schedule_to_diffusers(FlowMatchSchedule(), "unipc")
    with pytest.raises(ConfigError, match=message):
        schedule_from_diffusers({**config, **change})


def test_a_missing_key_means_what_it_means_to_diffusers():
    with pytest.raises(ConfigError, match=r"prediction_type .* missing, which means 'epsilon'"):
        schedule_from_diffusers({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0})
    with pytest.raises(ConfigError, match="None"):
        schedule_from_diffusers({"flow_shift": 3.0})


def test_unknown_solver_cannot_be_written():
    with pytest.raises(ConfigError, match="euler, unipc"):
        schedule_to_diffusers(FlowMatchSchedule(), "heun")
