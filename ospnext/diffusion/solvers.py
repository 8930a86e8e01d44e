"""ODE solvers that take the latents from noise (sigma 1) to data (sigma 0), one velocity per step. No model calls here.

A solver is made for one run from one sigma tensor; latents are fp32 from the first step to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ospnext.errors import ConfigError, OSPNextError
from ospnext.optional import require


class Solver(Protocol):
    def step(self, i: int, velocity: Tensor, latents: Tensor) -> Tensor:
        """The fp32 latents at `sigmas[i + 1]`, from the latents at `sigmas[i]` and the model's velocity there."""
        ...


class EulerSolver:
    """`x + (sigma[i + 1] - sigma[i]) * v`. Has no state, so steps may come in any order."""

    def __init__(self, sigmas: Tensor) -> None:
        # Zero-dimensional tensors: on the CPU or on the latents' device, adding one makes no device wait for the host.
        self._deltas = (sigmas[1:] - sigmas[:-1]).unbind()

    def step(self, i: int, velocity: Tensor, latents: Tensor) -> Tensor:
        _check_step(i, len(self._deltas), velocity, latents)
        return latents + self._deltas[i] * velocity.float()


class UniPCSolver:
    """UniPC of order 2 (arXiv 2302.04867), the default sampler of Wan, by diffusers' UniPCMultistepScheduler.

    It remembers the velocities of earlier steps, so steps come in order 0, 1, 2, ... and one solver serves one run.
    """

    # What diffusers does with explicit sigmas, and why the scheduler is set up as it is (read in 0.42):
    # - Explicit sigmas are accepted only with use_flow_sigmas, and flow_shift is applied to them all the same. With
    #   flow_shift=1 that is `1 * s / (1 + 0 * s)`, which returns every float unchanged.
    # - They must be a numpy array without the final 0, which final_sigmas_type="zero" appends.
    # - A leading sigma of 1 becomes 1 - 1e-6, because the solver takes log(1 - sigma). Nothing else changes.
    # - Its timesteps are truncated to integers (999 for the first); the model is given ours instead. `step` uses them
    #   only to look up its start index, and takes the second one where the first two timesteps truncate to the same
    #   integer, as with 200 steps at shift 7. set_begin_index(0) replaces that search.
    # - lower_order_final makes the last step first order at any step count, which keeps log(0) out of the result.
    # - Coefficients are computed per step on the latents' device, a 2x2 linear solve among them. It moves sigmas there
    #   one by one, and the solve is checked: both make the host wait. See `step`.
    def __init__(self, sigmas: Tensor) -> None:
        self._scheduler = require("diffusers", extra="t2v").UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, final_sigmas_type="zero"
        )
        self._scheduler.set_timesteps(sigmas=sigmas[:-1].cpu().numpy())
        self._scheduler.set_begin_index(0)
        self._num_steps = len(sigmas) - 1
        self._next = 0

    def step(self, i: int, velocity: Tensor, latents: Tensor) -> Tensor:
        _check_step(i, self._num_steps, velocity, latents)
        if i != self._next:
            expected = f"step {self._next}" if self._next < self._num_steps else "none, the run is complete"
            raise OSPNextError(
                f"UniPC was asked for step {i}, but the next one is {expected}: each step builds on those before; "
                "go through them in order and make a new solver for each run"
            )
        self._scheduler.sigmas = self._scheduler.sigmas.to(latents.device)  # once: later it is there already
        timestep = self._scheduler.timesteps[i]
        with _UncheckedSolve():
            (latents,) = self._scheduler.step(velocity.float(), timestep, latents, return_dict=False)
        self._next += 1
        return latents


class _UncheckedSolve(TorchFunctionMode):
    """`torch.linalg.solve` without its check for singular matrices, which reads a flag back from the device. UniPC's
    matrix is never singular, since sigmas fall strictly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {})).result
        return func(*args, **(kwargs or {}))


_SOLVERS: dict[str, Callable[[Tensor], Solver]] = {"euler": EulerSolver, "unipc": UniPCSolver}
SOLVERS: tuple[str, ...] = tuple(_SOLVERS)


def make_solver(name: str, sigmas: Tensor) -> Solver:
    """A solver for one run over `sigmas`, fp32 [num_steps + 1] as `FlowMatchSchedule.sigmas` returns them.

    They may be on the CPU or on the latents' device. "unipc" needs diffusers.
    """
    if name not in _SOLVERS:
        raise ConfigError(f"unknown solver {name!r}; solvers: {', '.join(SOLVERS)}")
    if sigmas.dtype != torch.float32 or sigmas.ndim != 1 or len(sigmas) < 2:
        raise ConfigError(f"sigmas must be fp32 [num_steps + 1], got {sigmas.dtype} {list(sigmas.shape)}")
    if not (sigmas[0] <= 1 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()):
        raise ConfigError(f"sigmas must fall strictly from at most 1 to exactly 0, got {sigmas.tolist()}")
    return _SOLVERS[name](sigmas)


def _check_step(i: int, num_steps: int, velocity: Tensor, latents: Tensor) -> None:
    if not 0 <= i < num_steps:
        raise ConfigError(f"step {i} does not exist: this run has steps 0 to {num_steps - 1}")
    if latents.dtype != torch.float32:
        raise ConfigError(f"latents must stay fp32 during sampling, got {latents.dtype}; cast only the model's input")
    if velocity.shape != latents.shape:
        raise ConfigError(f"velocity {list(velocity.shape)} and latents {list(latents.shape)} must have one shape")
