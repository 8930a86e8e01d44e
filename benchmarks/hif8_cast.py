"""HiFloat8 casts on this CPU: elements per second beside what copying as many bytes takes, or all fp32 patterns.

    python benchmarks/hif8_cast.py --out benchmarks/results/hif8_cast_cpu.md
    python benchmarks/hif8_cast.py --exhaustive --threads 2 --out benchmarks/results/hif8_exhaustive.txt

The exhaustive run compares the codes of all 2^32 patterns with those of en_dtypes, bit for bit."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import en_dtypes
import numpy as np
import torch

from ospnext import ops
from ospnext.numerics import hif8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
ELEMENTS, REPEATS = 1 << 25, 7
SLICE = 1 << 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exhaustive", action="store_true", help="compare all fp32 patterns with en_dtypes")
    parser.add_argument("--threads", type=int, default=1, help="of torch; 1 as en_dtypes has (default)")
    parser.add_argument("--out", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = exhaustive() if arguments.exhaustive else speed()
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def software() -> str:
    return f"torch {torch.__version__}, numpy {np.__version__}, en_dtypes {en_dtypes.__version__}"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} torch thread(s)"


# ---- all patterns


def exhaustive() -> str:
    counts = dict.fromkeys(("patterns", "NaN", "finite to infinity", "not zero to zero", "mismatches"), 0)
    started = time.perf_counter()
    for first in range(0, 1 << 32, SLICE):
        bits = np.arange(first, first + SLICE, dtype=np.uint32)
        x = bits.view(np.float32)
        found, expected = hif8.encode(torch.from_numpy(x)).numpy(), their_codes(x)
        counts["patterns"] += len(bits)
        counts["mismatches"] += np.count_nonzero(found != expected)
        counts["NaN"] += np.count_nonzero(found == hif8.NAN)
        infinite = (found == hif8.INF) | (found == hif8.NEGATIVE_INF)
        counts["finite to infinity"] += np.count_nonzero(infinite & np.isfinite(x))
        counts["not zero to zero"] += np.count_nonzero((found == hif8.ZERO) & (x != 0))
        if sys.stderr.isatty():
            print(f"{counts['patterns'] / (1 << 32):7.1%}", end="\r", file=sys.stderr)
    lines = [
        "HiFloat8 codes of all fp32 patterns, against en_dtypes",
        f"{software()}; {processor()}; {time.perf_counter() - started:.0f} s",
        *(f"{name:<20} {count:>13,}" for name, count in counts.items()),
    ]
    if counts["mismatches"]:
        lines.append("NOT EQUAL")
    return "\n".join(lines)


def their_codes(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # the cast of NaN and of what overflows
        return x.astype(en_dtypes.hifloat8).view(np.uint8)


# ---- speed


def speed() -> str:
    x = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    bandwidth = copy_bandwidth()
    lines = [
        "# HiFloat8 casts on a CPU",
        "",
        f"{software()}; {processor()}. {ELEMENTS:,} elements from N(0, 1), median of {REPEATS}.",
        f"`copy_` reads and writes {bandwidth / 1e9:.1f} GB/s together; `clone`, which like a cast writes",
        f"to fresh memory, {clone_bandwidth() / 1e9:.1f} GB/s. The floor is the time in which `copy_` moves the",
        "bytes of input and output: 100% would be a cast as fast as a copy. en_dtypes is single-threaded;",
        "having no cast of bf16, it is given fp32.",
        "",
        "| cast | from | to | 10^6 elements/s | floor | of the floor | en_dtypes | faster by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, dtype in DTYPES.items():
        wide, codes = x.to(dtype), hif8.encode(x.to(dtype))
        lines.append(row("encode", name, "code", encode_rate(wide), 1 + dtype.itemsize, bandwidth, theirs_encode(wide)))
        rate = round_trip_rate(wide)
        lines.append(row("round_to_grid", name, name, rate, 2 * dtype.itemsize, bandwidth, theirs_round_trip(wide)))
        rate = decode_rate(codes, dtype)
        lines.append(row("decode", "code", name, rate, 1 + dtype.itemsize, bandwidth, theirs_decode(codes, dtype)))
    # With a scale: amax reads everything once before the cast does.
    for name in ("bf16", "fp32"):
        wide, size = x.to(DTYPES[name]).view(-1, 1024), DTYPES[name].itemsize
        rate = wide.numel() / median_seconds(lambda t=wide: ops.hif8_quantize(t))
        theirs = theirs_quantize(wide)
        lines.append(row("quantize", name, "code, scale", rate, 2 * size + 1, bandwidth, theirs))
        rate = wide.numel() / median_seconds(lambda t=wide: ops.hif8_fake_quantize(t))
        theirs = theirs_fake_quantize(wide)
        lines.append(row("fake_quantize", name, name, rate, 3 * size, bandwidth, theirs))
    return "\n".join(lines)


def row(cast: str, source: str, target: str, rate: float, bytes_each: int, bandwidth: float, theirs: float) -> str:
    floor = bandwidth / bytes_each
    cells = [f"{rate / 1e6:.0f}", f"{floor / 1e6:.0f}", f"{rate / floor:.1%}", f"{theirs / 1e6:.0f}"]
    return f"| {cast} | {source} | {target} | " + " | ".join(cells) + f" | {rate / theirs:.1f} x |"


def theirs_quantize(x: torch.Tensor) -> float:
    """Scale and division by numpy, the cast by en_dtypes."""
    values = x.float().numpy()
    return x.numel() / median_seconds(lambda: their_codes(values / (np.abs(values).max() / np.float32(15))))


def theirs_fake_quantize(x: torch.Tensor) -> float:
    values = x.float().numpy()

    def round_trip() -> np.ndarray:
        scale = np.abs(values).max() / np.float32(15)
        with np.errstate(all="ignore"):
            return (values / scale).astype(en_dtypes.hifloat8).astype(np.float32) * scale

    return x.numel() / median_seconds(round_trip)


def copy_bandwidth() -> float:
    """Bytes per second, those read and those written together; far larger than any cache."""
    source = torch.ones(ELEMENTS * 4)
    target = torch.empty_like(source).fill_(0)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def clone_bandwidth() -> float:
    source = torch.ones(ELEMENTS)
    return 2 * source.nbytes / median_seconds(source.clone)


def encode_rate(x: torch.Tensor) -> float:
    return x.numel() / median_seconds(lambda: hif8.encode(x))


def round_trip_rate(x: torch.Tensor) -> float:
    return x.numel() / median_seconds(lambda: hif8.round_to_grid(x))


def decode_rate(codes: torch.Tensor, dtype: torch.dtype) -> float:
    return codes.numel() / median_seconds(lambda: hif8.decode(codes, dtype))


def as_numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def theirs_encode(x: torch.Tensor) -> float:
    given = as_numpy(x)
    return given.size / median_seconds(lambda: given.astype(en_dtypes.hifloat8))


def theirs_round_trip(x: torch.Tensor) -> float:
    given = as_numpy(x)
    return given.size / median_seconds(lambda: given.astype(en_dtypes.hifloat8).astype(given.dtype))


def theirs_decode(codes: torch.Tensor, dtype: torch.dtype) -> float:
    given, target = codes.numpy().view(en_dtypes.hifloat8), as_numpy(torch.empty(0, dtype=dtype)).dtype
    return given.size / median_seconds(lambda: given.astype(target))


def median_seconds(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
