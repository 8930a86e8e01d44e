"""How the fused kernels walk over a stream [B, N, C]: which layouts they read in place, how much of a row a program
takes, and how many rows add up to one partial sum of a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens whose share of a parameter's gradient one program adds up. Fixed, so that sums do not depend on the device.
ROWS = 32
#: Bytes of shared memory into which a program of a gradient reads rows: two such programs share a multiprocessor of an
#: H200, and one fits on the smallest.
AHEAD = 90 << 10
#: Channels that a program of an elementwise kernel takes: 16 bytes of bf16 for each of 128 threads.
PIECE = 1024
#: And at least: four for each lane of a warp, of which some instructions take several at once.
SMALLEST = 128


def stream(x: Tensor) -> Tensor:
    """x [..., C] as [B, N, C] whose channels lie side by side; a copy only where its strides cannot say so."""
    x = x[(None,) * (3 - x.ndim)]
    return dense(x.flatten(0, -3))


def streams(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape [..., C] as [B, N, C] for kernels to which B and N are the same: B is 1 where it can be."""
    if all(t.is_contiguous() and t.numel() for t in tensors):
        return [t.view(1, -1, t.shape[-1] if t.ndim else 1) for t in tensors]
    return [stream(t) for t in tensors]


def dense(x: Any) -> Any:
    """x, or a copy of it, whose last dimension lies side by side; None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def new(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous memory on the device of `like`, by default of its shape and dtype."""
    return torch.empty(shape or like.shape, dtype=dtype or like.dtype, device=like.device)


def partial_sums(x_BNC: Tensor, *several: int) -> Tensor:
    """fp32 [*several, B, P, C] for P programs along the tokens of each sample."""
    samples, tokens, channels = x_BNC.shape
    return new(x_BNC, *several, samples, triton.cdiv(tokens, ROWS), channels, dtype=torch.float32)


def chunks(channels: int) -> tuple[int, int, int]:
    """(channels of a chunk, chunks, warps) of a program that keeps a row in registers from the first sum to the result.

    Short chunks leave few lanes idle at the end of a row, and programs of few warps let a multiprocessor load some rows
    while it adds up others. A thread holds four numbers of a chunk, as it reads parameters of fp32 at once; long rows
    need more threads, and then eight, so that the chunks of a row are few.
    """
    if channels > 6 * PIECE:
        return 2 * PIECE, triton.cdiv(channels, 2 * PIECE), 8
    chunk = max(SMALLEST, min(PIECE // 2, triton.next_power_of_2(channels)))
    return chunk, triton.cdiv(channels, chunk), chunk // SMALLEST


def warps(block: int, lanes: int = 512) -> int:
    """Warps for a program that holds `block` elements in registers, `lanes` of them in each."""
    return max(1, min(16, block // lanes))


def of_gradient(x_BNC: Tensor) -> tuple[int, int, dict[str, int]]:
    """(channels of a chunk, stages of the loop over rows, options of the launch) of a program that adds up gradients.

    It keeps two sums, a factor and two operands of each channel in fp32: 20 channels of a thread leave registers for
    two programs of 5120 channels on a multiprocessor, of which one computes while the other waits for the sums of a
    row. Shared memory holds that row and up to one behind it, which is on its way.
    """
    channels = x_BNC.shape[-1]
    chunk = min(PIECE, triton.next_power_of_2(channels)) if channels <= 6 * PIECE else 2 * PIECE
    count = triton.cdiv(channels, chunk)
    num_warps = min(16, triton.next_power_of_2(triton.cdiv(chunk * count, 20 * 32)))
    rows = min(2, AHEAD // (2 * channels * x_BNC.element_size()))
    return chunk, rows + 1, {"num_warps": num_warps, "maxnreg": 128}


@triton.jit
def read(pointer, inside, FULL: tl.constexpr):
    """What lies there, and 0 outside; FULL says that nothing is, which spares the instructions that ask."""
    if FULL:
        return tl.load(pointer)
    return tl.load(pointer, mask=inside, other=0.0)


@triton.jit
def write(pointer, value, inside, FULL: tl.constexpr):
    """In the dtype that lies there."""
    value = value.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer, value)
    else:
        tl.store(pointer, value, mask=inside)


@triton.jit
def sum_two(a, b):
    """The sums of two tensors, for which threads meet once."""
    return tl.reduce((tl.ravel(a, True), tl.ravel(b, True)), 0, _add_two)


@triton.jit
def sum_three(a, b, c):
    """`sum_two` of three."""
    return tl.reduce((tl.ravel(a, True), tl.ravel(b, True), tl.ravel(c, True)), 0, _add_three)


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def row_of(pointer, sample, token, sample_stride, token_stride):
    """Where a row starts; in 64 bits, since a stream may have more than 2^31 elements."""
    return pointer + tl.cast(sample, tl.int64) * sample_stride + tl.cast(token, tl.int64) * token_stride


@triton.jit
def within(x, at, channels, FULL: tl.constexpr):
    """x, and 0 behind the end of a row, of which a full chunk has nothing."""
    return x if FULL else tl.where(at < channels, x, tl.zeros_like(x))


@triton.jit
def place(row, tokens, ONE_SAMPLE: tl.constexpr):
    """(sample, token) of a row of all samples; a division by what is not known takes 20 instructions."""
    return (0, row) if ONE_SAMPLE else (row // tokens, row % tokens)


@triton.jit
def mean_of(total, count):
    """total / count, correctly rounded. A device multiplies by a rounded reciprocal otherwise, which is off by the same
    in every row and adds up in sums over tokens.

    By a reciprocal that all means of a program share, and the remainder."""
    count = count * 1.0
    inverse = tl.div_rn(1.0, count)
    mean = total * inverse
    exact = tl.fma(tl.fma(mean, -count, total), inverse, mean)
    return tl.where(tl.abs(total) < float("inf"), exact, mean)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x) to 1 ulp. A device's own is further off, and by the same in all of a row, which shows in sums over
    tokens that nearly cancel: so one step of Newton's behind it.
    """
    root = tl.rsqrt(x)
    better = tl.fma(root * 0.5, tl.fma(-root, x * root, 1.0), root)
    return tl.where(x < float("inf"), better, root)
