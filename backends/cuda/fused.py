"""`cuda.triton`: the fused family. Which kernel computes each contract and which its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .kernels import gate_residual as _residual
from .kernels import gelu as _gelu
from .kernels import layer_norm as _layer_norm
from .kernels import rms_norm as _rms_norm
from .kernels import rope as _rope


@dataclass(frozen=True)
class Kernel:
    """Takes the arguments of a contract; `backward` gives one gradient for each, None where it has none."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None


def _rope_backward(grad_BNHD, x_BNHD, cos_NP, sin_NP):
    return _rope.rope(grad_BNHD, cos_NP, sin_NP, inverse=True), None, None


rms_norm = Kernel(_rms_norm.rms_norm, _rms_norm.rms_norm_backward)
rms_norm_rope = Kernel(_rms_norm.rms_norm_rope, _rms_norm.rms_norm_rope_backward)
rope = Kernel(_rope.rope, _rope_backward)
layer_norm_modulate = Kernel(_layer_norm.layer_norm_modulate, _layer_norm.layer_norm_modulate_backward)
layer_norm_modulate_quantize = Kernel(_layer_norm.layer_norm_modulate_quantize)
gate_residual = Kernel(_residual.gate_residual, _residual.gate_residual_backward)
gelu_tanh = Kernel(_gelu.gelu_tanh, _gelu.gelu_tanh_backward)
gelu_tanh_quantize = Kernel(_gelu.gelu_tanh_quantize)
