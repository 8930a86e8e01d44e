"""The shape of an OSP-Next transformer: fields, presets, block layout, parameter count. No tensors here.

Field names are those of official Wan2.1 `config.json` files plus the three Skiparse keys of OSP-Next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ospnext.errors import ConfigError

BlockKind = Literal["full", "token", "group"]

SKIPARSE_KEYS = ("skiparse_model_type", "sparse_ratio", "num_full_blocks")


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the transformer. Source: arXiv 2605.28691 and the Wan2.1 text-to-video models.

    `skiparse_model_type="full"` is the dense Wan2.1 model; `"dual_end"` puts `num_full_blocks / 2` dense blocks at each
    end and alternates token and group blocks of Skiparse-2D, with ratio `sparse_ratio`, between them.
    """

    dim: int = 5120
    ffn_dim: int = 13824
    num_heads: int = 40
    num_layers: int = 40
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: bool = True
    cross_attn_norm: bool = True
    skiparse_model_type: Literal["full", "dual_end"] = "full"
    sparse_ratio: int = 1
    num_full_blocks: int = 0

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError("this transformer config cannot be built: " + "; ".join(problems))

    def _problems(self):
        for name in (
            "dim",
            "ffn_dim",
            "num_heads",
            "num_layers",
            "freq_dim",
            "text_dim",
            "text_len",
            "in_dim",
            "out_dim",
        ):
            if not _is_integer(getattr(self, name), at_least=1):
                yield f"{name} must be a positive integer, got {getattr(self, name)!r}"
                return
        for name in ("sparse_ratio", "num_full_blocks"):
            if not _is_integer(getattr(self, name)):
                yield f"{name} must be an integer, got {getattr(self, name)!r}"
                return
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not self.eps > 0:
            yield f"eps must be a positive number, got {self.eps!r}"
        if self.dim % self.num_heads:
            yield f"dim {self.dim} is not a multiple of num_heads {self.num_heads}"
        elif self.head_dim % 2:
            yield f"head_dim (dim / num_heads) must be even for rotary embedding, got {self.head_dim}"
        if self.freq_dim % 2:
            yield f"freq_dim must be even, got {self.freq_dim}"
        if not _is_patch_size(self.patch_size):
            yield f"patch_size must be a tuple (1, h, w) of positive integers, got {self.patch_size!r}"
        if not (self.qk_norm and self.cross_attn_norm):
            yield "qk_norm and cross_attn_norm must be true: every Wan2.1 text-to-video checkpoint has both norms"
        if self.skiparse_model_type not in ("full", "dual_end"):
            yield f"skiparse_model_type must be 'full' or 'dual_end', got {self.skiparse_model_type!r}"
        elif self.skiparse_model_type == "dual_end":
            if self.sparse_ratio < 2:
                yield f"sparse_ratio must be at least 2 for dual_end, got {self.sparse_ratio}"
            if self.num_layers % 2:
                yield f"dual_end needs an even num_layers, got {self.num_layers}"
            if self.num_full_blocks % 4 or not 0 <= self.num_full_blocks <= self.num_layers // 2:
                yield (
                    f"num_full_blocks must be a multiple of 4 between 0 and num_layers / 2 = {self.num_layers // 2}, "
                    f"got {self.num_full_blocks}"
                )
        elif self.sparse_ratio != 1 or self.num_full_blocks:
            yield (
                "sparse_ratio and num_full_blocks only mean something with skiparse_model_type='dual_end'; "
                f"got 'full' with sparse_ratio={self.sparse_ratio}, num_full_blocks={self.num_full_blocks}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Complex pairs of a head given to the (time, height, width) axes: (22, 21, 21) for head_dim 128."""
        pairs, spatial = self.head_dim // 2, self.head_dim // 6
        return pairs - 2 * spatial, spatial, spatial

    @property
    def block_kinds(self) -> tuple[BlockKind, ...]:
        return block_layout(self.num_layers, self.num_full_blocks if self.sparse else None)

    @property
    def sparse(self) -> bool:
        return self.skiparse_model_type != "full"

    def replace(self, **changes: Any) -> TransformerConfig:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in official Wan names."""
        return {**dataclasses.asdict(self), "patch_size": list(self.patch_size)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TransformerConfig:
        """Read an official Wan / OSP-Next or a diffusers Wan `config.json` (told apart by their keys)."""
        values = _from_diffusers(raw) if "num_attention_heads" in raw else dict(raw)
        known = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        if "patch_size" in values:
            values["patch_size"] = tuple(values["patch_size"])
        if values.get("skiparse_model_type", "full") == "full":
            # Upstream forces these for dense models, whatever the file says.
            values.update(sparse_ratio=1, num_full_blocks=0)
        return cls(**values)

    def parameter_count(self) -> int:
        """Exact number of parameters, without building the model."""
        C, F = self.dim, self.ffn_dim
        attention = 4 * (C * C + C) + 2 * C
        block = 2 * attention + 2 * C + (C * F + F) + (F * C + C) + 6 * C
        patch = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        embeddings = (self.in_dim * patch * C + C) + (self.text_dim * C + C) + (C * C + C)
        time = (self.freq_dim * C + C) + (C * C + C) + (6 * C * C + 6 * C)
        head = C * self.out_dim * patch + self.out_dim * patch + 2 * C
        return self.num_layers * block + embeddings + time + head


def _is_integer(value: object, at_least: int | None = None) -> bool:
    """True and False are no numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and (at_least is None or value >= at_least)


def _is_patch_size(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 3
        and value[0] == 1
        and all(_is_integer(n, at_least=1) for n in value)
    )


def _from_diffusers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rename a diffusers WanTransformer3DModel config; refuse variants that are not text-to-video."""
    for key in ("image_dim", "added_kv_proj_dim"):
        if raw.get(key) is not None:
            raise ConfigError(
                f"this is an image-to-video Wan config ({key}={raw[key]}); ospnext runs text-to-video models"
            )
    if raw.get("qk_norm", "rms_norm_across_heads") != "rms_norm_across_heads":
        raise ConfigError(f"qk_norm={raw['qk_norm']!r}: only 'rms_norm_across_heads' (Wan2.1) is known")
    renamed = {"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"}
    same = (
        "ffn_dim",
        "num_layers",
        "freq_dim",
        "text_dim",
        "text_len",
        "patch_size",
        "eps",
        "cross_attn_norm",
        *SKIPARSE_KEYS,
    )
    values = {ours: raw[theirs] for ours, theirs in renamed.items() if theirs in raw}
    values |= {key: raw[key] for key in same if key in raw}
    values["dim"] = raw["num_attention_heads"] * raw["attention_head_dim"]
    return values


def block_layout(num_layers: int, num_full_blocks: int | None) -> tuple[BlockKind, ...]:
    """Kind of each block. `num_full_blocks=None` means all full (dense Wan2.1).

    Otherwise `num_full_blocks / 2` full blocks at each end; of the rest, even indices are token and odd ones group.
    """
    kinds: list[BlockKind] = ["full"] * num_layers
    if num_full_blocks is None:
        return tuple(kinds)
    ends = num_full_blocks // 2
    for i in range(ends, num_layers - ends):
        kinds[i] = "group" if i % 2 else "token"
    return tuple(kinds)


_DUAL_END: dict[str, Any] = {"skiparse_model_type": "dual_end", "sparse_ratio": 2, "num_full_blocks": 8}

PRESETS: dict[str, TransformerConfig] = {
    "14B": TransformerConfig(**_DUAL_END),
    "1.3B": TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **_DUAL_END),
    # Small enough for a laptop, with all three block kinds: full, full, then token, group, token, group, full, full.
    "tiny": TransformerConfig(
        dim=48,
        ffn_dim=96,
        num_heads=2,
        num_layers=8,
        freq_dim=32,
        text_dim=32,
        text_len=64,
        skiparse_model_type="dual_end",
        sparse_ratio=2,
        num_full_blocks=4,
    ),
}


def preset(name: str) -> TransformerConfig:
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]
