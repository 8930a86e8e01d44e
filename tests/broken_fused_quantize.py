"""Fused kernels that end in HiFloat8 codes and are broken on purpose, each in one way."""

from __future__ import annotations

from broken_fused import Honest

from ospnext.backends.reference.quantize import fake_quantize, quantize
from ospnext.numerics.carrier import shift_for
from ospnext.ops.contracts import CONTRACTS


class Quantizing(Honest):
    """The plain definition and the quantizer of the reference, in steps that can be broken."""

    def forward(self, *args):
        *operands, scale_max, scale_mode, granularity, carried = args
        return self.quantize(self.plain(*operands), scale_max, scale_mode, granularity, carried)

    def plain(self, *operands):
        return CONTRACTS[f"fused.{self.operator.removesuffix('_quantize')}"].composite.forward(*operands)

    def quantize(self, y, scale_max, scale_mode, granularity, carried, amax=None):
        scaling = {"scale_max": scale_max, "scale_mode": scale_mode, "granularity": granularity}
        return quantize(y, amax, carried=carried, **scaling)


class ScaleOfTheTensor(Quantizing):
    """One scale for all rows, from the largest magnitude of the tensor."""

    operator = "layer_norm_modulate_quantize"

    def quantize(self, y, *scaling):
        return super().quantize(y, *scaling, amax=y.abs().amax().float().expand(*y.shape[:-1], 1))


class QuantizesBeforeModulation(Quantizing):
    """The norm makes a round trip before it is modulated."""

    operator = "layer_norm_modulate_quantize"

    def forward(self, x, weight, bias, shift, scale, eps, scale_max, scale_mode, granularity, carried):
        y = self.plain(x, weight, bias, None, None, eps)
        y = fake_quantize(y, None, scale_max=scale_max, scale_mode=scale_mode, granularity=granularity)
        if scale is not None:
            y = (y * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(x.dtype)
        return self.quantize(y, scale_max, scale_mode, granularity, carried)


class ScaleBeforeModulation(Quantizing):
    """The largest magnitude is that of the norm before it is modulated."""

    operator = "layer_norm_modulate_quantize"

    def forward(self, x, weight, bias, shift, scale, eps, *scaling):
        amax = self.plain(x, weight, bias, None, None, eps).abs().amax(-1, keepdim=True).float()
        return self.quantize(self.plain(x, weight, bias, shift, scale, eps), *scaling, amax=amax)


class CarriedScaleNotDivided(Quantizing):
    """Carried codes come with the scale of the HiFloat8 ones."""

    operator = "layer_norm_modulate_quantize"

    def quantize(self, y, scale_max, scale_mode, granularity, carried):
        codes, scale = super().quantize(y, scale_max, scale_mode, granularity, carried)
        return codes, scale * 2.0 ** shift_for(scale_max) if carried else scale


class CarriedForgotten(Quantizing):
    """Codes are HiFloat8 ones, whatever was asked for."""

    operator = "gelu_tanh_quantize"

    def quantize(self, y, scale_max, scale_mode, granularity, carried):
        return super().quantize(y, scale_max, scale_mode, granularity, False)


class ScaleSettingsForgotten(Quantizing):
    """Scales are those of the usual settings."""

    operator = "gelu_tanh_quantize"

    def quantize(self, y, scale_max, scale_mode, granularity, carried):
        return super().quantize(y, 15.0, "amax", granularity, carried)


class CodesOfX(Quantizing):
    """The scale is that of the result, the codes are those of what went in."""

    operator = "gelu_tanh_quantize"

    def forward(self, x, *scaling):
        amax = self.plain(x).abs().amax(-1, keepdim=True).float()
        return self.quantize(x, *scaling, amax=amax)


class NanIsNotTheLargest(Quantizing):
    """The largest magnitude passes over NaN, which so reaches its own code only."""

    operator = "gelu_tanh_quantize"

    def quantize(self, y, *scaling):
        return super().quantize(y, *scaling, amax=y.nan_to_num(0.0).abs().amax(-1, keepdim=True).float())


class NanOfOneRowInAll(Quantizing):
    """One row that is not finite makes every scale NaN."""

    operator = "layer_norm_modulate_quantize"

    def quantize(self, y, *scaling):
        codes, scale = super().quantize(y, *scaling)
        return codes, scale + 0 * scale.sum()


class ScaleOfTheFirstRow(Quantizing):
    """The scale for all is that of the first row of each sample."""

    operator = "layer_norm_modulate_quantize"

    def quantize(self, y, scale_max, scale_mode, granularity, carried):
        amax = y[:1, :1].abs().amax(-1, keepdim=True).float() if granularity == "tensor" else None
        return super().quantize(y, scale_max, scale_mode, granularity, carried, amax=amax)


class ZeroRowHasNoScale(Quantizing):
    """A row of zeros is scaled by next to nothing, as if its largest magnitude were the smallest that counts."""

    operator = "gelu_tanh_quantize"

    def quantize(self, y, *scaling):
        return super().quantize(y, *scaling, amax=y.abs().amax(-1, keepdim=True).float().clamp_min(1e-12))


class QuantizedInPlace(Quantizing):
    """Writes the result before quantization over x."""

    operator = "layer_norm_modulate_quantize"

    def plain(self, x, *rest):
        return x.copy_(super().plain(x, *rest))


class LosesRowsPast65535(Quantizing):
    """Codes of rows beyond the limit of a grid are never written."""

    def quantize(self, y, *scaling):
        codes, scale = super().quantize(y, *scaling)
        codes[:, 65_535:] = 0
        return codes, scale
