"""What `acme.sdpa` cannot take."""

from ospnext.ops.contract import need


def sdpa(request, device):
    yield need(request.head_dim % 8 == 0, "head_dim", got=request.head_dim, want="a multiple of 8")
    yield need(min(request.q_len, request.kv_len) > 0, "length", got=request.kv_len, want="at least one token")
