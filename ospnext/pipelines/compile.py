"""How a transformer runs: eagerly, with its blocks compiled, or compiled as a whole. torch.compile does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from ospnext.errors import ConfigError
from ospnext.models.parallelize import NOT_TRACED

if TYPE_CHECKING:
    from ospnext.models import OSPNextTransformer, TextContext
    from ospnext.sparse import Grid

#: "blocks": one graph for all blocks that are alike, compiled in seconds; "max": one for the whole forward, with
#: kernels chosen by measuring them and, where the device has them, device graphs; compiled in minutes.
CompileMode = Literal["off", "blocks", "max"]

#: Video sizes that stay compiled. One more, and all are forgotten: each costs memory and guards.
MAX_SIZES = 16

#: What torch.compile is told. A break of the graph is an error, and each size is compiled for itself.
OPTIONS: dict[str, dict[str, Any]] = {
    "blocks": {"fullgraph": True, "dynamic": False},
    "max": {"fullgraph": True, "dynamic": False, "mode": "max-autotune"},
}


class CompiledTransformer:
    """A transformer to be called like itself, in one of the modes. It is changed in place, and `undo` takes that back.

    The last one to compile a transformer decides for all that share it: "off" leaves it as it finds it.

    Raises:
        ConfigError: there is no such mode, or the transformer shares its samples with other ranks.
    """

    def __init__(self, transformer: OSPNextTransformer, mode: CompileMode) -> None:
        if mode not in get_args(CompileMode):
            raise ConfigError(f"compile must be one of {', '.join(get_args(CompileMode))}; got {mode!r}")
        self.transformer, self.mode = transformer, mode
        self._sizes: set[tuple[Grid, int]] = set()
        self._calls: list[tuple[Any, Any]] = []  # modules, and what they call since they were compiled here
        if mode == "off":
            return
        if transformer.sequence is not None:
            raise ConfigError(f"compile={mode}: the transformer shares its samples with other ranks, and {NOT_TRACED}")
        _allow_variants(MAX_SIZES * len(transformer.blocks))
        modules: list[Any] = [transformer, *transformer.blocks]
        for module in modules:
            module._compiled_call_impl = None
        for module in modules[:1] if mode == "max" else modules[1:]:
            module.compile(**OPTIONS[mode])
            self._calls.append((module, module._compiled_call_impl))

    def undo(self) -> None:
        """Make eager again what was compiled here, unless another has compiled it since."""
        for module, call in self._calls:
            if module._compiled_call_impl is call:
                module._compiled_call_impl = None
        self._calls.clear()

    def prepare(self, latents: Tensor, batch: int) -> None:
        """Before the first call with latents like these: what is constant must be there when it is traced."""
        size = (self.transformer.token_grid(latents), batch)
        self.transformer.layout(*size)
        if self.mode == "off" or size in self._sizes:
            return
        if len(self._sizes) >= MAX_SIZES:
            torch.compiler.reset()
            self._sizes.clear()
        self._sizes.add(size)

    def __call__(self, latents_BCTHW: Tensor, timestep_B: Tensor, text: TextContext) -> Tensor:
        if cast(Any, self.transformer)._compiled_call_impl is None:
            return self.transformer(latents_BCTHW, timestep_B, text)
        # The next replay of a device graph writes its results where those of this one are.
        torch.compiler.cudagraph_mark_step_begin()
        return self.transformer(latents_BCTHW, timestep_B, text).clone()


def _allow_variants(count: int) -> None:
    """Let the compiler keep `count` variants of one function: all blocks share theirs, and its own limit is 8."""
    import torch._dynamo  # two seconds, for those who compile only

    options = cast(Any, torch._dynamo.config)
    options.recompile_limit = max(options.recompile_limit, count)
    options.accumulated_recompile_limit = max(options.accumulated_recompile_limit, count)
