"""HiFloat8 against en_dtypes, an independent implementation, and against exact fractions; scales against numpy.

Codes of all 16-bit inputs are compared, a sweep over fp32 and whatever lies next to a boundary between two codes."""

from __future__ import annotations

import bisect
import itertools
import math
import subprocess
import sys
from fractions import Fraction

import en_dtypes
import numpy as np
import pytest
import torch

from ospnext.numerics import hif8
from ospnext.numerics.scaling import SCALE_MODES, scale_of

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
CODES = torch.arange(256, dtype=torch.uint8)


def defined_value(code: int) -> float:
    """From the string of bits: sign, prefix, sign and magnitude of the exponent, mantissa."""
    sign, low = (-1.0, 1.0)[code < 128], f"{code:08b}"[1:]
    if low == "0000000":
        return 0.0 if code == 0 else math.nan
    if low == "1101111":
        return sign * math.inf
    if low.startswith("0000"):
        return math.ldexp(sign, int(low, 2) - 23)
    if low.startswith("0001"):
        exponent, mantissa = 0, low[4:]
    else:
        prefix, free = next((p, n) for p, n in (("001", 0), ("01", 1), ("10", 2), ("11", 3)) if low.startswith(p))
        field, mantissa = low[len(prefix) :][: 1 + free], low[len(prefix) + 1 + free :]
        exponent = (1, -1)[int(field[0])] * int("1" + field[1:], 2)
    return math.ldexp(sign * int("1" + mantissa, 2), exponent - len(mantissa))


VALUES = [defined_value(code) for code in range(256)]
CODE_OF = {value: code for code, value in enumerate(VALUES) if not math.isnan(value)}
POSITIVE = sorted(v for v in VALUES if 0 < v < math.inf)
# Infinity is rounded to as if it stood where the next value would.
GRID = [Fraction(v) for v in (0.0, *POSITIVE, 1.5 * 2**15)]
MIDPOINTS = [float((low + high) / 2) for low, high in itertools.pairwise(GRID)]


def nearest(x: float) -> int:
    """Code of the grid value nearest to x, halves away from zero, without any rounding on the way."""
    magnitude = min(Fraction(abs(x)), GRID[-1]) if math.isfinite(x) else GRID[-1]
    i = min(bisect.bisect_right(GRID, magnitude), len(GRID) - 1)
    i -= 2 * magnitude < GRID[i - 1] + GRID[i]
    return CODE_OF[math.copysign(math.inf if i == len(GRID) - 1 else float(GRID[i]), x)]


def oracle(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # the cast of NaN and of what overflows
        return x.astype(np.float32).astype(en_dtypes.hifloat8).view(np.uint8)


def edges_of_fp32() -> np.ndarray:
    """What lies within 2 ulp of a grid value or midpoint, of zero, infinity and the ends of the NaN patterns."""
    centres = np.array([0, *POSITIVE, *MIDPOINTS, 2.0**-126, math.inf], dtype=np.float32)
    bits = (centres.view(np.uint32).astype(np.int64)[:, None] + np.arange(-2, 3)).ravel()
    bits = np.concatenate([bits, [0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF]])
    bits = np.unique(bits & 0x7FFFFFFF)
    return np.concatenate([bits, bits | 0x80000000]).astype(np.uint32).view(np.float32)


def edges_of_fp64() -> np.ndarray:
    """One ulp beside grid values and midpoints, and exponents and NaN patterns that fp32 does not have."""
    centres = np.array([*POSITIVE, *MIDPOINTS])
    far = [0, 2.0**-1074, 2.0**-1022, 2.0**-150, 2.0**-149, 2.0**-127, 1.5 * 2.0**-127, 1.9 * 2.0**127, 2.0**128]
    far += [1.5 * 2.0**128, 2.0**129, np.finfo(np.float64).max, math.inf]
    nan = np.array([0x7FF0000000000001, 0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF], dtype=np.int64).view(np.float64)
    found = np.concatenate([centres, np.nextafter(centres, 0), np.nextafter(centres, math.inf), far, nan])
    return np.concatenate([found, -found])


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """Every pattern of 16 bits; all that is near a boundary of wider ones."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return torch.from_numpy(edges_of_fp32() if dtype == torch.float32 else edges_of_fp64())


def as_fp32(x: torch.Tensor) -> np.ndarray:
    return x.float().numpy()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, except that one NaN is as good as another."""
    assert found.dtype == expected.dtype
    assert torch.equal(found.isnan(), expected.isnan())
    bits = BITS[found.dtype]
    assert torch.equal(found[~found.isnan()].view(bits), expected[~expected.isnan()].view(bits))


# ---- the format


def test_values_are_those_of_the_definition_and_of_en_dtypes():
    theirs = CODES.numpy().view(en_dtypes.hifloat8).astype(np.float64)
    for ours in ([hif8.value_of(code) for code in range(256)], hif8.decode(CODES, torch.float64).tolist(), theirs):
        np.testing.assert_array_equal(np.array(ours), np.array(VALUES))


def test_population_and_constants():
    info = hif8.INFO
    finite = {v for v in VALUES if math.isfinite(v)}
    assert (len(POSITIVE), len(finite), sum(map(math.isinf, VALUES)), sum(map(math.isnan, VALUES))) == (126, 253, 2, 1)
    assert (info.bits, info.max, info.min) == (8, 32768.0, -32768.0) == (8, max(finite), min(finite))
    assert info.smallest_subnormal == 2.0**-22 == POSITIVE[0]
    assert info.tiny == 2.0**-15 == min(VALUES[0x08:0x80])
    assert info.eps == 0.125 == POSITIVE[POSITIVE.index(1.0) + 1] - 1.0
    assert (info.overflow, info.underflow) == (40960.0, 2.0**-23) == (MIDPOINTS[-1], MIDPOINTS[0])
    assert (info.max_of_3_bits, info.max_of_2_bits) == (15.0, 224.0) == (max(VALUES[:0x40]), max(VALUES[:0x60]))
    assert [VALUES[code] for code in (0x08, 0x2F, 0x4F, 0x6E, 0x01)] == [1.0, 15.0, 224.0, 32768.0, 2.0**-22]
    assert [CODE_OF[v] for v in (0.0, math.inf, -math.inf)] == [hif8.ZERO, hif8.INF, hif8.NEGATIVE_INF]
    assert math.isnan(VALUES[hif8.NAN])


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_survive_a_round_trip_and_none_is_minus_zero(dtype):
    values = hif8.decode(CODES, dtype)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values.double().numpy(), np.array(VALUES))
    assert not values[values == 0].signbit().any()
    assert torch.equal(hif8.encode(values), CODES)


# ---- rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_go_away_from_zero(dtype):
    x = torch.tensor([2.0**-23, 1.5 * 2.0**-22, 1.0625, 15.5, 18.0, 240.0, 28672.0, 40960.0], dtype=dtype)
    rounded = [2.0**-22, 2.0**-21, 1.125, 16.0, 20.0, 256.0, 32768.0, math.inf]
    assert hif8.round_to_grid(x).tolist() == rounded
    assert hif8.round_to_grid(-x).tolist() == [-value for value in rounded]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_codes_of_all_16_bit_patterns_and_all_edges_of_fp32(dtype, device):
    x = inputs(dtype)
    np.testing.assert_array_equal(hif8.encode(x.to(device)).cpu().numpy(), oracle(as_fp32(x)))


def test_codes_of_a_sweep_over_fp32():
    bits = np.arange(0, 1 << 32, 251, dtype=np.uint32)
    assert len(bits) >= 1 << 24
    x = bits.view(np.float32)
    assert np.array_equal(hif8.encode(torch.from_numpy(x)).numpy(), oracle(x))


def test_codes_of_fp64_that_fp32_holds_exactly():
    for x in (inputs(torch.float32), inputs(torch.bfloat16), inputs(torch.float16), torch.tensor(MIDPOINTS).float()):
        np.testing.assert_array_equal(hif8.encode(x.double()).numpy(), oracle(as_fp32(x)))


@pytest.mark.parametrize("sign", [1, -1])
def test_fp64_is_rounded_once(sign):
    centres = sign * np.array(MIDPOINTS)
    below, above = np.nextafter(centres, 0), np.nextafter(centres, sign * math.inf)
    found = [hif8.encode(torch.from_numpy(x)).tolist() for x in (below, centres, above)]
    assert found == [[nearest(x) for x in xs] for xs in (below, centres, above)]
    assert found[1] == found[2]
    # fp32 holds none of those just below: by way of it they would all be rounded twice.
    by_way_of_fp32 = hif8.encode(torch.from_numpy(below).float()).tolist()
    assert all(a != b for a, b in zip(found[0], by_way_of_fp32, strict=True))


def test_fp64_against_fractions():
    rng = np.random.default_rng(0)
    random = np.ldexp(rng.uniform(1, 2, 4000), rng.integers(-26, 18, 4000)) * rng.choice([-1, 1], 4000)
    for x in (random, edges_of_fp64()):
        expected = [hif8.NAN if math.isnan(v) else nearest(v) for v in x.tolist()]
        np.testing.assert_array_equal(hif8.encode(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_saturation_changes_nothing_but_infinity(dtype):
    x = inputs(dtype)
    expected, saturated = hif8.encode(x), hif8.encode(x, saturate=True)
    assert {hif8.INF, hif8.NEGATIVE_INF, hif8.NAN} < set(expected.tolist())
    expected[expected == hif8.INF] = 0x6E
    expected[expected == hif8.NEGATIVE_INF] = 0xEE
    assert torch.equal(saturated, expected)
    assert_same(hif8.round_to_grid(x, saturate=True), hif8.decode(expected, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_to_grid_is_decode_of_encode(dtype, device):
    x = inputs(dtype).to(device)
    assert_same(hif8.round_to_grid(x), hif8.decode(hif8.encode(x), dtype))


# ---- tensors


LAYOUTS = {
    "empty": lambda x: x[:0],
    "of no dimension": lambda x: x[3, 5],
    "transposed": lambda x: x.t(),
    "strided": lambda x: x[1::2, ::3],
    "offset": lambda x: x[1:, 3:],
    "expanded": lambda x: x[:, :1].expand(-1, 7),
    "permuted": lambda x: x.view(4, 2, 15).permute(2, 0, 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_contiguous_results_and_is_left_alone(layout, dtype):
    storage = 8 * torch.randn(8, 15, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, x = storage.clone(), LAYOUTS[layout](storage)
    expected = torch.from_numpy(np.array(oracle(as_fp32(x))))
    codes, values = hif8.encode(x), hif8.round_to_grid(x)
    assert torch.equal(codes, expected) and codes.shape == x.shape
    assert torch.equal(values, hif8.decode(expected, dtype))
    decoded = hif8.decode(LAYOUTS[layout](hif8.encode(storage)), dtype)
    assert torch.equal(decoded, values)
    assert (codes.dtype, values.dtype, decoded.dtype) == (torch.uint8, dtype, dtype)
    assert codes.is_contiguous() and values.is_contiguous() and decoded.is_contiguous()
    assert torch.equal(storage, before)


@pytest.mark.parametrize("size", [(1 << 18) - 1, 1 << 18, (1 << 18) + 1, (1 << 19) + 1])
def test_sizes_around_the_block(size):
    x = 8 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    codes = hif8.encode(x)
    np.testing.assert_array_equal(codes.numpy(), oracle(x.numpy()))
    values = torch.tensor(VALUES)[codes.long()]
    assert torch.equal(hif8.decode(codes), values) and torch.equal(hif8.round_to_grid(x), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_meta_tensors_have_shape_and_dtype(dtype):
    x = torch.empty(3, 5, dtype=dtype, device="meta").t()
    codes = hif8.encode(x)
    for found, expected in ((codes, torch.uint8), (hif8.round_to_grid(x), dtype), (hif8.decode(codes, dtype), dtype)):
        assert (found.shape, found.dtype, found.device.type) == ((5, 3), expected, "meta")


def test_first_use_under_inference_mode_does_not_spoil_training():
    for table in (hif8._codes_by_key, hif8._values_by_key, hif8._decoding):
        table.cache_clear()
    weight = torch.linspace(-3, 3, 64, requires_grad=True)
    with torch.inference_mode():
        first = hif8.decode(hif8.encode(weight))
        hif8.round_to_grid(weight)
        assert first.is_inference()
    assert not hif8._codes_by_key(weight.device, False).is_inference()
    assert not hif8._values_by_key(weight.device, torch.float32, False).is_inference()
    assert not hif8._decoding(weight.device, torch.float32).is_inference()
    rounded = hif8.round_to_grid(weight.detach())
    (rounded * weight).sum().backward()
    np.testing.assert_array_equal(weight.grad.numpy(), first.numpy())


def test_other_dtypes_are_refused():
    for dtype in (torch.int32, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn):
        for call in (hif8.encode, hif8.round_to_grid):
            with pytest.raises(TypeError, match=f"from fp64, fp32, bf16 or fp16; got {dtype}"):
                call(torch.zeros(2).to(dtype))
    for codes, dtype in ((torch.int8, torch.float32), (torch.float32, torch.float32), (torch.uint8, torch.int32)):
        with pytest.raises(TypeError, match=f"codes are uint8 .* got {codes}, {dtype}"):
            hif8.decode(torch.zeros(2, dtype=codes), dtype)


MEMORY = """
import torch
from ospnext.numerics import hif8

def status(field):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) * 1024

x = torch.full((10**8,), 1.3, dtype=torch.bfloat16)
hif8.encode(x[:1000])
before = status("VmRSS")
codes = hif8.encode(x)
print(before, status("VmHWM"))
"""


def test_encode_needs_little_memory_beside_its_result():
    """Steps over the whole tensor would hold its 200 MB several times."""
    before, peak = map(int, subprocess.check_output([sys.executable, "-c", MEMORY], text=True).split())
    result = 10**8
    assert result * 0.9 < peak - before < result + 0.25 * 2 * 10**8


# ---- scales


def largest_magnitudes() -> np.ndarray:
    rng = np.random.default_rng(2)
    random = np.ldexp(rng.uniform(1, 2, 20000), rng.integers(-60, 127, 20000))
    powers = np.ldexp(1.0, np.arange(-149, 128))
    found = np.concatenate([random, powers, 15 * powers[100:260], 224 * powers[100:250], [1e-12, 9e-13, 3e38, 15.0]])
    found = found.astype(np.float32)
    return np.concatenate([found, np.nextafter(found, np.float32(0)), np.nextafter(found, np.float32(3.4e38))])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_max", [1.0, 15.0, 224.0, 448.0, 32768.0])
def test_scales(scale_max, device):
    amax = largest_magnitudes()
    amax = amax[amax > 0]
    quotient = np.maximum(amax, np.float32(1e-12)) / np.float32(scale_max)
    exact = scale_of(torch.from_numpy(amax).to(device), scale_max).cpu().numpy()
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(exact, quotient)

    powers = scale_of(torch.from_numpy(amax).to(device), scale_max, "pow2").cpu().numpy()
    assert powers.dtype == np.float32
    split = [math.frexp(q) for q in quotient.tolist()]  # q = m 2^e with m in [1/2, 1)
    # fp32 has no 2^128.
    expected = [math.ldexp(1.0, min(e - (m == 0.5), 127)) for m, e in split]
    np.testing.assert_array_equal(powers, expected)


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_scale_of_nothing_is_1_and_of_what_is_not_finite_nan(mode):
    scale = scale_of(torch.tensor([0.0, -0.0, math.inf, math.nan]), 15.0, mode)
    np.testing.assert_array_equal(scale.numpy(), np.array([1, 1, math.nan, math.nan], dtype=np.float32))
    assert scale_of(torch.tensor(3e38), 1.0, "pow2").item() == 2.0**127
    assert scale_of(torch.tensor(0.0), 15.0, mode).item() == 1.0
