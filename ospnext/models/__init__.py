"""The transformer: configuration, layers, weights."""

from ospnext.models.config import PRESETS, TransformerConfig, preset
from ospnext.models.loading import load_transformer, save_transformer
from ospnext.models.quantization import QuantPolicy, prepare_for_inference, quantize_model
from ospnext.models.transformer import OSPNextTransformer, TextContext

__all__ = [
    "PRESETS",
    "OSPNextTransformer",
    "QuantPolicy",
    "TextContext",
    "TransformerConfig",
    "load_transformer",
    "prepare_for_inference",
    "preset",
    "quantize_model",
    "save_transformer",
]
