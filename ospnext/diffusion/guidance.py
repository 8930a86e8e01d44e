"""Classifier-free guidance: how two velocities become one. Who computes them, and where, is decided elsewhere."""

from __future__ import annotations

from torch import Tensor


def needs_guidance(guidance_scale: float) -> bool:
    """Whether an unconditional pass is worth computing.

    At `guidance_scale <= 1` guidance is off: the caller runs the conditional pass alone and uses its velocity as it is.
    """
    return guidance_scale > 1


def guide(v_cond: Tensor, v_uncond: Tensor, guidance_scale: float) -> Tensor:
    """`v_uncond + guidance_scale * (v_cond - v_uncond)`, in fp32 whatever the inputs are (arXiv 2207.12598).

    The difference of two nearly equal velocities is multiplied by the scale, so it is taken after the upcast.
    """
    v_uncond = v_uncond.float()
    return v_uncond + guidance_scale * (v_cond.float() - v_uncond)
