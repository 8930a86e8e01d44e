"""Classifier-free guidance: how two velocities become one, and whether their two passes share a forward. Numbers only:
who computes velocities, and where, is decided elsewhere.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ospnext.errors import ConfigError

#: "on": both branches in one forward of twice the batch; "off": one after the other; "auto": see `batches_branches`.
BatchedGuidance = Literal["auto", "on", "off"]

#: Operations of a block below which a device waits for the host: the thirty or so kernels of a block take about half a
#: millisecond to launch, in which a device that does 4e14 operations a second does 2e11. An estimate, for any device.
LAUNCH_BOUND_FLOPS = 2e11


def needs_guidance(guidance_scale: float) -> bool:
    """Whether an unconditional pass is worth computing.

    At `guidance_scale <= 1` guidance is off: the caller runs the conditional pass alone and uses its velocity as it is.
    """
    return guidance_scale > 1


def batches_branches(
    setting: BatchedGuidance, *, block_flops: float, activations: int, free: int | None, scales_span_batch: bool
) -> bool:
    """Whether the two branches share a forward.

    "auto" batches them where that saves time and changes nothing but roundings: a block of one branch has so few
    operations that the device would wait for launches, the activations of both are known to fit, and no scale would be
    shared.

    Args:
        block_flops: operations of a block for all videos of one branch.
        activations: bytes that a forward of both branches needs; free: bytes that there are, None if unknown.
        scales_span_batch: some HiFloat8 scale is that of a whole tensor, so that the branches would change each other.
    """
    if setting not in get_args(BatchedGuidance):
        raise ConfigError(f"batched_guidance must be one of {', '.join(get_args(BatchedGuidance))}; got {setting!r}")
    if setting != "auto":
        return setting == "on"
    fits = free is not None and activations <= free
    return block_flops < LAUNCH_BOUND_FLOPS and fits and not scales_span_batch


def guide(v_cond: Tensor, v_uncond: Tensor, guidance_scale: float) -> Tensor:
    """`v_uncond + guidance_scale * (v_cond - v_uncond)`, in fp32 whatever the inputs are (arXiv 2207.12598).

    The difference of two nearly equal velocities is multiplied by the scale, so it is taken after the upcast.
    """
    v_uncond = v_uncond.float()
    return v_uncond + guidance_scale * (v_cond.float() - v_uncond)
