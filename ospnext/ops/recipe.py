"""How a layer is quantized: one value that the model, the ops and checkpoints pass on. No arithmetic lives here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ospnext.numerics.hif8 import INFO
from ospnext.numerics.scaling import SCALE_MODES, ScaleMode

#: What the gradient of a bias adds up: the quantized gradient, as the other two gradients do, or the one that came in.
BiasGradient = Literal["quant", "raw"]
#: How products are added up: in the sums of the tensor cores, which on some devices keep 14 bits, or in fp32 or fp64.
Accumulate = Literal["fast", "fp32", "fp64"]
LinearGranularity = Literal["tensor", "row"]
AttentionForm = Literal["qdq", "native"]


@dataclass(frozen=True)
class HiF8Recipe:
    """Scales and sums of a HiFloat8 linear or attention. The defaults are those that OSP-Next was trained with.

    Args:
        scale_max: where the largest magnitude of activations and weights goes; 15 keeps three bits of mantissa.
        grad_scale_max: the same for gradients; 224 trades one bit for four binades more.
        scale_mode: "amax", or "pow2" for scales whose division is exact on every device.
        granularity: one scale per "tensor"; per "row" is one per token and one per output feature, for inference only.
        bias_grad: "quant" sums the quantized gradient, "raw" the one that came in, which is more accurate.
        accumulate: precision in which products are added up, at least; "fast" is for inference and adds an error near
            that of rounding to bf16.
        attention: "qdq" is the attention of the backend on q, k and v that made the round trip; "native" may also round
            probabilities and the result to 8 bits, where a backend has a kernel for that: faster, for inference only.
    """

    scale_max: float = INFO.max_of_3_bits
    grad_scale_max: float = INFO.max_of_2_bits
    scale_mode: ScaleMode = "amax"
    granularity: LinearGranularity = "tensor"
    bias_grad: BiasGradient = "quant"
    accumulate: Accumulate = "fp32"
    attention: AttentionForm = "qdq"

    def __post_init__(self) -> None:
        for name in ("scale_max", "grad_scale_max"):
            value = getattr(self, name)
            if not INFO.smallest_subnormal <= value <= INFO.max:
                raise ValueError(f"{name} must lie between 2^-22 and 32768, the values of HiFloat8; got {value}")
        for name, known in (
            ("scale_mode", SCALE_MODES),
            ("granularity", get_args(LinearGranularity)),
            ("bias_grad", get_args(BiasGradient)),
            ("accumulate", get_args(Accumulate)),
            ("attention", get_args(AttentionForm)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
