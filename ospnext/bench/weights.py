"""Random weights and inputs, drawn on the device where they are used: nothing is read, nothing crosses a bus."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ospnext.bench.workload import Workload
from ospnext.models import OSPNextTransformer, TransformerConfig
from ospnext.models.layers import Block
from ospnext.models.loading import parameter_dtype

#: Tokens of the prompt; text embeddings are zero beyond them.
PROMPT = 96


@dataclass(frozen=True, eq=False)
class Inputs:
    """Of one forward of one sample, with values that bf16 holds."""

    latents_BCTHW: Tensor
    timestep_B: Tensor
    text_BLC: Tensor


@torch.no_grad()
def random_state(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Tensor]:
    """Every parameter, in the dtype in which a checkpoint of `dtype` is loaded.

    Xavier matrices, the head's among them, and large modulation: unlike at the start of a training no branch is
    switched off, so that outputs can be compared.
    """
    with torch.device("meta"):
        model = OSPNextTransformer(config)
    return _drawn(model.state_dict(), device, dtype, seed)


def state_bytes(config: TransformerConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Memory that `random_state` takes."""
    with torch.device("meta"):
        state = OSPNextTransformer(config).state_dict()
    return sum(tensor.numel() * parameter_dtype(name, dtype).itemsize for name, tensor in state.items())


@torch.no_grad()
def random_block(
    config: TransformerConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Block:
    """One block with parameters as those of `random_state`."""
    with torch.device("meta"):
        block = Block(config)
    prefix = "blocks.0."
    meta = {prefix + name: tensor for name, tensor in block.state_dict().items()}
    state = {name.removeprefix(prefix): values for name, values in _drawn(meta, device, dtype, seed).items()}
    block.load_state_dict(state, assign=True)
    return block


def _drawn(meta: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Values for tensors without any, by their official names."""
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, tensor in meta.items():
        state[name] = torch.empty(tensor.shape, device=device, dtype=parameter_dtype(name, dtype))
        _fill(name, state[name], generator)
    return state


def _fill(name: str, values: Tensor, generator: torch.Generator) -> None:
    if name.endswith("bias"):
        values.normal_(std=0.02, generator=generator)
    elif name.endswith("modulation"):
        values.normal_(std=0.5, generator=generator)
    elif ".norm" in name:
        values.normal_(mean=1.0, std=0.1, generator=generator)
    else:
        rows, columns = len(values), values.flatten(1).shape[1]
        bound = math.sqrt(6 / (rows + columns))
        values.uniform_(-bound, bound, generator=generator)


def random_inputs(work: Workload, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    config = work.config
    generator = torch.Generator(device).manual_seed(seed)
    text_BLC = torch.zeros(1, config.text_len, config.text_dim, device=device, dtype=dtype)
    text_BLC[:, :PROMPT].normal_(generator=generator)
    latents = torch.randn(1, config.in_dim, *work.latents, device=device, dtype=dtype, generator=generator)
    return Inputs(latents, torch.full((1,), 500.0, device=device), text_BLC)
