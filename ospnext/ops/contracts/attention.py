"""The attention contract: everything that is true about attention, stated once. No kernel lives here; the formula is in
attention_oracle.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ospnext.ops.contract import Case, Contract, Level, Through, as_is
from ospnext.ops.contracts.attention_oracle import oracle, yardstick

MEANING = """\
out = softmax(q k^T * scale) v for each head, over dense or packed sequences.

Layout      dense q [B, Sq, H, D], k and v [B, Sk, H, D]; packed q [Tq, H, D], k and v [Tk, H, D] with int32 cu_seqlens
            [sequences + 1] that start at 0, do not decrease and end at T. Empty sequences are legal. Any strides and
            any storage offset, stride 0 included, for gradients too.
Scale       default 1 / sqrt(D).
Key mask    boolean [B, Sk] (dense only), True = the key takes part. A query all of whose keys are masked, and a query
            of a sequence without keys, gives a row of zeros and logsumexp -inf, and receives and sends zero gradient.
            Values of masked keys never reach the result, NaN and Inf included; nor do queries of a sample without keys.
Logsumexp   natural, of the scaled logits, fp32 (fp64 for fp64 inputs): dense [B, H, Sq], packed [H, Tq]. It carries no
            gradient.
Dtype       q, k and v agree; products accumulate in fp32 or better and logits stay in it; probabilities and their
            gradient may be rounded to the dtype of q before a product or sum; the output has the dtype of q and is
            contiguous.
Backward    dq, dk and dv from (dout, q, k, v, out, logsumexp): those five say all, so that the backward of one
            implementation may follow the forward of another.
Determinism a request for it gives the same bits for the same inputs, call after call.
Purity      inputs are not written; outputs alias nothing; a call that failed leaves nothing behind.
"""


@dataclass(frozen=True)
class AttentionRequest:
    """What selection knows of a call. Fields with a default are features: an implementation that does not list one
    refuses it.
    """

    device_type: str
    dtype: torch.dtype
    #: Sequences: batch size, or number of packed sequences.
    batch: int
    #: Longest query and key sequence.
    q_len: int
    kv_len: int
    heads: int
    head_dim: int
    packed: bool = False
    key_mask: bool = False
    custom_scale: bool = False
    logsumexp: bool = False
    backward: bool = False
    deterministic: bool = False


# ---- inputs
# --------------------------------------------------------------------------------------------------------------------

SCALE = 0.3


def make_inputs(case: Case) -> dict[str, Any]:
    """CPU inputs of a case, in its dtype; the seed is the case's own id, so that every machine sees the same
    numbers. `rows` are the query rows that the result is to hold, where that is not all of them.
    """
    request: AttentionRequest = case.request
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = (request.heads, request.head_dim)
    q_shape: tuple[int, ...]
    kv_shape: tuple[int, ...]
    if request.packed:
        q_lens, kv_lens = case.options["q_lens"], case.options["kv_lens"]
        q_shape, kv_shape = (sum(q_lens), *heads), (sum(kv_lens), *heads)
    else:
        q_shape, kv_shape = (request.batch, request.q_len, *heads), (request.batch, request.kv_len, *heads)
    q, k, v = randn(*q_shape), randn(*kv_shape), randn(*kv_shape)
    grad_out = randn(*q_shape) if request.backward else None
    mask_BS = _mask(request, generator) if request.key_mask else None
    kind = case.options.get("kind")
    if kind is not None:
        q, k, v, grad_out = _KINDS[kind](q, k, v, grad_out, mask_BS)
    inputs: dict[str, Any] = {name: t.to(request.dtype) for name, t in (("q", q), ("k", k), ("v", v))}
    inputs["return_lse"] = request.logsumexp
    if request.packed:
        inputs["cu_seqlens_q"], inputs["cu_seqlens_kv"] = (cumulative(lens) for lens in (q_lens, kv_lens))
        inputs["max_seqlen_q"], inputs["max_seqlen_kv"] = request.q_len, request.kv_len
    if mask_BS is not None:
        inputs["key_mask"] = mask_BS
    if request.custom_scale:
        inputs["scale"] = case.options.get("scale", SCALE)
    if grad_out is not None:
        inputs["grad_out"] = grad_out.to(request.dtype)
    if "rows" in case.options:
        last = request.q_len - 1
        inputs["rows"] = torch.linspace(0, last, case.options["rows"], dtype=torch.float64).round().long()
    return inputs


def _mask(request: AttentionRequest, generator: torch.Generator) -> Tensor:
    mask_BS = torch.rand(request.batch, request.kv_len, generator=generator) < 0.5
    mask_BS[-1, 0], mask_BS[-1, -1] = True, False
    mask_BS[0] = False  # a fully masked row belongs to every masked case
    return mask_BS


def cumulative(lengths: tuple[int, ...]) -> Tensor:
    """int32 cu_seqlens [sequences + 1] of sequence lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def needle_positions(kv_len: int) -> list[int]:
    """Keys that needle queries look for: both ends, S - 64, the last 16, and the first or last key of every tile of
    128.
    """
    ends = {0, 1, kv_len - 64, *range(kv_len - 16, kv_len)}
    edges = {t if (t // 128) % 2 == 0 or t + 128 > kv_len else t + 127 for t in range(128, kv_len, 128)}
    return sorted(ends | edges)


def _needle(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None, mask: Tensor | None):
    """Each query looks for one key: losing that key changes the row entirely, where random inputs would lose an average
    over thousands. Positions are fixed: random ones miss whole tiles.
    """
    return 3.0 * k[:, needle_positions(k.shape[1])], k, v, grad_out


def _shifted(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None, mask: Tensor | None):
    """Every logit lower by 120, exactly: the result is the same, the logsumexp is not."""
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 4.0 * q.shape[-1] ** 0.5, -30.0
    return q, k, v, grad_out


def _large(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None, mask: Tensor | None):
    """A few channels far larger than the rest, as trained models have them: logits beyond exp's range, one-hot rows."""
    q, k, v = q.clone(), k.clone(), v.clone()
    q[..., 3] *= 32.0
    k[..., 3] *= 32.0
    v[..., 5] *= 64.0
    return q, k, v, grad_out


def _exact(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None, mask: Tensor | None):
    """Keys of +-1 that are far from each other, queries 64 times one key: exp of every other logit is 0 in fp32, so
    that results and gradients are small integers.
    """
    k, v = k.sign(), (3.0 * v).round().clamp(-8, 8)
    targets = (torch.arange(q.shape[1]) * 7 + 3) % k.shape[1]
    return 64.0 * k[:, targets], k, v, None if grad_out is None else (3.0 * grad_out).round().clamp(-8, 8)


def _masked_nan(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor | None, mask: Tensor | None):
    """NaN in all that takes no part: masked keys and values, and the queries of a sample without keys."""
    assert mask is not None
    q = q.where(mask.any(1)[:, None, None, None], torch.nan)
    return q, k.where(mask[..., None, None], torch.nan), v.where(mask[..., None, None], torch.inf), grad_out


_KINDS = {"needle": _needle, "shifted": _shifted, "large": _large, "exact": _exact, "nan": _masked_nan}


# ---- calls
# ---------------------------------------------------------------------------------------------------------------------


def call(inputs: Mapping[str, Any], through: Through = as_is) -> dict[str, Tensor]:
    """Run the public functions on the inputs of a case, gradients included."""
    from ospnext import ops

    named = dict(inputs)
    grad_out, rows = named.pop("grad_out", None), named.pop("rows", None)
    return_lse = named.pop("return_lse", False)
    leaves = [named.pop(name).detach().requires_grad_(grad_out is not None) for name in ("q", "k", "v")]
    packed = named.get("cu_seqlens_q") is not None
    function = through(ops.attention_packed if packed else ops.attention)
    found = function(*leaves, **named, return_lse=return_lse)
    result = dict(zip(("out", "lse"), found, strict=True)) if return_lse else {"out": found}
    if grad_out is not None:
        result |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(result["out"], leaves, grad_out), strict=True))
    if rows is not None:
        result["out"] = result["out"][:, rows]
    return {name: value.detach() for name, value in result.items()}


def library_calls(inputs: Mapping[str, Any]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The torch.library ops behind the functions, with and without a gradient."""
    ops = torch.ops.ospnext
    q, k, v = (inputs[name].detach() for name in ("q", "k", "v"))
    masks = [inputs.get(name) for name in ("key_mask", "cu_seqlens_q", "cu_seqlens_kv")]
    rest = (*masks, inputs.get("max_seqlen_q", 0), inputs.get("max_seqlen_kv", 0), inputs.get("scale"))
    yield ops.attention.default, (q, k, v, *rest, inputs["return_lse"])
    if "grad_out" in inputs:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        yield ops.attention_differentiable.default, (*leaves, *rest, inputs["return_lse"])
        out, lse = ops.attention(q, k, v, *rest, True)
        yield ops.attention_backward.default, (inputs["grad_out"], q, k, v, out, lse, *rest)


# ---- cases
# ---------------------------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
#: Tokens of 81 frames at 1280 x 720: the longest sequence of the published models.
VIDEO = 75_600
_SHAPES = (  # batch, q_len, kv_len: one token, odd lengths, 64 mod 128, unequal, and text keys
    (1, 1, 3),
    (2, 113, 113),
    (1, 239, 203),
    (1, 704, 704),
    (2, 128, 512),
    (1, 1023, 1024),
)
_PACKS = {
    "uneven": ((93, 93, 88, 88), (93, 93, 88, 88)),
    "empty": ((5, 0, 64, 1), (7, 3, 0, 130)),
    "many": ((530, 17, 64, 1, 300, 128, 257), (530, 17, 1, 64, 300, 129, 640)),
}


def cases() -> Iterator[Case]:
    """Required is what the model needs: dense and packed, every feature, bf16 and fp32, up to the length of a video."""
    for tag in ("bf16", "fp32"):
        yield from _dense(tag)
        yield from _packed(tag)
        yield from _hard(tag)
    yield from _long()
    yield from _optional()


def _dense(tag: str) -> Iterator[Case]:
    for batch, q_len, kv_len in _SHAPES:
        for feature in ("plain", "mask", "scale", "lse", "backward", "mask-lse-backward"):
            # The first sample of a masked case has no key at all, so that it takes another one to see the mask.
            samples = max(batch, 2) if "mask" in feature else batch
            crossed = q_len == 113 and feature in ("backward", "mask-lse-backward")
            yield _case((samples, q_len, kv_len, 2, 64), tag, feature, crossed=crossed)
    yield _case((1, 257, 257, 3, 128), tag, "lse-backward")
    # More of one thing than a kernel may have counted on: heads and samples, masked keys, queries with a gradient.
    yield _case((3, 37, 41, 40, 128), tag, "backward")
    yield _case((2, 64, 2113, 2, 64), tag, "mask-lse-backward")
    yield _case((1, 2113, 64, 1, 64), tag, "backward")
    yield _case((1, 113, 113, 2, 64), tag, "zeroscale", {"scale": 0.0})
    yield _case((2, 113, 113, 2, 64), tag, "backward-deterministic", crossed=True)


def _packed(tag: str) -> Iterator[Case]:
    for name, (q_lens, kv_lens) in _PACKS.items():
        for feature in ("plain", "lse-backward"):
            sizes, options = (len(q_lens), max(q_lens), max(kv_lens), 2, 64), {"q_lens": q_lens, "kv_lens": kv_lens}
            crossed = (name, feature) == ("uneven", "lse-backward")
            yield _case(sizes, tag, feature, options, shape=f"packed-{name}", crossed=crossed)


def _hard(tag: str) -> Iterator[Case]:
    """Inputs on which a broken kernel and a correct one differ by more than rounding."""
    yield _case((1, len(needle_positions(1023)), 1023, 2, 64), tag, "backward", {"kind": "needle"})
    yield _case((2, 704, 704, 2, 64), tag, "mask-lse-backward", {"kind": "shifted"})
    yield _case((1, 704, 704, 2, 64), tag, "lse-backward", {"kind": "shifted"})
    yield _case((2, 203, 239, 2, 64), tag, "mask-lse-backward", {"kind": "large"})
    yield _case((1, 203, 239, 2, 64), tag, "lse-backward", {"kind": "large"})
    yield _case((2, 113, 113, 2, 64), tag, "backward", {"kind": "exact"}, exact=True)
    yield _case((2, 113, 113, 2, 64), tag, "mask-lse-backward", {"kind": "nan"})


def _long() -> Iterator[Case]:
    """Length of a video. The oracle sees some query rows, so that it stays affordable."""
    yield _case((1, 128, VIDEO, 1, 128), "bf16", "backward")
    yield _case((1, len(needle_positions(VIDEO)), VIDEO, 1, 128), "bf16", "plain", {"kind": "needle"})
    # Two samples of 40 fused heads hold more than 2^31 elements: offsets in 32 bits wrap in the second one.
    yield _case((2, 32, VIDEO, 1, 128), "bf16", "backward", layout="batched_qkv")
    yield _case((1, VIDEO, VIDEO, 1, 128), "bf16", "plain", {"rows": 128}, costly=True)


def _optional() -> Iterator[Case]:
    for tag, dims in (("fp16", (64, 128)), ("bf16", (24, 40, 80, 96, 256))):
        for head_dim in dims:
            yield _case((1, 239, 203, 2, head_dim), tag, "lse-backward", level="optional")


def _case(
    sizes: tuple[int, int, int, int, int],
    tag: str,
    feature: str,
    options: Mapping[str, Any] | None = None,
    *,
    shape: str = "",
    level: Level = "required",
    **fields: Any,
) -> Case:
    """`sizes` are batch, longest query and key sequence, heads and head_dim."""
    words, options = feature.split("-"), options or {}
    batch, q_len, kv_len, heads, head_dim = sizes
    request = AttentionRequest(
        "cpu",
        DTYPES[tag],
        batch,
        q_len,
        kv_len,
        heads,
        head_dim,
        packed="q_lens" in options,
        key_mask="mask" in words,
        custom_scale=any(word.endswith("scale") for word in words),
        logsumexp="lse" in words,
        backward="backward" in words,
        deterministic="deterministic" in words,
    )
    kind = f"-{options['kind']}" if "kind" in options else ""
    shape = shape or f"b{batch}-q{q_len}-k{kv_len}"
    identifier = f"attention/{level}/{shape}-h{heads}-d{head_dim}-{tag}-{feature}{kind}"
    return Case(identifier, level, request, options, **fields)


CONTRACT = Contract(
    name="attention",
    family="attention",
    level="required",
    request=AttentionRequest,
    meaning=MEANING,
    inputs=make_inputs,
    oracle=oracle,
    yardstick=yardstick,
    call=call,
    library_calls=library_calls,
    cases=cases,
)
