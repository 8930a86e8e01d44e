"""What the compiler makes of the Triton kernels of the cuda backend at the shapes of the 14B model, without a GPU.

    pip install triton && python benchmarks/cuda_occupancy.py --out benchmarks/results/cuda_occupancy.md

Every kernel is launched as the model does, on tensors without memory, and compiled instead of run. Registers decide how
many programs a multiprocessor holds at once, and those how much memory is under way: a kernel that is bound by memory
needs many of them. This says nothing about time: that is benchmarks/cuda_fused.py, on a GPU."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import target_info
from triton.runtime.jit import JITFunction, mangle_type

from ospnext.backends.cuda import fused
from ospnext.backends.cuda.kernels import hif8
from ospnext.backends.cuda.kernels.quantize_rows import quantize_by_row
from ospnext.bench.report import table

TOKENS, CHANNELS, HEADS, HEAD_DIM, FFN = 80_640, 5120, 40, 128, 13_824
#: Of a multiprocessor of compute capability 9.0: registers, threads, programs, and bytes of shared memory, of which
#: each program takes 1 KiB more.
REGISTERS, THREADS, PROGRAMS, SHARED, RESERVED = 65_536, 2048, 32, 227 << 10, 1 << 10
CAPABILITY, WARP = 90, 32
COLUMNS = [
    *("operator", "pass", "kernel", "warps", "registers", "spilled"),
    *("programs at once", "warps at once", "instructions"),
]


@dataclass(frozen=True)
class Compiled:
    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    instructions: int

    @property
    def programs(self) -> int:
        """How many a multiprocessor holds."""
        threads, of_thread = self.warps * WARP, -(-self.registers // 8) * 8
        by_shared = SHARED // (self.shared + RESERVED)
        return min(REGISTERS // (of_thread * threads), THREADS // threads, PROGRAMS, by_shared)

    def cells(self) -> tuple[str, ...]:
        at_once = (self.programs, self.programs * self.warps)
        numbers = (self.warps, self.registers, self.spilled, *at_once, self.instructions)
        return (f"`{self.kernel}`", *map(str, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the result here too")
    parser.add_argument("--only", default="", help="operators whose name contains this")
    arguments = parser.parse_args()
    lines = [
        "# Triton kernels as compiled",
        "",
        f"triton {triton.__version__} for compute capability {CAPABILITY / 10}, bf16, {TOKENS} tokens. At most "
        f"{THREADS // WARP} warps fit on a multiprocessor; bytes are spilled where registers do not suffice.",
        "",
        *table(COLUMNS, [(name, which, *found.cells()) for name, which, found in rows(arguments.only)]),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def rows(only: str) -> Iterator[tuple[str, str, Compiled]]:
    for name, which, call in calls():
        if only in name:
            for kernel, arguments, options in launches(call):
                yield name, which, compiled(kernel, arguments, options)


# ---- what is launched


def calls() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(operator, pass, a call as the model makes it)."""
    x, wide, heads = meta(1, TOKENS, CHANNELS), meta(1, TOKENS, FFN), meta(1, TOKENS, HEADS, HEAD_DIM)
    weight, bias, angles = meta(CHANNELS), meta(CHANNELS), meta(TOKENS, HEAD_DIM // 2, dtype=torch.float32)
    modulation = meta(1, CHANNELS, dtype=torch.float32)
    order = meta(TOKENS, dtype=torch.int64)
    of_norm = (x, weight, 1e-6)
    of_rope = (x, weight, angles, angles, 1e-6)
    modulated, affine = (x, None, None, modulation, modulation, 1e-6), (x, weight, bias, None, None, 1e-6)
    gated = (x, x, modulation)
    for name, kernel, arguments, grad in (
        ("rms_norm", fused.rms_norm, of_norm, x),
        ("rope", fused.rope, (heads, angles, angles), heads),
        ("rms_norm_rope", fused.rms_norm_rope, of_rope, heads),
        ("layer_norm_modulate, modulated", fused.layer_norm_modulate, modulated, x),
        ("layer_norm_modulate, affine", fused.layer_norm_modulate, affine, x),
        ("gate_residual, gated", fused.gate_residual, (*gated, None), x),
        ("gate_residual, gated, permuted", fused.gate_residual, (*gated, order), x),
        ("gelu_tanh", fused.gelu_tanh, (wide,), wide),
    ):
        yield name, "forward", lambda kernel=kernel, arguments=arguments: kernel.forward(*arguments)
        yield name, "backward", lambda kernel=kernel, given=(grad, *arguments): kernel.backward(*given)
    for granularity in ("row", "tensor"):
        how = (15.0, "amax", granularity, True)
        for name, kernel, arguments in (
            ("layer_norm_modulate_quantize", fused.layer_norm_modulate_quantize, modulated),
            ("gelu_tanh_quantize", fused.gelu_tanh_quantize, (wide,)),
        ):
            call = lambda kernel=kernel, given=(*arguments, *how): kernel.forward(*given)  # noqa: E731
            yield f"{name}, {granularity}", "forward", call
    yield "hif8_quantize, row", "forward", lambda: quantize_by_row(x, 15.0, "amax", True)
    scale = meta(1, 1, 1, dtype=torch.float32)
    yield "hif8_quantize, tensor", "forward", lambda: hif8.quantize_rows(x, scale, 4, True)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, dict[str, Any], dict[str, Any]]]:
    """(kernel, its arguments by name, options of the launch) of each launch that `call` makes."""
    found = []

    def record(kernel: JITFunction, *arguments: Any, grid: object, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "maxnreg") if name in named}
        by_name = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        found.append((kernel, by_name, {name: value for name, value in options.items() if value is not None}))

    with patch.object(JITFunction, "run", record):
        call()
    return found


# ---- the compiler


def compiled(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any]) -> Compiled:
    constants = {name: value for name, value in arguments.items() if is_constant(kernel, name, value)}
    signature = {n: "constexpr" if n in constants else mangle_type(value) for n, value in arguments.items()}
    names = list(arguments)
    variables = {name: value for name, value in arguments.items() if name not in constants}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, value in variables.items() if is_aligned(value)}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    target = GPUTarget("cuda", CAPABILITY, WARP)
    asked = MagicMock(return_value=target, __triton_builtin__=True)
    with patch.object(target_info, "current_target", asked):  # by kernels, for instructions that it has
        found = triton.compile(source, target=target, options=options)
    usage, code = dumped(found.asm["cubin"])
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+.*;", code, re.MULTILINE))
    return Compiled(kernel.__name__, found.metadata.num_warps, registers, spilled, found.metadata.shared, instructions)


def is_constant(kernel: JITFunction, name: str, value: Any) -> bool:
    """Whether Triton compiles it in: constants, None, and integers that are 1."""
    declared = next(p for p in kernel.params if p.name == name).is_constexpr
    return declared or value is None or (isinstance(value, int) and value == 1)


def is_aligned(value: Any) -> bool:
    """Whether Triton tells the compiler that it is a multiple of 16; memory from PyTorch is."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def dumped(cubin: bytes) -> tuple[str, str]:
    """(use of resources, machine code), by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, code


if __name__ == "__main__":
    main()
