"""Fused kernels that are broken on purpose, each in one way: the definition of a contract with one fault. URLs are the
reports of users whom the fault hurt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ospnext.ops.contracts import CONTRACTS


class Honest:
    """The definition of a contract, as a kernel."""

    def __init__(self, operator: str = "") -> None:
        self.operator = operator or self.operator

    operator = ""

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

    def backward(self, grad, x, cos, sin):
        return self.forward(grad, cos, sin), None, None


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

    def forward(self, x, weight, eps):
        return super().forward(x, torch.ones_like(weight), eps)


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

    def backward(self, grad, x, weight, eps):
        return super().backward(grad, x, weight, eps)[0], super().backward(grad[:1], x[:1], weight, eps)[1], None


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

    def forward(self, x):
        return F.gelu(x).contiguous()


class GeluInPlace(Honest):
    """Writes its result over x as well."""

    operator = "gelu_tanh"

    def forward(self, x):
        out = super().forward(x)
        x.copy_(out)
        return out


# ---- every operator


class LosesTokensPast65535(Honest):
    """Tokens beyond the limit of a grid are never written."""

    def forward(self, *args):
        out = super().forward(*args)
        out[:, 65_535:] = 0
        return out
