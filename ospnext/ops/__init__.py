"""The one door to hardware: the operators that models call. Nothing else in ospnext depends on a device's kind."""

from ospnext.ops import collective
from ospnext.ops.attention import attention, attention_packed
from ospnext.ops.fused import (
    bind,
    gate_residual,
    gelu_tanh,
    gelu_tanh_quantize,
    layer_norm_modulate,
    layer_norm_modulate_quantize,
    linear_gelu_tanh,
    rms_norm,
    rms_norm_rope,
    rope,
)
from ospnext.ops.policy import Policy, current_policy, use_backend
from ospnext.ops.quantize import Quantized, hif8_decode, hif8_encode, hif8_fake_quantize, hif8_quantize
from ospnext.ops.quantized_attention import quantized_attention
from ospnext.ops.quantized_linear import prefers_carried, quantized_linear
from ospnext.ops.recipe import HiF8Recipe

__all__ = [
    "HiF8Recipe",
    "Policy",
    "Quantized",
    "attention",
    "attention_packed",
    "bind",
    "collective",
    "current_policy",
    "gate_residual",
    "gelu_tanh",
    "gelu_tanh_quantize",
    "hif8_decode",
    "hif8_encode",
    "hif8_fake_quantize",
    "hif8_quantize",
    "layer_norm_modulate",
    "layer_norm_modulate_quantize",
    "linear_gelu_tanh",
    "prefers_carried",
    "quantized_attention",
    "quantized_linear",
    "rms_norm",
    "rms_norm_rope",
    "rope",
    "use_backend",
]
