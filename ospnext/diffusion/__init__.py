"""Flow matching: the noise schedule, the ODE solvers and classifier-free guidance. No model code, no sampling loop."""

from __future__ import annotations

from ospnext.diffusion.guidance import BatchedGuidance, batches_branches, guide, needs_guidance
from ospnext.diffusion.schedule import (
    FlowMatchSchedule,
    schedule_from_diffusers,
    schedule_to_diffusers,
    shift_sigma,
)
from ospnext.diffusion.solvers import SOLVERS, Solver, make_solver

__all__ = [
    "SOLVERS",
    "BatchedGuidance",
    "FlowMatchSchedule",
    "Solver",
    "batches_branches",
    "guide",
    "make_solver",
    "needs_guidance",
    "schedule_from_diffusers",
    "schedule_to_diffusers",
    "shift_sigma",
]
