"""Acme's HiFloat8: codes by arithmetic on the bits of fp32, values by arithmetic on the bits of codes; no table."""

import math

import torch

NAN, INF, LARGEST = 0x80, 0x6F, 0x6E
E4M3, LARGEST_E4M3 = torch.float8_e4m3fn, 448.0


def encode(x, saturate):
    if x.dtype == torch.float64:  # cut off, but not to a tie: what was cut is left as one low bit
        cut = x.float()
        beyond = cut.abs().double() > x.abs()
        bits = cut.view(torch.int32) - beyond.int()
        bits = torch.where((cut.double() != x) & torch.isfinite(cut), bits | 1, bits)
        return _encode_bits(torch.where(x.isnan(), cut.view(torch.int32), bits), saturate)
    return _encode_bits(x.float().contiguous().view(torch.int32), saturate)


def _encode_bits(bits, saturate):
    magnitude = bits & 0x7FFFFFFF
    distance = ((magnitude >> 23) - 127).abs()
    kept = (distance <= 3).int() + (distance <= 7).int() + (distance <= 15).int()
    rounded = (magnitude + (1 << (22 - kept))) >> (23 - kept) << (23 - kept)
    rounded = rounded.clamp_min((127 - 22) << 23)
    exponent = (rounded >> 23) - 127
    g, sign = exponent.abs(), (exponent < 0).int()
    code = 0x08 | (rounded >> 20 & 7)
    for first, prefix, width, bits_kept in ((1, 0x10, 0, 3), (2, 0x20, 1, 3), (4, 0x40, 2, 2), (8, 0x60, 3, 1)):
        mantissa = rounded >> (23 - bits_kept) & ((1 << bits_kept) - 1)
        fields = prefix | sign << (width + bits_kept) | (g - first) << bits_kept | mantissa
        code = torch.where(g >= first, fields, code)
    code = torch.where(exponent <= -16, exponent + 23, code)
    code = torch.where(magnitude >= 0x47200000, LARGEST if saturate else INF, code)
    code = torch.where(bits < 0, code | 0x80, code)
    code = torch.where(magnitude < (127 - 23) << 23, 0, code)
    return torch.where(magnitude > 0x7F800000, NAN, code).to(torch.uint8)


def decode(codes, dtype):
    if codes.dtype == E4M3:  # carried codes are numbers
        return codes.to(dtype)
    codes = codes.contiguous()
    low, negative = (codes & 0x7F).int(), codes >= 0x80
    value = torch.ldexp(torch.ones(low.shape), low - 23)
    for first, exponent_bits, kept in ((0x08, 0, 3), (0x10, 1, 3), (0x20, 2, 3), (0x40, 3, 2), (0x60, 4, 1)):
        field = (low >> kept) & ((1 << exponent_bits) - 1)
        width = max(exponent_bits - 1, 0)
        exponent = (1 << width | field & ((1 << width) - 1)) if exponent_bits else torch.zeros_like(low)
        exponent = torch.where((field >> width & 1) == 1, -exponent, exponent) if exponent_bits else exponent
        mantissa = 1 + (low & ((1 << kept) - 1)) / (1 << kept)
        value = torch.where(low >= first, torch.ldexp(mantissa, exponent), value)
    value = torch.where(low == INF, torch.inf, value)
    value = torch.where(low == 0, torch.where(negative, torch.nan, 0.0), value)
    return torch.where(negative, -value, value).to(dtype)


def quantize(x, amax, *, scale_max, scale_mode, granularity, carried=False):
    scale = _scale(x, amax, scale_max, scale_mode, granularity)
    codes = encode(_wide(x) / scale, False)
    if not carried:
        return codes, scale
    power = 2.0 ** min(8, math.floor(math.log2(LARGEST_E4M3 / scale_max)))
    numbers = decode(codes, torch.float32) * power
    return numbers.masked_fill(numbers.abs() > LARGEST_E4M3, torch.nan).to(E4M3), scale / power


def fake_quantize(x, amax, **settings):
    codes, scale = quantize(x, amax, **settings)
    return (decode(codes, _wide(x).dtype) * scale).to(x.dtype)


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _scale(x, amax, scale_max, scale_mode, granularity):
    if amax is None:
        dims = {"tensor": tuple(range(x.ndim)), "row": (-1,), "channel": (-2,)}[granularity]
        shape = [1 if d in dims or d - x.ndim in dims else n for d, n in enumerate(x.shape)]
        amax = x.abs().amax(dims, keepdim=True).float() if x.numel() else torch.zeros(shape)
    scale = amax.clamp_min(1e-12) / torch.tensor(scale_max)
    if scale_mode == "pow2":
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), (exponent - (mantissa == 0.5).int()).clamp_max(127))
    return torch.where(amax == 0, 1.0, torch.where(torch.isfinite(amax), scale, torch.nan))


class Linear:
    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, *, dtype, accumulate, scale_max):
        y = _product(x_codes, weight_codes, accumulate, dtype) * x_scale * weight_scale.reshape(-1)
        return (y if bias is None else y + bias).to(dtype)

    def backward(
        self, grad_codes, grad_scale, x_codes, x_scale, weight_codes, weight_scale, *, dtypes, accumulate, **scales
    ):
        grad_codes = grad_codes.reshape(-1, grad_codes.shape[-1])
        wide = (accumulate, *[d for d in dtypes if d is not None])
        found = [None, None, None]
        if dtypes[0] is not None:
            found[0] = _product(grad_codes, weight_codes.T, *wide) * grad_scale.view(1, 1) * weight_scale
            found[0] = found[0].view(x_codes.shape).to(dtypes[0])
        if dtypes[1] is not None:
            x_codes = x_codes.reshape(-1, x_codes.shape[-1])
            found[1] = (_product(grad_codes.T, x_codes.T, *wide) * grad_scale.view(1, 1) * x_scale.view(1, 1)).to(
                dtypes[1]
            )
        if dtypes[2] is not None:
            ones = encode(torch.ones(1, len(grad_codes)), False)
            found[2] = (_product(ones, grad_codes.T, *wide)[0] * grad_scale.view(1)).to(dtypes[2])
        return found


def _product(a, b, accumulate, *dtypes):
    """Codes a [..., K] times codes b [N, K], 32 input features at a time."""
    wide = torch.float64 if accumulate == "fp64" or torch.float64 in dtypes else torch.float32
    total = torch.zeros(*a.shape[:-1], len(b), dtype=wide)
    for left, right in zip(a.split(32, -1), b.split(32, -1), strict=True):
        total += decode(left, wide) @ decode(right, wide).T
    return total


linear = Linear()
