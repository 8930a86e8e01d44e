"""Attention among the tokens of a block, without parameters: one place for its kernel, its quantization and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ospnext import ops
from ospnext.models.layout import Subsequences
from ospnext.ops import HiF8Recipe
from ospnext.ops.replicated import replicated

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Attend(nn.Module):
    """softmax(q k^T) v; with a recipe, of q, k and v that went through HiFloat8."""

    recipe: HiF8Recipe | None = None
    #: What q, k and v each go through before, where it is not the quantization of a contract: see upstream_bf16.py.
    round_trip: Callable[[Tensor], Tensor] | None = None
    #: Ranks that hold other heads or tokens of the same q, k and v: they share scales.
    amax_group: ProcessGroup | None = None
    #: Ranks that attend to the same k and v, those of the text.
    kv_group: ProcessGroup | None = None

    def forward(self, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, pieces: Subsequences | None = None) -> Tensor:
        """[B, S, H, D] in and out; among all tokens of a sample, or inside each of its pieces."""
        if self.round_trip is not None:
            q_BSHD, k_BSHD, v_BSHD = self.round_trip(q_BSHD), self.round_trip(k_BSHD), self.round_trip(v_BSHD)
        if pieces is None:
            return self._dense(q_BSHD, k_BSHD, v_BSHD)
        if pieces.cu_seqlens is None:
            folded = (t.reshape(-1, pieces.lengths[0], *t.shape[2:]) for t in (q_BSHD, k_BSHD, v_BSHD))
            return self._dense(*folded).view(q_BSHD.shape)
        longest = max(pieces.lengths)
        out_THD = self._packed(
            *(t.flatten(0, 1) for t in (q_BSHD, k_BSHD, v_BSHD)),
            cu_seqlens_q=pieces.cu_seqlens,
            cu_seqlens_kv=pieces.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return out_THD.view(q_BSHD.shape)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.recipe is not None:
            return ops.quantized_attention(
                q, k, v, recipe=self.recipe, amax_group=self.amax_group, kv_group=self.kv_group
            )
        if self.kv_group is not None:
            k, v = replicated(k, self.kv_group), replicated(v, self.kv_group)
        return ops.attention(q, k, v)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, **pack: Any) -> Tensor:
        if self.recipe is None:
            return ops.attention_packed(q, k, v, **pack)
        return ops.quantized_attention(q, k, v, recipe=self.recipe, amax_group=self.amax_group, **pack)

    def extra_repr(self) -> str:
        return ", ".join(str(said) for said in (self.recipe, self.round_trip) if said is not None)
