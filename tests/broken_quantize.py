"""Kernels of the quantize family that are broken on purpose, each in one way: the reference with one fault."""

from __future__ import annotations

import torch

from ospnext.backends.reference import quantize as honest
from ospnext.backends.reference.quantized_linear import QuantizedLinear
from ospnext.numerics import carrier, hif8, scaling

# ---- encode


class TiesToEven:
    """Halves go to the neighbour whose mantissa is even, as in every other format."""

    contract = "hif8_encode"

    def __call__(self, x, saturate):
        codes = hif8.encode(x, saturate=saturate)
        wide = x.double()
        down = hif8.decode(hif8.encode(wide * (1 - 2.0**-40)), torch.float64)
        tied = (down != hif8.decode(codes, torch.float64)) & torch.isfinite(hif8.decode(codes))
        odd = (codes & 1) == 1
        return torch.where(tied & odd & (wide.abs() > 2.0**-15), hif8.encode(down), codes)


class TiesTowardsZero(TiesToEven):
    """Halves go to the smaller neighbour."""

    def __call__(self, x, saturate):
        return hif8.encode(x.double() * (1 - 2.0**-40), saturate=saturate)


class NoOverflow(TiesToEven):
    """Values beyond the range end up as its largest one, asked for or not."""

    def __call__(self, x, saturate):
        return hif8.encode(x, saturate=True)


class SaturateDropped(TiesToEven):
    """The argument `saturate` has no effect."""

    def __call__(self, x, saturate):
        return hif8.encode(x)


class FlushMissing(TiesToEven):
    """Whatever is not zero becomes at least the smallest value."""

    def __call__(self, x, saturate):
        tiny = (x != 0) & (x.abs() < 2.0**-22)
        return hif8.encode(torch.where(tiny, x.sign().double() * 2.0**-22, x.double()), saturate=saturate)


class HalfOfTheSmallestFlushed(TiesToEven):
    """2^-23 itself becomes zero."""

    def __call__(self, x, saturate):
        return hif8.encode(x, saturate=saturate).masked_fill(x.abs() == 2.0**-23, 0)


class NegativeZeroKept(TiesToEven):
    """-0, and what rounds to it, keeps its sign: the code of NaN."""

    def __call__(self, x, saturate):
        codes = hif8.encode(x, saturate=saturate)
        return codes.masked_fill((codes == 0) & torch.signbit(x), 0x80)


class NanBecomesInfinite(TiesToEven):
    """NaN becomes -Inf."""

    def __call__(self, x, saturate):
        return hif8.encode(x, saturate=saturate).masked_fill(x.isnan(), 0xEF)


class RoundsTwice(TiesToEven):
    """fp64 by way of bf16, which moves values onto ties."""

    def __call__(self, x, saturate):
        return hif8.encode(x.bfloat16(), saturate=saturate)


class LastElementsLost(TiesToEven):
    """What does not fill a block of 512 elements is not written."""

    def __call__(self, x, saturate):
        codes = hif8.encode(x, saturate=saturate)
        codes.view(-1)[codes.numel() // 512 * 512 :] = 0
        return codes


# ---- decode


class InfinityIsAValue:
    """0x6F is 1.5 * 2^15, the value whose place Inf takes."""

    contract = "hif8_decode"

    def __call__(self, codes, dtype):
        found = hif8.decode(codes, dtype)
        return torch.where(found.isinf(), found.sign() * 49152.0, found).to(dtype)


class NanIsNegativeZero(InfinityIsAValue):
    """0x80 is -0."""

    def __call__(self, codes, dtype):
        return hif8.decode(codes, dtype).nan_to_num(nan=-0.0, posinf=torch.inf, neginf=-torch.inf)


class SubnormalsTwiceAsLarge(InfinityIsAValue):
    """The powers of two below the normal values are one too large."""

    def __call__(self, codes, dtype):
        found = hif8.decode(codes, dtype)
        return torch.where(found.abs() < 2.0**-15, found * 2, found)


# ---- quantize


class Quantize:
    """The reference, in steps that can be broken."""

    contract = "hif8_quantize"

    def __call__(self, x, amax, *, scale_max, scale_mode, granularity):
        if amax is None:
            amax = self.amax(x, granularity)
        scale = self.scale(amax, scale_max, scale_mode)
        return self.codes(x, scale), scale

    def amax(self, x, granularity):
        return scaling.amax_of(x, granularity)

    def scale(self, amax, scale_max, scale_mode):
        return scaling.scale_of(amax, scale_max, scale_mode)

    def codes(self, x, scale):
        return hif8.encode((x if x.dtype == torch.float64 else x.float()) / scale)


class RankLocalAmax(Quantize):
    """A given amax is ignored: each rank scales by its own."""

    def __call__(self, x, amax, **settings):
        return super().__call__(x, None, **settings)


class OneScaleForAll(Quantize):
    """The amax of the tensor, whatever was asked for."""

    def amax(self, x, granularity):
        found = scaling.amax_of(x, granularity)
        return found.amax().expand(found.shape).contiguous() if found.numel() else found


class LargestNotMagnitude(Quantize):
    """The amax of positive values only."""

    def amax(self, x, granularity):
        return scaling.amax_of(x.clamp_min(0), granularity)


class ScaleInBf16(Quantize):
    """The scale is computed in the dtype of x."""

    def scale(self, amax, scale_max, scale_mode):
        return super().scale(amax, scale_max, scale_mode).bfloat16().float()


class PowerOfTwoBelow(Quantize):
    """The power of two at or below amax / scale_max: the largest values exceed scale_max."""

    def scale(self, amax, scale_max, scale_mode):
        scale = super().scale(amax, scale_max, scale_mode)
        above = scale * scale_max >= 2 * amax
        return scale if scale_mode == "amax" else torch.where(above, scale, torch.where(amax > 0, scale / 2, scale))


class ZeroHasNoScale(Quantize):
    """The scale of nothing but zeros is the smallest one and not 1."""

    def scale(self, amax, scale_max, scale_mode):
        return super().scale(amax.clamp_min(1e-12), scale_max, scale_mode)


class NanSurvivesAlone(Quantize):
    """Only the element that is not finite is lost, and not what shares its scale."""

    def amax(self, x, granularity):
        return scaling.amax_of(torch.where(torch.isfinite(x), x, 0), granularity)


class ScaleIgnored(Quantize):
    """Values are encoded as they are."""

    def codes(self, x, scale):
        return super().codes(x, torch.ones_like(scale))


class ScaleAppliedTwice(Quantize):
    """Values are divided by the scale twice."""

    def codes(self, x, scale):
        return super().codes(x, scale * scale)


class ReciprocalProduct(Quantize):
    """Values are multiplied by the rounded reciprocal of the scale."""

    def codes(self, x, scale):
        return hif8.encode((x if x.dtype == torch.float64 else x.float()) * (1 / scale))


class CarriedScaleKept:
    """Carried numbers are 16 times the values, and their scale is that of the values."""

    contract = "hif8_quantize"
    features = frozenset({"carried"})

    def __call__(self, x, amax, *, carried=False, **settings):
        codes, scale = honest.quantize(x, amax, **settings)
        return (self.carry(codes, settings["scale_max"]) if carried else codes), scale

    def carry(self, codes, scale_max):
        return carrier.carry(codes, torch.ones(()), scale_max)[0]


class CarriedUnshifted(CarriedScaleKept):
    """Carried numbers are the values themselves, so that E4M3 rounds more of the small ones away."""

    def carry(self, codes, scale_max):
        return hif8.decode(codes).to(carrier.DTYPE)


# ---- fake quantize


class NotScaledBack:
    """The values of the grid, without their scale."""

    contract = "hif8_fake_quantize"

    def __call__(self, x, amax, **settings):
        codes, _ = honest.quantize(x, amax, **settings)
        return hif8.decode(codes, x.dtype)


class NotRounded(NotScaledBack):
    """x itself."""

    def __call__(self, x, amax, **settings):
        return x.clone(memory_format=torch.contiguous_format)


class RankLocalRoundTrip(NotScaledBack):
    """A given amax is ignored."""

    def __call__(self, x, amax, **settings):
        return honest.fake_quantize(x, None, **settings)


# ---- linear


class Linear(QuantizedLinear):
    contract = "quantized_linear"


class ScaleOfXIgnored(Linear):
    """The scale of x has no effect."""

    def forward(self, x_codes, x_scale, *rest, **how):
        return super().forward(x_codes, torch.ones_like(x_scale), *rest, **how)


class ScaleOfWeightIgnored(Linear):
    """The scale of the weight has no effect."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, *rest, **how):
        return super().forward(x_codes, x_scale, weight_codes, torch.ones_like(weight_scale), *rest, **how)


class ScalesAppliedTwice(Linear):
    """The scale of x acts twice."""

    def forward(self, x_codes, x_scale, *rest, **how):
        return super().forward(x_codes, x_scale * x_scale, *rest, **how)


class BiasBeforeScales(Linear):
    """(x w + bias) * s_x * s_w."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, **how):
        if bias is not None:
            bias = bias.float() * weight_scale.reshape(-1) * x_scale.reshape(-1)[0] if x_scale.numel() else bias
        return super().forward(x_codes, x_scale, weight_codes, weight_scale, bias, **how)


class BiasDropped(Linear):
    """No bias."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, **how):
        return super().forward(x_codes, x_scale, weight_codes, weight_scale, None, **how)


class SumsInBf16(Linear):
    """Sums of 64 products are rounded to bf16 before they are added."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, *, dtype, **_):
        total = torch.zeros(())
        for x, w in zip(x_codes.split(64, -1), weight_codes.split(64, -1), strict=True):
            part = super().forward(x, torch.ones_like(x_scale), w, torch.ones_like(weight_scale), None, **_FP32)
            total = (total + part).bfloat16().float()
        y = total * x_scale * weight_scale.reshape(-1)
        return (y if bias is None else y + bias).to(dtype)


class SumsKeep14Bits(Linear):
    """Sums lose what tensor cores lose where speed is asked for; here it was not."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, bias, *, dtype, **_):
        total = torch.zeros(())
        for x, w in zip(x_codes.split(32, -1), weight_codes.split(32, -1), strict=True):
            part = super().forward(x, torch.ones_like(x_scale), w, torch.ones_like(weight_scale), None, **_FP32)
            total = ((total + part).view(torch.int32) & ~0x3FF).view(torch.float32)
        y = total * x_scale * weight_scale.reshape(-1)
        return (y if bias is None else y + bias).to(dtype)


class LastFeaturesNotAdded(Linear):
    """What does not fill a tile of 32 input features is left out of the sum."""

    def forward(self, x_codes, x_scale, weight_codes, *rest, **how):
        inner = weight_codes.shape[1] // 32 * 32
        return super().forward(x_codes[..., :inner], x_scale, weight_codes[:, :inner], *rest, **how)


class LastTokensLost(Linear):
    """What does not fill a tile of 32 tokens is not written."""

    def forward(self, *args, **how):
        y = super().forward(*args, **how)
        y.view(-1, y.shape[-1])[y[..., :1].numel() // 32 * 32 :] = 0
        return y


class OneScalePerTensor(Linear):
    """The scale of the first row serves all."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, *rest, **how):
        first = x_scale.reshape(-1)[:1].reshape([1] * x_scale.ndim) if x_scale.numel() else x_scale
        return super().forward(x_codes, first, weight_codes, weight_scale, *rest, **how)


class NanInWeightsLost(Linear):
    """Codes that are not finite count as zero."""

    def forward(self, x_codes, x_scale, weight_codes, weight_scale, *rest, **how):
        return super().forward(x_codes, x_scale, weight_codes, weight_scale.nan_to_num(nan=0.0), *rest, **how)


class NeverFp64(Linear):
    """Sums in fp32 where fp64 was asked for."""

    def forward(self, *args, **how):
        return super().forward(*args, **how | {"accumulate": "fp32"})


class GradientNotScaled(Linear):
    """dx without the scale of the gradient."""

    def backward(self, grad_codes, grad_scale, *rest, **how):
        _, dweight, dbias = super().backward(grad_codes, grad_scale, *rest, **how)
        return super().backward(grad_codes, torch.ones_like(grad_scale), *rest, **how)[0], dweight, dbias


class WeightGradientOfHalfTheTokens(Linear):
    """dweight adds the tokens of the first half only."""

    def backward(self, grad_codes, grad_scale, x_codes, *rest, **how):
        dx, _, dbias = super().backward(grad_codes, grad_scale, x_codes, *rest, **how)
        half = slice(0, max(1, len(x_codes) // 2))
        return dx, super().backward(grad_codes[half], grad_scale, x_codes[half], *rest, **how)[1], dbias


class BiasGradientNotScaled(Linear):
    """dbias adds grid values."""

    def backward(self, grad_codes, grad_scale, *rest, **how):
        dx, dweight, _ = super().backward(grad_codes, grad_scale, *rest, **how)
        return dx, dweight, super().backward(grad_codes, torch.ones_like(grad_scale), *rest, **how)[2]


class WeightGradientInTheDtypeOfX(Linear):
    """dweight is bf16 where the weight is fp32."""

    def backward(self, *args, dtypes, **how):
        return super().backward(*args, dtypes=(dtypes[0], dtypes[0], dtypes[2]), **how)


class CodesWritten(Linear):
    """Decodes the weight where it is."""

    def forward(self, x_codes, x_scale, weight_codes, *rest, **how):
        y = super().forward(x_codes, x_scale, weight_codes, *rest, **how)
        weight_codes.bitwise_xor_(1)
        return y


_FP32 = {"dtype": torch.float32, "accumulate": "fp32", "scale_max": 15.0}
