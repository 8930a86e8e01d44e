"""The one fused operator that Acme has a kernel for."""

import torch
import torch.nn.functional as F


class RmsNorm:
    def forward(self, x, weight, eps):
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype).contiguous()

    def backward(self, grad, x, weight, eps):
        leaves = [x.float().detach().requires_grad_(), weight.float().detach().requires_grad_()]
        with torch.enable_grad():
            out = F.rms_norm(leaves[0], x.shape[-1:], leaves[1], eps)
        dx, dweight = torch.autograd.grad(out, leaves, grad.float())
        return dx.to(x.dtype), dweight.to(weight.dtype), None


rms_norm = RmsNorm()
