"""The one fused operator that Acme has a kernel for."""

import torch
import torch.nn.functional as F


class RmsNorm:
    def forward(self, x, weight, eps):
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype).contiguous()

    def backward(self, grad, x, weight, eps):
        x32, g32 = x.float(), grad.float()
        inverse = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        normed, scaled = x32 * inverse, g32 * weight.float()
        dx = inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        return dx.to(x.dtype), (g32 * normed).flatten(0, -2).sum(0).to(weight.dtype), None


rms_norm = RmsNorm()
