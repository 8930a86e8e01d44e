"""The OSP-Next transformer: patches in, velocity out. Which kernels run is decided behind `ospnext.ops`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ospnext import ops
from ospnext.models.config import TransformerConfig
from ospnext.models.layers import Block, GeluTanh, Head, PatchEmbedding
from ospnext.models.layout import BlockPlan, StreamLayout, stream_layout
from ospnext.models.rank_layout import rank_layout
from ospnext.parallel import SequenceParallel
from ospnext.sparse import Grid

#: Layouts kept per model; each holds a few index and rotary tables of the length of the stream.
_MAX_LAYOUTS = 16

TimestepRounding = Literal["none", "bf16"]


@dataclass(frozen=True, eq=False)
class TextContext:
    """Keys and values of one prompt batch for every block, each [B, text_len, H, D]. Valid for all denoising steps."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]


class OSPNextTransformer(nn.Module):
    """Text-to-video diffusion transformer with Skiparse-2D attention; with `skiparse_model_type="full"`, the dense
    Wan2.1.

    Parameters are uninitialised until `init_weights` or a loader fills them.

    Args:
        config: the shape.
        timestep_rounding: "bf16" rounds the timestep to bf16 before it is embedded, as the training of the released
            OSP-Next weights did; "none" (default) is right for Wan2.1 weights and for new training.
    """

    def __init__(self, config: TransformerConfig, *, timestep_rounding: TimestepRounding = "none") -> None:
        super().__init__()
        if timestep_rounding not in ("none", "bf16"):
            raise ValueError(f"timestep_rounding must be 'none' or 'bf16', got {timestep_rounding!r}")
        ops.bind()
        C = config.dim
        self.config = config
        self.timestep_rounding = timestep_rounding
        self.patch_embedding = PatchEmbedding(config.in_dim, C, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, C), GeluTanh(), nn.Linear(C, C))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, C), nn.SiLU(), nn.Linear(C, C))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        #: The ranks that share a sample with this one; see parallelize.py.
        self.sequence: SequenceParallel | None = None
        #: Keep of each block but its inputs, and compute the rest again in the backward pass.
        self.gradient_checkpointing = False
        #: Dtype of the matrix products where parameters are kept in a wider one; see sharding.py.
        self.compute_dtype: torch.dtype | None = None
        self._layouts: dict[tuple, StreamLayout] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix products (norms, modulation and time embedding may be kept wider)."""
        return self.compute_dtype or self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def forward(self, latents_BCTHW: Tensor, timestep_B: Tensor, text: Tensor | TextContext) -> Tensor:
        """Velocity of the flow at (latents, timestep).

        Args:
            latents_BCTHW: [B, in_dim, T, H, W] latents, normalised; H and W multiples of the patch size.
            timestep_B: [B] in [0, 1000], floating.
            text: [B, text_len, text_dim] text embeddings, zero beyond the prompt's tokens; or `encode_text` of them.

        Returns:
            [B, out_dim, T, H, W] in fp32 (fp64 for an fp64 model).
        """
        grid = self.token_grid(latents_BCTHW)
        texts: Sequence[Tensor | tuple[Tensor, Tensor]]
        texts = text.keys_values if isinstance(text, TextContext) else [self._embed_text(text)] * len(self.blocks)
        self._check(latents_BCTHW, timestep_B, texts[0])
        layout = self.layout(grid, latents_BCTHW.shape[0])
        time_BC = self.time_embedding(self._sinusoid(timestep_B))
        time_B6C = self.time_projection(time_BC).unflatten(1, (6, -1))
        x_BNC = self._embed(latents_BCTHW, layout.enter)
        for block, plan, of_block in zip(self._blocks(), layout.blocks, texts, strict=True):
            x_BNC = self._run(block, x_BNC, time_B6C, of_block, plan)
            if plan.exchange is not None:
                x_BNC = plan.exchange(x_BNC)
        patches_BNP = self.head(x_BNC, time_BC)
        if layout.gather is not None:
            patches_BNP = layout.gather(patches_BNP)
        return self._unpatchify(patches_BNP, layout.leave, grid)

    def _run(self, block: Block, x_BNC: Tensor, *others: Tensor | tuple[Tensor, Tensor] | BlockPlan) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x_BNC, *others, use_reentrant=False, preserve_rng_state=False)  # nothing is random
        return block(x_BNC, *others)

    def encode_text(self, text_BLC: Tensor) -> TextContext:
        """Project text embeddings [B, text_len, text_dim] once and compute every block's cross-attention keys and
        values.
        """
        text_BLC = self._embed_text(text_BLC)
        return TextContext(tuple(block.project_text(text_BLC) for block in self._blocks()))

    def _embed_text(self, text_BLC: Tensor) -> Tensor:
        """[B, text_len, text_dim] -> [B, text_len, C]."""
        expected = (self.config.text_len, self.config.text_dim)
        if text_BLC.ndim != 3 or tuple(text_BLC.shape[1:]) != expected:
            raise ValueError(
                f"text embeddings must be [B, {expected[0]}, {expected[1]}], zero beyond the prompt; "
                f"got {tuple(text_BLC.shape)}"
            )
        return self.text_embedding(text_BLC.to(self.device, self.dtype))

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def token_grid(self, latents_BCTHW: Tensor) -> Grid:
        """(T, H, W) of the token grid of these latents."""
        shape, (pt, ph, pw) = latents_BCTHW.shape, self.config.patch_size
        if len(shape) != 5 or shape[1] != self.config.in_dim or shape[3] % ph or shape[4] % pw or min(shape[2:]) < 1:
            raise ValueError(
                f"latents must be [B, {self.config.in_dim}, T, H, W] with H and W multiples of {ph} and {pw}; "
                f"got {tuple(shape)}"
            )
        return shape[2] // pt, shape[3] // ph, shape[4] // pw

    def _check(self, latents: Tensor, timestep: Tensor, text: Tensor | tuple[Tensor, Tensor]) -> None:
        batch = latents.shape[0]
        if tuple(timestep.shape) != (batch,) or not timestep.is_floating_point():
            raise ValueError(
                f"timestep must be floating [{batch}] like the batch of the latents; "
                f"got {timestep.dtype} {tuple(timestep.shape)}"
            )
        if (of_text := len(text if isinstance(text, Tensor) else text[0])) != batch:
            raise ValueError(f"text has a batch of {of_text}, latents one of {batch}")

    def layout(self, grid: Grid, batch: int) -> StreamLayout:
        """Static plan of a token grid and batch size, built once: no index is computed inside a denoising step.

        Call it before a compiled forward, so that the indices are constants of the graph instead of being computed in
        it."""
        config, table_dtype = self.config, torch.float64 if self.dtype == torch.float64 else torch.float32
        key = (grid, batch, self.device, table_dtype, self.sequence)
        if key not in self._layouts:
            if len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            # Kept beyond the caller's mode: tensors of inference mode could never serve in training.
            with torch.inference_mode(False):
                shape = (config.block_kinds, config.sparse_ratio, grid, batch, config.rope_pairs)
                if self.sequence is None:
                    self._layouts[key] = stream_layout(*shape, table_dtype, self.device)
                else:
                    self._layouts[key] = rank_layout(*shape, table_dtype, self.device, self.sequence)
        return self._layouts[key]

    def _sinusoid(self, timestep_B: Tensor) -> Tensor:
        """[B, freq_dim]: cosines, then sines, of timestep * 10000^(-j / half), in fp64 until the end."""
        if self.timestep_rounding == "bf16":
            timestep_B = timestep_B.to(torch.bfloat16)
        weight, half = cast(nn.Linear, self.time_embedding[0]).weight, self.config.freq_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=weight.device) / half
        angles = timestep_B.to(weight.device, torch.float64)[:, None] * torch.exp(-math.log(10000.0) * exponents)
        return torch.cat((angles.cos(), angles.sin()), dim=1).to(weight.dtype)

    def _embed(self, latents_BCTHW: Tensor, enter_N: Tensor | None) -> Tensor:
        """Patches [B, N, in_dim * patch] in the first block's order, each embedded."""
        _, ph, pw = self.config.patch_size
        patches = latents_BCTHW.to(self.device, self.dtype).unflatten(4, (-1, pw)).unflatten(3, (-1, ph))
        patches_BNP = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        if enter_N is not None:
            patches_BNP = patches_BNP[:, enter_N]
        return self.patch_embedding(patches_BNP)

    def _unpatchify(self, patches_BNP: Tensor, leave_N: Tensor | None, grid: Grid) -> Tensor:
        """Back to raster order and to [B, out_dim, T, H, W]; inside a patch the channel is fastest."""
        _, ph, pw = self.config.patch_size
        wide = torch.float64 if patches_BNP.dtype == torch.float64 else torch.float32
        if leave_N is not None:
            patches_BNP = patches_BNP[:, leave_N]
        patches = patches_BNP.to(wide).view(-1, *grid, ph, pw, self.config.out_dim)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter, by Wan's recipe: Xavier linears, N(0, 0.02) text and time MLPs, zero head, modulation
        N(0, 1) / sqrt(C).
        """
        for name, parameter in self.named_parameters():
            _init_parameter(name, parameter, self.config.dim, generator)


def _init_parameter(name: str, parameter: Tensor, dim: int, generator: torch.Generator | None) -> None:
    if name == "head.head.weight" or name.endswith("bias"):
        parameter.zero_()
    elif name.endswith("modulation"):
        parameter.normal_(std=dim**-0.5, generator=generator)
    elif ".norm" in name:
        parameter.fill_(1.0)
    elif name.startswith(("text_embedding", "time_embedding")):
        parameter.normal_(std=0.02, generator=generator)
    else:
        nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
