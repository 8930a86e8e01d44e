"""Fused kernels that are broken on purpose, each in one way: the definition of a contract with one fault. URLs are the
reports of users whom the fault hurt.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F

from ospnext.ops.contracts import CONTRACTS
from ospnext.ops.contracts import fused_definitions as define


class Honest:
    """The definition of a contract, as a kernel."""

    def __init__(self, operator: str = "") -> None:
        self.operator = operator or self.operator

    operator = ""

    @property
    def names(self):
        """Of the arguments of `forward`."""
        return inspect.signature(self.definition.forward).parameters

    @property
    def definition(self):
        return CONTRACTS[f"fused.{self.operator}"].composite

    def forward(self, *args):
        return self.definition.forward(*args)

    def backward(self, grad, *args):
        return self.definition.backward(grad, *args)


# ---- rope


class WrongRopePairing(Honest):
    """Channel i is paired with i + D/2, as other models do it."""

    operator = "rope"

    def forward(self, x, cos, sin):
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = cos.float()[:, None], sin.float()[:, None]
        return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)

    def backward(self, grad, x, cos, sin):
        return self.forward(grad, cos, -sin), None, None


class RopeBackwardTurnsForward(Honest):
    """Gradients are turned by the angle and not back."""

    operator = "rope"

    def backward(self, grad, *args):
        return super().backward(grad, *(-a if name == "sin" else a for name, a in zip(self.names, args, strict=True)))


# ---- rms_norm


class RmsEpsOutsideRoot(Honest):
    """x / (sqrt(mean(x^2)) + eps)."""

    operator = "rms_norm"

    def forward(self, x, weight, eps):
        wide = x.float()
        return (wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps) * weight.float()).to(x.dtype).contiguous()


class RmsWeightDropped(Honest):
    """The norm without its weight."""

    operator = "rms_norm"

    def forward(self, x, weight, *rest):
        return super().forward(x, torch.ones_like(weight), *rest)


class RoundsBetweenSteps(Honest):
    """Rounds the normed value before it is multiplied by the weight."""

    operator = "rms_norm"

    def forward(self, x, weight, eps):
        return (super().forward(x, torch.ones_like(weight), eps) * weight).contiguous()


class ResultInFp32(Honest):
    """The result has the dtype of the arithmetic."""

    operator = "rms_norm"

    def forward(self, *args):
        return super().forward(*args).float()


class WrongStrides(Honest):
    """The result is a transposed view. https://github.com/Comfy-Org/ComfyUI/pull/15044"""

    operator = "rms_norm"

    def forward(self, *args):
        return super().forward(*args).mT.contiguous().mT


class WeightGradientOfOneSample(Honest):
    """dweight adds the tokens of the first sample only."""

    operator = "rms_norm"

    def backward(self, grad, x, weight, *rest):
        dx, _, *constants = super().backward(grad, x, weight, *rest)
        return dx, super().backward(grad[:1], x[:1], weight, *rest)[1], *constants


# ---- rms_norm_rope


class HalvesTurned(Honest):
    """Channel i of a head is paired with i + D/2, as other models do it."""

    operator = "rms_norm_rope"

    def forward(self, x, weight, cos, sin, eps):
        heads = define.rms_norm(x.float(), weight, eps).unflatten(-1, (-1, 2 * cos.shape[1]))
        return WrongRopePairing().forward(heads, cos, sin).to(x.dtype)


class TurnsWhatIsNotNormed(Honest):
    """The turn reads x once more, as it was before the norm."""

    operator = "rms_norm_rope"

    def forward(self, x, weight, cos, sin, eps):
        return define.rope((x * weight).unflatten(-1, (-1, 2 * cos.shape[1])), cos, sin)


class TurnsBeforeTheNorm(Honest):
    """The norm is that of turned channels, so that weights meet the wrong ones."""

    operator = "rms_norm_rope"

    def forward(self, x, weight, cos, sin, eps):
        turned = define.rope(x.float().unflatten(-1, (-1, 2 * cos.shape[1])), cos, sin)
        return define.rms_norm(turned.flatten(-2), weight, eps).view_as(turned).to(x.dtype)


class NormOfEachHead(Honest):
    """The mean is over the channels of a head, not over all of a token."""

    operator = "rms_norm_rope"

    def forward(self, x, weight, cos, sin, eps):
        shape = -1, 2 * cos.shape[1]
        heads, weight = x.float().unflatten(-1, shape), weight.float().unflatten(0, shape)
        normed = define.rms_norm(heads, torch.ones_like(weight[0]), eps) * weight
        return define.rope(normed, cos, sin).to(x.dtype)


# ---- layer_norm_modulate


class LayerNormUnbiasedVariance(Honest):
    """Divides by C - 1."""

    operator = "layer_norm_modulate"

    def forward(self, x, weight, bias, shift, scale, eps):
        y = F.layer_norm(x.float(), x.shape[-1:], None, None, eps) * (1 - 1 / x.shape[-1]) ** 0.5
        y = y if weight is None else y * weight.float() + bias.float()
        y = y if scale is None else y * (1 + scale.float()[:, None]) + shift.float()[:, None]
        return y.to(x.dtype).contiguous()


class LayerNormScaleWithoutOne(Honest):
    """n * scale + shift."""

    operator = "layer_norm_modulate"

    def forward(self, x, weight, bias, shift, scale, eps):
        return super().forward(x, weight, bias, shift, None if scale is None else scale.float() - 1, eps)


class ScaleAndShiftSwapped(Honest):
    """n * (1 + shift) + scale."""

    operator = "layer_norm_modulate"

    def forward(self, x, weight, bias, shift, scale, eps):
        return super().forward(x, weight, bias, scale, shift, eps)


# ---- gate_residual


class GateDropped(Honest):
    """x + y."""

    operator = "gate_residual"

    def forward(self, x, y, gate, permutation):
        return super().forward(x, y, None, permutation)


class PermutationInverted(Honest):
    """Tokens go where they should come from."""

    operator = "gate_residual"

    def forward(self, x, y, gate, permutation):
        return super().forward(x, y, gate, None if permutation is None else permutation.argsort())


class BackwardForgetsPermutation(Honest):
    """Gradients stay in the order of the output."""

    operator = "gate_residual"

    def backward(self, grad, x, y, gate, permutation):
        return super().backward(grad, x, y, gate, None)


class ResidualInPlace(Honest):
    """Adds to x where it is."""

    operator = "gate_residual"

    def forward(self, x, y, gate, permutation):
        out = super().forward(x, y, gate, permutation)
        x.copy_(super().forward(x, y, gate, None))
        return out


# ---- gelu_tanh


class GeluErf(Honest):
    """The exact GELU, not its tanh form."""

    operator = "gelu_tanh"

    def forward(self, x, *linear):
        return F.gelu(F.linear(x, *linear) if linear else x).contiguous()


class GeluInPlace(Honest):
    """Writes its result over x as well."""

    operator = "gelu_tanh"

    def forward(self, x):
        out = super().forward(x)
        x.copy_(out)
        return out


# ---- linear_gelu_tanh


class BiasLeftOut(Honest):
    """The epilogue has no bias."""

    operator = "linear_gelu_tanh"

    def forward(self, x, weight, bias):
        return super().forward(x, weight, torch.zeros_like(bias))


class GeluLeftOut(Honest):
    """The linear alone."""

    operator = "linear_gelu_tanh"

    def forward(self, x, weight, bias):
        return F.linear(x, weight, bias)


class LastInputFeaturesLeftOut(Honest):
    """What does not fill a tile of 16 input features is left out of the sum."""

    operator = "linear_gelu_tanh"

    def forward(self, x, weight, bias):
        whole = x.shape[-1] // 16 * 16
        return super().forward(x[..., :whole], weight[:, :whole], bias)


# ---- every operator


class LosesTokensPast65535(Honest):
    """Tokens beyond the limit of a grid are never written."""

    def forward(self, *args):
        out = super().forward(*args)
        tokens = out.transpose(0, 1) if out.ndim > 2 else out
        tokens[65_535:] = 0
        return out
