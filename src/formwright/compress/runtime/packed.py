"""The layers of an encoder on real tokens alone, one after the other without padding.

Paper    Zhai et al.: ByteTransformer (IPDPS 2023), arXiv:2210.03052.
Idea     The real tokens of a batch are one (t, d) matrix. What works on single tokens sees no padding; attention runs
         in each sequence, tokens cu_seqlens[i] to cu_seqlens[i + 1].

A policy may drop tokens or whole sequences between the layers:
    after_attention(layer, hidden, received)   -> keep, one boolean a token, or None for all. `hidden` has passed the
                                                  attention, its residual and norm; `received` (t,) is the attention a
                                                  token got, averaged over heads and the queries of its sequence.
    after_layer(layer, hidden, cu_seqlens)     -> keep, one boolean a sequence, or None for all.
What is dropped is gone from the later layers and from what `run` returns: a policy keeps what it still needs.
Differs  Serves layers that normalise after the residual (BERT, RoBERTa, ELECTRA) without a position bias. Attention is
         one call of PyTorch a sequence.
"""

from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from formwright.compress.anatomy import describe
from formwright.errors import FormwrightError

FAMILIES = ("bert", "roberta", "electra")


@runtime_checkable
class Policy(Protocol):
    """What may be dropped between the layers."""

    def after_attention(
        self, layer: int, hidden: Float[Tensor, "t d"], received: Float[Tensor, " t"]
    ) -> Bool[Tensor, " t"] | None: ...

    def after_layer(
        self, layer: int, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"]
    ) -> Bool[Tensor, " sequences"] | None: ...


class PackedEncoder:
    """Runs the layers of `model`, which stay the model's own. For inference: dropout is left out.

    Raises:
        FormwrightError: a family this cannot run, or a layer that was replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        anatomy = describe(model)
        family = anatomy.family  # that of a changed model too
        served = family in FAMILIES and not getattr(model.config, "is_decoder", False)
        if not served or any(layer.attention is None or layer.feedforward is None for layer in anatomy.layers):
            raise FormwrightError(
                f"Padding-free execution cannot run this {family!r} model: use one of {', '.join(FAMILIES)} whose "
                "attentions and feed-forwards are its own."
            )
        self.model, self.layers = model, anatomy.layers

    def run(
        self, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"], policy: Policy | None = None
    ) -> Float[Tensor, "t2 d"]:
        """The tokens after the last layer, fewer where `policy` dropped some. `cu_seqlens` runs from 0 to t."""
        for number, layer in enumerate(self.layers):
            attention, feedforward = layer.attention, layer.feedforward
            q, k, v = (
                self._module(path)(hidden).unflatten(-1, (attention.heads, -1))
                for path in (attention.query, attention.key, attention.value)
            )
            mixed, received = _attend(q, k, v, cu_seqlens, policy is not None)
            hidden = self._module(attention.norm)(hidden + self._module(attention.output)(mixed.flatten(1)))
            if policy is not None and (keep := policy.after_attention(number, hidden, received)) is not None:
                hidden, cu_seqlens = _drop(hidden, cu_seqlens, keep)
            inner = ACT2FN[feedforward.activation](self._module(feedforward.up)(hidden))
            hidden = self._module(feedforward.norm)(hidden + self._module(feedforward.down)(inner))
            if policy is not None and (stay := policy.after_layer(number, hidden, cu_seqlens)) is not None:
                hidden, cu_seqlens = hidden[stay.repeat_interleave(cu_seqlens.diff())], _sums(cu_seqlens.diff()[stay])
        return hidden

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


def _attend(
    q: Float[Tensor, "t h c"], k: Float[Tensor, "t h c"], v: Float[Tensor, "t h c"], cu_seqlens: Tensor, weigh: bool
) -> tuple[Float[Tensor, "t h c"], Float[Tensor, " t"] | None]:
    """Attention in each sequence, and with `weigh` the mean attention every token received."""
    mixed, received = torch.empty_like(q), q.new_zeros(len(q)) if weigh else None
    border = cu_seqlens.tolist()
    for start, end in pairwise(border):
        if start == end:
            continue
        one_q, one_k, one_v = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        mixed[start:end] = F.scaled_dot_product_attention(one_q, one_k, one_v)[0].transpose(0, 1)
        if weigh:
            scores = one_q @ one_k.transpose(-1, -2) * q.shape[-1] ** -0.5
            received[start:end] = scores.softmax(-1).mean((0, 1, 2))
    return mixed, received


def _drop(hidden: Tensor, cu_seqlens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    before = _sums(keep.long())
    return hidden[keep], before[cu_seqlens]


def _sums(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))
