"""The one door to hardware: the operators that models call. Nothing else in ospnext depends on a device's kind."""

from ospnext.ops import collective
from ospnext.ops.attention import attention, attention_packed
from ospnext.ops.fused import bind, gate_residual, gelu_tanh, layer_norm_modulate, rms_norm, rope
from ospnext.ops.policy import Policy, current_policy, use_backend
from ospnext.ops.quantize import Quantized, hif8_decode, hif8_encode, hif8_fake_quantize, hif8_quantize
from ospnext.ops.quantized_attention import quantized_attention
from ospnext.ops.quantized_linear import quantized_linear
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
    "hif8_decode",
    "hif8_encode",
    "hif8_fake_quantize",
    "hif8_quantize",
    "layer_norm_modulate",
    "quantized_attention",
    "quantized_linear",
    "rms_norm",
    "rope",
    "use_backend",
]
