"""diffusers' WanTransformer3DModel on the weights of ours: what a user would run instead of the dense variant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ospnext.bench.measure import timed
from ospnext.bench.weights import Inputs
from ospnext.models import TransformerConfig
from ospnext.models.weights.keymaps import official_to_diffusers
from ospnext.optional import require

#: Backends of attention that are not tried: they download a kernel, take another form of input, compute in 8 bits, or
#: are there for what nothing else takes.
_SKIPPED = ("hub", "varlen", "sage", "math", "flex", "xla")
#: Backend of torch.compile; its mode stays the default, as in diffusers' documentation.
COMPILER = "inductor"
#: "blocks" is diffusers' regional compilation, one graph for all alike; "model" one graph for everything, in minutes.
Compiled = Literal["off", "blocks", "model"]


def twin(config: TransformerConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """A dense model on the very tensors of `state` (official names); a few small ones are cast to the dtypes in which
    diffusers loads them.
    """
    diffusers = require("diffusers", extra="t2v")
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(
            patch_size=config.patch_size,
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
        )
    weight = state["patch_embedding.weight"]
    wide = set(model._keep_in_fp32_modules)
    given = {}
    for name, value in state.items():
        theirs = official_to_diffusers(name)
        assert theirs is not None, name
        given[theirs] = value.to(torch.float32 if wide & set(theirs.split(".")) else weight.dtype)
    model.load_state_dict(given, assign=True)
    # Its tables are no parameters: on "meta" they have no values.
    model.rope = type(model.rope)(config.head_dim, config.patch_size, model.config.rope_max_seq_len).to(weight.device)
    return model.eval().requires_grad_(False)


def fastest_attention(config: TransformerConfig, tokens: int, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of diffusers that takes the least time at the shape of a full block."""
    found = attention_times(config, tokens, device, dtype)
    return min(found, key=lambda name: found[name])


def attention_times(
    config: TransformerConfig, tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Milliseconds at the shape of a full block with each of diffusers' backends that runs here."""
    require("diffusers", extra="t2v")
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

    shape = (1, tokens, config.num_heads, config.head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    found: dict[str, float] = {}
    for name in AttentionBackendName:
        if any(word in name.value for word in _SKIPPED):
            continue
        try:
            with attention_backend(name):
                found[name.value] = timed(lambda: dispatch_attention_fn(q, k, v), device, repeats=1).median
        except Exception:  # not installed, or not for this device or shape: each says so in its own way
            continue
    return found


def forward_of(model: nn.Module, attention: str, inputs: Inputs, compiled: Compiled) -> Callable[[], Tensor]:
    """A call as its pipeline makes it: the text is projected anew each time."""
    wan: Any = model
    wan.set_attention_backend(attention)
    if compiled == "blocks":
        wan.compile_repeated_blocks(backend=COMPILER, fullgraph=True)
    run = torch.compile(wan, backend=COMPILER) if compiled == "model" else wan
    return lambda: run(inputs.latents_BCTHW, inputs.timestep_B, inputs.text_BLC, return_dict=False)[0]
