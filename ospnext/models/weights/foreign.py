"""What a checkpoint that is no Wan text-to-video transformer is, by its tensor names. For error messages only."""

from __future__ import annotations

import re
from collections.abc import Collection

# The first match is what gets said, so the narrower kinds come first.
_KINDS = (
    (
        r"(^|[._])(lora|lokr|hada)_",
        "it holds LoRA adapter tensors: merge the adapter into its base model, then load the merged model",
    ),
    (r"(^|\.)vace_", "it holds VACE tensors (a video-editing Wan); ospnext runs text-to-video models"),
    (
        r"(^|\.)(img_emb|k_img|v_img|norm_k_img|image_embedder|add_k_proj|add_v_proj|norm_added_k)\.",
        "it holds image-conditioning tensors of an image-to-video Wan; ospnext runs text-to-video models",
    ),
    (
        r"(^|\.)(scale_weight|weight_scale|scaled_fp8|scale_input|input_scale)$",
        "it is a quantized (scaled FP8) file: take the bfloat16, float16 or float32 version of the model",
    ),
    (
        r"(^|\.)(token_embedding\.weight|shared\.weight|encoder\.block\.\d)",
        "it holds T5 text encoder tensors: that file is the text encoder, the transformer is another one",
    ),
    (
        r"(^|\.)(quant_conv\.|post_quant_conv\.|(en|de)coder\.conv_?(in|out|1)\.|first_stage_model\.)",
        "it holds video autoencoder (VAE) tensors: that file is the VAE, the transformer is another one",
    ),
    (r"(^|\.)(exp_avg|exp_avg_sq)$", "it holds optimizer state: give the model weights of that training run"),
)


def describe_foreign(names: Collection[str]) -> str | None:
    """One sentence on what these tensor names belong to, or None if they are nothing we know."""
    for pattern, sentence in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return sentence
    return None
