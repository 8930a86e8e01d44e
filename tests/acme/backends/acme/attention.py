"""Acme's attention: PyTorch's where it serves, and rows of the softmax in fp32 for the rest."""

import itertools

import torch
import torch.nn.functional as F

ROWS = 512


class Sdpa:
    def forward(self, q, k, v, *, scale, **rest):
        q, k, v = (t.contiguous().transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()
        return out, out.new_empty(0, dtype=torch.float32)


class Rows:
    """[H, rows, keys] at a time."""

    def forward(self, q, k, v, *, key_mask, cu_seqlens_q, cu_seqlens_kv, scale, need_lse, **rest):
        out = torch.zeros(q.shape, dtype=q.dtype)
        lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -torch.inf, dtype=wide(q))
        for at, keys, lse_at in sequences(q, k, key_mask, cu_seqlens_q, cu_seqlens_kv):
            for block in blocks(q[at]):
                o, logsum = softmax(q[at][block].to(wide(q)), k[keys].to(wide(q)), v[keys].to(wide(q)), scale)
                out[at][block], lse[lse_at][:, block] = o.to(q.dtype), logsum
        return out, lse if need_lse else lse.new_empty(0)

    def backward(self, grad_out, q, k, v, out, lse, *, key_mask, cu_seqlens_q, cu_seqlens_kv, scale, **rest):
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v))
        for at, keys, lse_at in sequences(q, k, key_mask, cu_seqlens_q, cu_seqlens_kv):
            key, value = k[keys].to(wide(q)), v[keys].to(wide(q))
            dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
            for block in blocks(q[at]):
                query, grad, o = (t[at][block].to(wide(q)) for t in (q, grad_out, out))
                logits_HQK = torch.einsum("qhd,khd->hqk", query, key) * scale
                p_HQK = (logits_HQK - lse[lse_at][:, block, None]).exp()
                dp_HQK = torch.einsum("qhd,khd->hqk", grad, value) - (grad * o).sum(-1).T[..., None]
                dlogits_HQK = p_HQK * dp_HQK * scale
                dq[at][block] = torch.einsum("hqk,khd->qhd", dlogits_HQK, key).to(q.dtype)
                dkey += torch.einsum("hqk,qhd->khd", dlogits_HQK, query)
                dvalue += torch.einsum("hqk,qhd->khd", p_HQK, grad)
            dk[keys], dv[keys] = dkey.to(k.dtype), dvalue.to(v.dtype)
        return dq, dk, dv


def softmax(q_QHD, k_KHD, v_KHD, scale):
    logits_HQK = torch.einsum("qhd,khd->hqk", q_QHD, k_KHD) * scale
    if logits_HQK.shape[-1] == 0:
        return torch.zeros_like(q_QHD), logits_HQK.new_full(logits_HQK.shape[:2], -torch.inf)
    return torch.einsum("hqk,khd->qhd", logits_HQK.softmax(-1), v_KHD), logits_HQK.logsumexp(-1)


def sequences(q, k, key_mask, cu_q, cu_kv):
    """(index of the queries, of the keys, of the logsumexp) of each sequence."""
    if cu_q is None:
        for b in range(q.shape[0]):
            yield b, b if key_mask is None else (b, key_mask[b]), b
        return
    for rows, keys in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_kv.tolist()), strict=True):
        yield slice(*rows), slice(*keys), (slice(None), slice(*rows))


def blocks(q_QHD):
    return (slice(start, start + ROWS) for start in range(0, q_QHD.shape[0], ROWS))


def wide(t):
    return torch.promote_types(t.dtype, torch.float32)


sdpa, rows = Sdpa(), Rows()
