"""Parameter names of the transformer in the two public namings, and which of them a checkpoint uses.

Ours are the official Wan2.1 names; diffusers renames them one to one and reshapes nothing. No files, no tensors here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Naming = Literal["official", "diffusers"]
NAMINGS: tuple[Naming, ...] = get_args(Naming)

# What training frameworks and checkpoint bundles put in front of every name.
PREFIXES = ("", "model.diffusion_model.", "module.", "model.")


def _with_leaves(modules: dict[str, str], leaves: tuple[str, ...]) -> dict[str, str]:
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in modules.items() for leaf in leaves}


def _block_names() -> dict[str, str]:
    linears = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
    norms: dict[str, str] = {}
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        linears |= {f"{ours}.{x}": f"{theirs}.to_{x}" for x in "qkv"} | {f"{ours}.o": f"{theirs}.to_out.0"}
        norms |= {f"{ours}.norm_{x}": f"{theirs}.norm_{x}" for x in "qk"}
    # Official Wan numbers the affine norm before cross-attention last (norm3); diffusers numbers norms in order of use.
    affine = {"norm3": "norm2"}
    return {
        **_with_leaves(linears | affine, ("weight", "bias")),
        # Of linears whose weight is stored as HiFloat8 codes.
        **_with_leaves(linears, ("weight_scale",)),
        **_with_leaves(norms, ("weight",)),
        "modulation": "scale_shift_table",
    }


_OUTER_MODULES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
_OUTER = {**_with_leaves(_OUTER_MODULES, ("weight", "bias")), "head.modulation": "scale_shift_table"}
_BLOCK = _block_names()
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_BLOCK_BACK = {theirs: ours for ours, theirs in _BLOCK.items()}
_IN_BLOCK = re.compile(r"(blocks\.(?:0|[1-9]\d*)\.)(.+)")


def _translate(name: str, outer: dict[str, str], block: dict[str, str]) -> str | None:
    if match := _IN_BLOCK.fullmatch(name):
        inner = block.get(match[2])
        return None if inner is None else match[1] + inner
    return outer.get(name)


def official_to_diffusers(name: str) -> str | None:
    """The diffusers name of an official Wan parameter; None if `name` is not one."""
    return _translate(name, _OUTER, _BLOCK)


def diffusers_to_official(name: str) -> str | None:
    """The official Wan name of a diffusers parameter; None if `name` is not one."""
    return _translate(name, _OUTER_BACK, _BLOCK_BACK)


def from_official(name: str, naming: Naming) -> str | None:
    """`name` (official) in `naming`; None if it is no parameter of the transformer."""
    diffusers = official_to_diffusers(name)
    return name if diffusers is not None and naming == "official" else diffusers


def to_official(name: str, naming: Naming) -> str | None:
    """`name` (in `naming`) as an official name; None if it is no parameter of the transformer."""
    official = diffusers_to_official(name)
    if naming == "diffusers":
        return official
    return name if official_to_diffusers(name) is not None else None


@dataclass(frozen=True)
class KeyMap:
    """How the names stored in one checkpoint translate: `official` maps stored to official, `unknown` fits no rule."""

    naming: Naming
    prefix: str
    official: dict[str, str]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.naming} Wan names" + (f" with prefix {self.prefix!r}" if self.prefix else "")

    def stored(self, official: str) -> str:
        """The name under which this checkpoint would store the parameter `official`."""
        return self.prefix + (from_official(official, self.naming) or official)


def detect(names: Iterable[str]) -> KeyMap | None:
    """The naming and prefix that explain most of `names`, or None if nothing but common names fits any of them."""
    names = tuple(names)
    maps = [_key_map(names, naming, prefix) for prefix in PREFIXES for naming in NAMINGS]
    best = max(maps, key=lambda found: len(found.official))
    # patch_embedding is called the same everywhere, in other models too: alone it tells nothing.
    telling = any(not name.startswith("patch_embedding.") for name in best.official.values())
    return best if telling else None


def _key_map(names: tuple[str, ...], naming: Naming, prefix: str) -> KeyMap:
    official, unknown = {}, []
    for name in names:
        ours = to_official(name.removeprefix(prefix), naming) if name.startswith(prefix) else None
        if ours is None:
            unknown.append(name)
        else:
            official[name] = ours
    return KeyMap(naming, prefix, official, tuple(unknown))
