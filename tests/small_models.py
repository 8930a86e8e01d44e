"""Small transformers with random weights and inputs, and the error measure of the model tests. No oracle lives here."""

from __future__ import annotations

import torch
from torch import Tensor

from ospnext.models import OSPNextTransformer, TransformerConfig

#: Heads of 12 channels, so that each of the three axes has two rotary pairs; 5 channels in, 3 out, none of them alike.
SMALL = TransformerConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=8, freq_dim=8, text_dim=10, text_len=7, in_dim=5, out_dim=3
)


def sparse(config: TransformerConfig = SMALL, *, k: int = 2, num_full_blocks: int = 4) -> TransformerConfig:
    return config.replace(skiparse_model_type="dual_end", sparse_ratio=k, num_full_blocks=num_full_blocks)


def dense(config: TransformerConfig) -> TransformerConfig:
    return config.replace(skiparse_model_type="full", sparse_ratio=1, num_full_blocks=0)


def random_model(
    config: TransformerConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64, **options
) -> OSPNextTransformer:
    """Every parameter random and far from what initialisation would give it: no zero head, no unit norm weight.

    Matrices have variance 1 / fan_in, so that signals keep their size and an error anywhere reaches the output.
    """
    model = OSPNextTransformer(config, **options).to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            if ".norm" in name and name.endswith("weight"):
                values = 1 + 0.3 * values
            elif parameter.ndim > 1 and not name.endswith("modulation"):
                values = values / parameter.flatten(1).shape[1] ** 0.5
            else:
                values = 0.3 * values
            parameter.copy_(values)
    return model.to(dtype)


def random_inputs(
    config: TransformerConfig,
    grid: tuple[int, int, int],
    *,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, timestep, text) for a token grid; no two samples share a timestep, which is fp32 as in sampling."""
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid
    _, ph, pw = config.patch_size
    latents = torch.randn(batch, config.in_dim, t, h * ph, w * pw, dtype=torch.float64, generator=generator)
    text = torch.randn(batch, config.text_len, config.text_dim, dtype=torch.float64, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 1000
    return latents.to(dtype), timestep, text.to(dtype)


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over the largest magnitude expected (at least `floor`); infinite for NaN or another
    shape.
    """
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    difference = (found.double() - expected.double()).abs().max().item()
    return difference / max(expected.abs().max().item(), floor) if difference else 0.0
