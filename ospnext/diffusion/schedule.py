"""The flow-matching noise schedule: sigmas, timesteps, noising, and its form in diffusers' `scheduler_config.json`.

Sigma 1 is noise, sigma 0 is data, and the model predicts the velocity `eps - x0`. No solver and no model lives here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ospnext.errors import ConfigError

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move sigmas in [0, 1] towards noise by the factor `shift` (arXiv 2403.03206, eq. 23); keeps the dtype.

    Equals `shift * sigma / (1 + (shift - 1) * sigma)`. This form maps 0 and 1 to themselves exactly, for any shift.
    """
    shifted = shift * sigma
    return shifted / (shifted + (1 - sigma))


@dataclass(frozen=True)
class FlowMatchSchedule:
    """How noise levels are spaced.

    With `dynamic_shift` the shift is exp(mu), where mu is linear in the tokens of one latent frame: `base_shift` at
    `base_image_seq` tokens, `max_shift` at `max_image_seq`, and on along the same line outside. `shift` is then unused.
    """

    shift: float = 5.0
    dynamic_shift: bool = False
    base_image_seq: int = 256
    max_image_seq: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError("this flow-matching schedule is not valid: " + "; ".join(problems))

    def _problems(self):
        if not isinstance(self.dynamic_shift, bool):
            yield f"dynamic_shift must be true or false, got {self.dynamic_shift!r}"
        if not _is_finite(self.shift) or self.shift <= 0:
            yield f"shift must be a finite number above 0, got {self.shift!r}"
        for name in ("base_shift", "max_shift"):
            if not _is_finite(getattr(self, name)):
                yield f"{name} must be a finite number, got {getattr(self, name)!r}"
        lengths = (self.base_image_seq, self.max_image_seq)
        if not all(_is_count(length) for length in lengths) or lengths[0] >= lengths[1]:
            yield f"base_image_seq and max_image_seq must be positive integers, the first smaller, got {lengths}"

    def shift_for(self, spatial_tokens: int | None = None) -> float:
        """The shift for videos whose latent frame has `spatial_tokens` tokens: latent height * latent width / 4.

        The number of frames does not matter. A static schedule ignores `spatial_tokens`, a dynamic one requires it.
        """
        if not self.dynamic_shift:
            return self.shift
        if not _is_count(spatial_tokens):
            raise ConfigError(
                f"the shift of this schedule depends on the video size, but spatial_tokens is {spatial_tokens!r}; pass "
                "the tokens of one latent frame (latent height * latent width / 4), or use a static shift"
            )
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq - self.base_image_seq)
        return math.exp(self.base_shift + slope * (spatial_tokens - self.base_image_seq))

    def sigmas(
        self, num_steps: int, *, spatial_tokens: int | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """fp32 [num_steps + 1]: strictly decreasing noise levels, from exactly 1 to exactly 0."""
        if not _is_count(num_steps):
            raise ConfigError(f"num_steps must be an integer of at least 1, got {num_steps!r}")
        shift = self.shift_for(spatial_tokens)
        # In fp64 and on the CPU, because not every accelerator has fp64 and all of them must get the same numbers.
        uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")
        sigmas = shift_sigma(uniform, shift).float()
        if not (sigmas[1:] < sigmas[:-1]).all():
            raise ConfigError(
                f"{num_steps} steps with shift {shift:.6g} lie closer together than fp32 can tell apart; "
                "use fewer steps or a shift closer to 1"
            )
        return sigmas.to(device)

    @staticmethod
    def timesteps(sigmas: Tensor) -> Tensor:
        """What the model is told: fp32 `1000 * sigma`, not made an integer (diffusers' UniPC truncates it)."""
        return NUM_TRAIN_TIMESTEPS * sigmas.float()

    @staticmethod
    def noise(x0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
        """`sigma * eps + (1 - sigma) * x0` in fp32. Shapes: x0 and eps [B, ...], sigma a number, [] or [B]."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x0.device)
        if x0.shape != eps.shape or sigma.shape not in ((), x0.shape[:1]):
            raise ConfigError(
                "x0 and eps must have one shape [B, ...] and sigma must be a number or [B]; got "
                f"x0 {list(x0.shape)}, eps {list(eps.shape)}, sigma {list(sigma.shape)}"
            )
        if sigma.ndim:
            sigma = sigma.view(-1, *(1,) * (x0.ndim - 1))
        return sigma * eps.float() + (1 - sigma) * x0.float()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> FlowMatchSchedule:
        """The inverse of `to_dict`; missing keys take their defaults, unknown ones are errors."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in raw:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise ConfigError(f"unknown schedule key {key!r}; {hint}Known keys: {', '.join(known)}")
        return cls(**raw)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_DIFFUSERS_CLASSES = {"euler": "FlowMatchEulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler"}

# Keys that change what diffusers computes: diffusers' default, which is what a missing key means, and what we need.
_FIXED: dict[str, dict[str, tuple[Any, Any]]] = {
    "euler": {"num_train_timesteps": (1000, NUM_TRAIN_TIMESTEPS), "time_shift_type": ("exponential", "exponential")},
    "unipc": {
        "num_train_timesteps": (1000, NUM_TRAIN_TIMESTEPS),
        "time_shift_type": ("exponential", "exponential"),
        "prediction_type": ("epsilon", "flow_prediction"),
        "use_flow_sigmas": (False, True),
        "predict_x0": (True, True),
        "solver_order": (2, 2),
        "solver_type": ("bh2", "bh2"),
        "lower_order_final": (True, True),
        "final_sigmas_type": ("zero", "zero"),
    },
}
# Our fields under diffusers' names, with diffusers' defaults. The last four are no arguments of diffusers' UniPC, which
# logs that it ignores them: with that solver they are written for dynamic schedules only, so that these round trip.
_RENAMED = {
    "dynamic_shift": ("use_dynamic_shifting", False),
    "base_image_seq": ("base_image_seq_len", 256),
    "max_image_seq": ("max_image_seq_len", 4096),
    "base_shift": ("base_shift", 0.5),
    "max_shift": ("max_shift", 1.15),
}
_SHIFT_KEY = {"euler": "shift", "unipc": "flow_shift"}
# Arguments of diffusers' UniPC that do nothing once flow sigmas are used.
_WITHOUT_EFFECT = {
    "beta_start",
    "beta_end",
    "beta_schedule",
    "timestep_spacing",
    "steps_offset",
    "sigma_min",
    "sigma_max",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "rescale_betas_zero_snr",
}


def schedule_from_diffusers(config: Mapping[str, Any]) -> tuple[FlowMatchSchedule, str]:
    """(schedule, solver name) of a diffusers `scheduler_config.json`.

    Settings that would make diffusers compute something else than we do are errors, never ignored. The spacing is no
    part of the file: `sigmas` shifts linspace(1, 0, N + 1) once, whereas diffusers' `set_timesteps(N)` goes down to
    another smallest sigma (which its Euler shifts twice): the two agree only when diffusers is given explicit sigmas.
    """
    class_name = config.get("_class_name")
    solvers = [solver for solver, name in _DIFFUSERS_CLASSES.items() if name == class_name]
    if not solvers:
        known = ", ".join(_DIFFUSERS_CLASSES.values())
        raise ConfigError(f"the scheduler config has _class_name {class_name!r}; known schedulers: {known}")
    solver = solvers[0]
    fixed = _FIXED[solver]
    for key, (default, needed) in fixed.items():
        if config.get(key, default) != needed:
            found = repr(config[key]) if key in config else f"missing, which means {default!r}"
            raise ConfigError(f"{class_name}: {key} must be {needed!r} for a flow-matching model, but it is {found}")
    read = {_SHIFT_KEY[solver], *fixed, *(name for name, _ in _RENAMED.values()), *_WITHOUT_EFFECT}
    for key, value in config.items():
        # A key we do not know but which is off (null, false, empty) changes nothing: files of newer versions have such.
        if key not in read and not key.startswith("_") and value not in (None, False, []):
            raise ConfigError(
                f"{class_name}: {key}={value!r} is not implemented by ospnext; remove it from the scheduler config, "
                "or sample with diffusers"
            )
    values = {ours: config.get(theirs, default) for ours, (theirs, default) in _RENAMED.items()}
    return FlowMatchSchedule(shift=config.get(_SHIFT_KEY[solver], 1.0), **values), solver


def schedule_to_diffusers(schedule: FlowMatchSchedule, solver: str) -> dict[str, Any]:
    """A `scheduler_config.json` that diffusers loads and `schedule_from_diffusers` reads back as (schedule, solver)."""
    if solver not in _DIFFUSERS_CLASSES:
        raise ConfigError(f"unknown solver {solver!r}; solvers: {', '.join(_DIFFUSERS_CLASSES)}")
    fields = ["dynamic_shift"] if solver == "unipc" and not schedule.dynamic_shift else list(_RENAMED)
    return {
        "_class_name": _DIFFUSERS_CLASSES[solver],
        **{key: needed for key, (_, needed) in _FIXED[solver].items()},
        _SHIFT_KEY[solver]: schedule.shift,
        **{_RENAMED[field][0]: getattr(schedule, field) for field in fields},
    }
