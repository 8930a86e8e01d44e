"""Flow matching: the noise schedule, the ODE solvers and classifier-free guidance. No model code, no sampling loop."""

from __future__ import annotations

from ospnext.diffusion.guidance import guide, needs_guidance
from ospnext.diffusion.schedule import (
    FlowMatchSchedule,
    schedule_from_diffusers,
    schedule_to_diffusers,
    shift_sigma,
)
from ospnext.diffusion.solvers import SOLVERS, Solver, make_solver

__all__ = [
    "SOLVERS",
    "FlowMatchSchedule",
    "Solver",
    "guide",
    "make_solver",
    "needs_guidance",
    "schedule_from_diffusers",
    "schedule_to_diffusers",
    "shift_sigma",
]
