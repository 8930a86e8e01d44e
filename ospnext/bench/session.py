"""Runs the variants on the workloads one after the other: same weights, same inputs, one row each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ospnext.bench import floor
from ospnext.bench.ceilings import Ceilings
from ospnext.bench.diffusers_twin import Compiled, fastest_attention, forward_of, twin
from ospnext.bench.kernels import kernels_chosen
from ospnext.bench.measure import release, timed
from ospnext.bench.parts import timed_parts
from ospnext.bench.rows import DENSE, DIFFUSERS, Row
from ospnext.bench.variants import Variant, dense
from ospnext.bench.weights import Inputs, random_inputs, random_state, state_bytes
from ospnext.bench.workload import Workload
from ospnext.errors import ConfigError
from ospnext.models import OSPNextTransformer
from ospnext.models.flops import forward_flops
from ospnext.models.layers import Block
from ospnext.ops.device import Device
from ospnext.pipelines.compile import CompiledTransformer, CompileMode

State = dict[str, Tensor]

#: diffusers' own way to compile; benchmarks/diffusers_model.py compares it with one graph for the model.
DIFFUSERS_COMPILE: Compiled = "blocks"
#: Why a compiled forward has no parts.
COMPILED = "no parts: compiled, its kernels belong to no operator"


@dataclass
class Session:
    """All workloads are of one preset. `tell` gets a line about each step, for a person who waits."""

    device: torch.device
    workloads: tuple[Workload, ...]
    variants: tuple[Variant, ...]
    compile: CompileMode = "off"
    repeats: int = 3
    against_diffusers: bool = False
    tell: Callable[[str], object] = print
    ceilings: Ceilings = field(init=False)

    def __post_init__(self) -> None:
        self.ceilings = Ceilings(self.device)

    @torch.no_grad()
    def rows(self) -> Iterator[Row]:
        state = self._weights()
        for work in self.workloads:
            inputs, outputs = random_inputs(work, self.device), dict[str, Tensor]()
            for variant in self.variants:
                self.tell(f"{work}: {variant.name}")
                yield self._attempt(work, variant.name, self.compile, self._measure, variant, state, inputs, outputs)
            if self.against_diffusers:
                self.tell(f"{work}: {DIFFUSERS}")
                yield self._attempt(work, DIFFUSERS, DIFFUSERS_COMPILE, self._diffusers, state, inputs, outputs)

    def _weights(self) -> State:
        """Those of all variants. A device that is too small is refused before: a host would start to swap."""
        work, surface = self.workloads[0], Device(self.device)
        config, free = dense(work.config), surface.free_memory()
        wanted = state_bytes(config)
        if free is not None and wanted > free:
            raise ConfigError(
                f"the weights of {work.preset} with {config.num_layers} layers take {wanted / 2**30:.1f} GiB, and "
                f"{self.device} has {free / 2**30:.1f} GiB free; give fewer --layers, or a smaller --preset"
            )
        self.tell(f"drawing {wanted / 2**30:.1f} GiB of weights on {self.device}")
        return random_state(config, self.device)

    def _attempt(self, work: Workload, name: str, compiling: str, measure: Callable[..., Row], *rest: Any) -> Row:
        """A row in any case: a variant that does not fit, or that nothing here can run, does not end the others."""
        try:
            row = measure(work, *rest)
        except Exception as error:
            row = Row(work, name, compiling, error=_said(error))
        if compiling != "off":
            torch.compiler.reset()
        release()  # not before the error is gone, whose frames hold tensors
        if row.milliseconds is not None:
            self.tell(f"  {row.milliseconds:,.1f} ms")
        if row.error is not None:
            self.tell(f"  {row.error.splitlines()[0]}")
        return row

    def _measure(
        self, work: Workload, variant: Variant, state: State, inputs: Inputs, outputs: dict[str, Tensor]
    ) -> Row:
        with kernels_chosen() as kernels:
            model = variant.build(work.config, state)
            context = model.encode_text(inputs.text_BLC)
            run = CompiledTransformer(model, self.compile)
            run.prepare(inputs.latents_BCTHW, 1)

            def forward() -> Tensor:
                return run(inputs.latents_BCTHW, inputs.timestep_B, context)

            timed_row = self._timed(work, variant.name, self.compile, forward, outputs, _parked(state, model))
        flops = forward_flops(model.config, work.grid)
        row = Row(**timed_row, tflop=(flops.total - flops.text) / 1e12, kernels=kernels)
        try:
            if self.compile == "off":
                row = replace(row, parts=timed_parts(forward, self.device))
            else:
                row = replace(row, remark=COMPILED)
            return replace(row, floors=floors(work, model, variant, self.ceilings))
        except Exception as error:  # the times took longer than all of this: they are kept
            return replace(row, error=f"times only: {_said(error)}")

    def _diffusers(self, work: Workload, state: State, inputs: Inputs, outputs: dict[str, Tensor]) -> Row:
        config = dense(work.config)
        model = twin(config, state)
        attention = fastest_attention(config, work.tokens, self.device, self.ceilings.dtype)
        forward = forward_of(model, attention, inputs, DIFFUSERS_COMPILE)
        timed_row = self._timed(work, DIFFUSERS, DIFFUSERS_COMPILE, forward, outputs, _parked(state, model))
        tflop = forward_flops(config, work.grid).total / 1e12
        return Row(**timed_row, tflop=tflop, kernels={"attention": {f"diffusers.{attention}": "the fastest here"}})

    def _timed(
        self,
        work: Workload,
        name: str,
        compiling: str,
        forward: Callable[[], Tensor],
        outputs: dict[str, Tensor],
        parked: int,
    ) -> dict[str, Any]:
        """The fields of a row that need no more than a forward. Keeps the output for the variants after."""
        surface = Device(self.device)
        out = forward().float()
        if not out.isfinite().all():
            raise RuntimeError("the output is not finite")
        if compiling != "off":
            forward()
        surface.synchronize()
        surface.reset_peak_memory()
        timing = timed(forward, self.device, repeats=self.repeats, warm_up=0)
        differences = {other: _difference(out, theirs) for other, theirs in outputs.items() if other in (DENSE, "osp")}
        outputs[name] = out
        return {
            "work": work,
            "variant": name,
            "compile": compiling,
            "timing": timing,
            "peak_bytes": surface.peak_memory() - (0 if surface.is_cpu else parked),
            "differences": differences,
        }


def floors(work: Workload, model: OSPNextTransformer, variant: Variant, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds that the parts of one forward would take if each ran as fast as its kernels do alone."""
    config, tokens = model.config, work.tokens
    blocks, itemsize = cast(list[Block], list(model.blocks)), ceilings.dtype.itemsize
    linear = sum(n * ceilings.linear(tokens, *shape) for shape, n in floor.outer_linears(config).items())
    layers = [blocks[0].get_submodule(name) for name in ("self_attn.q", "ffn.0", "ffn.2")]
    by_shape = {tuple(cast(Tensor, layer.weight).shape[::-1]): layer for layer in layers}
    for shape, count in floor.block_linears(config).items():
        if variant.recipe is not None:
            linear += count * ceilings.quantized_linear(tokens, by_shape[shape], *shape, variant.recipe)
        else:
            linear += count * ceilings.linear(tokens, *shape)
    per_second = ceilings.copy(tokens * config.dim)
    return {
        "linear": linear,
        "attention": _attention_floor(work, model, ceilings),
        "elementwise": 1e3 * floor.elementwise_bytes(config, tokens, itemsize, variant.recipe) / per_second,
        "quantize": 1e3 * floor.quantize_bytes(config, tokens, itemsize, variant.recipe) / per_second,
    }


def _attention_floor(work: Workload, model: OSPNextTransformer, ceilings: Ceilings) -> float:
    """Blocks of a kind are alike, so that one of each is measured."""
    config, plans = model.config, model.layout(work.grid, 1).blocks
    blocks = cast(list[Block], list(model.blocks))
    q_shape = (1, work.tokens, config.num_heads, config.head_dim)
    text_shape = (1, config.text_len, config.num_heads, config.head_dim)
    total = 0.0
    for kind, count in Counter(config.block_kinds).items():
        i = config.block_kinds.index(kind)
        total += count * ceilings.attention(blocks[i].self_attn.attend, q_shape, q_shape, plans[i].subsequences)
    return total + config.num_layers * ceilings.attention(blocks[0].cross_attn.attend, q_shape, text_shape)


def _parked(state: State, model: nn.Module) -> int:
    """Bytes of the shared weights that this variant does not use: they are there for the others."""
    used = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in state.values() if tensor.data_ptr() not in used)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
