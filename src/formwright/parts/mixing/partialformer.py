"""PartialFormer: attention whose every head passes through a small feed-forward layer, in place of a layer of its own.

Paper    Zheng, Li, Bao, Wang, Xiao, Zhu: PartialFormer: Modeling Part Instead of Whole for Machine Translation
         (Findings of ACL 2024), arXiv:2310.14921.
Idea     A feed-forward layer on a head of width d needs 2 r d^2 weights, which all heads can share; with many heads
         the hidden layer is as wide as a Transformer's at a small part of its parameters. Values get more heads (E)
         than queries and keys (G), and one map of attention, made of the embeddings, is added in every layer.

             A   = head MLP(q k^T / sqrt(d)) + A_0            MLP: G -> E -> E over the heads of a pair of tokens, ReLU
             A_0 = q_0 k_0^T / sqrt(d)                        E heads, of the first layer's input, in all layers
             c_e = softmax(mask(A_e)) v_e                     c_e <- c_e + W_2 ReLU(W_1 c_e)
             y   = W_o (concat_e(c_e) * ReLU(x W_u))

         The mask comes after MLP and A_0, which would make NaN of -inf. No other feed-forward layer is meant to follow:
         block="pre", feedforward="none".
Differs  A_0 is made by the first layer of the stack and reads what that layer's norm gives, where the release has a
         norm of its own for it. The small networks start as nn.Linear does, as in the release; the rest by the model's
         scheme, of which "xavier" is the release's but for the gate, which that scales by 1 / sqrt(2).
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import SCORE_HOOKS, Context, Hook, hooks, refuse
from formwright.errors import FormwrightError
from formwright.ops.linear import project
from formwright.parts.attention.softmax import softmax_or_zero


class First(NamedTuple):
    """What the first layer hands to all others."""

    logits: Float[Tensor, "b e q k"]
    learns: bool  # whether it was made by weights that are trained


class PartialFormer(nn.Module):
    """(b, n, d) -> (b, n, d): self-attention, or cross-attention with residual=False, and the feed-forward layer in it.

    Args:
        dim: width D of the tokens.
        heads: G, of queries and keys.
        layer: from 0; the first makes what all share.
        head_dim: d; none = dim / heads.
        expanded: E, heads of the values; none = 2 G. The paper has 30 of 8 in its encoder, 16 in its decoder.
        ratio: r, the hidden width of the feed-forward by d. The paper has 4 in its encoder, 2 in its decoder.
        head_scaling: whether G heads of queries and keys are turned into E maps; False makes E of each.
        residual: whether the first layer's map is added. All layers of a stack must agree.
        dropout: probability of dropping a weight of attention in training.
        activation_dropout: of dropping an element of the hidden layer.
        qkv_bias: whether the projections of queries, keys, values and gate have biases.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "keys"
    hooks: ClassVar[frozenset[Hook]] = frozenset()

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        layer: int = 0,
        head_dim: int | None = None,
        expanded: int | None = None,
        ratio: int = 4,
        head_scaling: bool = True,
        residual: bool = True,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if head_dim is None and (heads < 1 or dim % heads):
            raise FormwrightError(f"A width of {dim} does not split into {heads} heads; set head_dim or another width.")
        expanded = 2 * heads if expanded is None else expanded
        if expanded < heads or ratio < 1:
            raise FormwrightError(
                f"PartialFormer expands its {heads} heads to as many or more, each with a hidden layer of at least its "
                f"own width; got expanded={expanded} and ratio={ratio}."
            )
        for name, value in (("dropout", dropout), ("activation_dropout", activation_dropout)):
            if not 0 <= value < 1:
                raise FormwrightError(f"{name} is a probability from 0 to below 1, got {value}.")
        width = head_dim or dim // heads
        self.head_dim, self.heads, self.expanded = width, heads if head_scaling else expanded, expanded
        splits = [self.heads * width, self.heads * width, expanded * width]
        self.query_key_value = nn.Linear(dim, sum(splits), bias=qkv_bias)
        self.query_key_value.role, self.query_key_value.splits = "query-key-value", splits
        self.gate = nn.Linear(dim, expanded * width, bias=qkv_bias)
        self.head_up = nn.Linear(heads, expanded) if head_scaling else None
        self.head_down = nn.Linear(expanded, expanded) if head_scaling else None
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.inner_width = expanded * width
        self.inner: nn.Module = nn.Identity()
        self.out = nn.Linear(self.inner_width, dim)
        self.out.role = "out"
        self.residual, self.dropout, self.activation_dropout = residual, dropout, activation_dropout
        self.first = nn.Linear(dim, 2 * expanded * width, bias=qkv_bias) if residual and layer == 0 else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The small networks, which a general scheme would make too small to matter."""
        for layer in (self.head_up, self.head_down, self.up, self.down):
            if layer is not None:
                layer.reset_parameters()

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        self._refuse(context)
        q, k, v = self._projected(x, context)
        logits = self._scaled(q @ k[:, : self.heads].mT * self.head_dim**-0.5)
        if self.residual:
            logits = logits + self._first(x, k[:, self.heads :], context)
        seen = context.mask.dense()
        shares = softmax_or_zero(logits if seen is None else logits.masked_fill(~seen, -torch.inf))
        if context.attentions is not None:
            context.attentions.append(shares)
        mixed = (F.dropout(shares, self.dropout, self.training) @ v).transpose(1, 2)  # (b, n, E, d)
        hidden = F.dropout(F.relu(project(self.up, mixed)), self.activation_dropout, self.training)
        gathered = (mixed + project(self.down, hidden)).flatten(2)
        return project(self.out, self.inner(gathered * F.relu(project(self.gate, x))))

    def _projected(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of G heads, keys of G (and E more for the first layer's map), values of E; with what is cached."""
        queries, keys, values = self.query_key_value.splits
        if context.memory is None:
            q, k, v = (
                self._split(part) for part in project(self.query_key_value, x).split([queries, keys, values], -1)
            )
            if self.first is not None:
                k = torch.cat([k, self._split(self._rows(self.first, x, slice(self.inner_width, None)))], 1)
            return q, *((k, v) if context.cache is None else context.cache.update(k, v))
        q = self._split(self._rows(self.query_key_value, x, slice(queries)))
        stored = None if context.cache is None else context.cache.stored()
        if stored is None:  # the memory does not change between decoding steps
            made = self._rows(self.query_key_value, context.memory, slice(queries, None))
            stored = self._split(made[..., :keys]), self._split(made[..., keys:])
            if context.cache is not None:
                context.cache.update(*stored)
        return q, *stored

    def _split(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b h n w"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @staticmethod
    def _rows(layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
        """Some rows of a projection alone; all of it where an adapter stands in its place."""
        if type(layer) is not nn.Linear:
            return layer(x)[..., rows]
        return F.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])

    def _scaled(self, logits: Float[Tensor, "b g q k"]) -> Float[Tensor, "b e q k"]:
        """Every pair of tokens through the MLP over its heads: E maps of G."""
        if self.head_up is None:
            return logits
        return self._over_heads(self.head_down, F.relu(self._over_heads(self.head_up, logits)))

    @staticmethod
    def _over_heads(layer: nn.Linear, logits: Float[Tensor, "b g q k"]) -> Float[Tensor, "b e q k"]:
        mixed = layer.weight @ logits.flatten(2) + layer.bias[:, None]
        return mixed.unflatten(-1, logits.shape[2:])

    def _first(self, x: Tensor, keys: Tensor, context: Context) -> Float[Tensor, "b e q k"]:
        """The map that all layers share, made here if this is the first."""
        if self.first is not None:
            query = self._split(self._rows(self.first, x, slice(self.inner_width)))
            logits = query @ keys.mT * self.head_dim**-0.5
            context.carry["partialformer"] = First(logits, self.first.weight.requires_grad)
            return logits
        made: First | None = context.carry.get("partialformer")
        if made is None or made.logits.shape[1] != self.expanded:
            found = "there is none" if made is None else f"that has {made.logits.shape[1]} heads"
            raise FormwrightError(
                f"Every layer of PartialFormer adds the map of the first one, with its {self.expanded} heads, but "
                f"{found}: let the first layer be one with this many heads, or set residual=false."
            )
        if made.learns and torch.is_grad_enabled() and not made.logits.requires_grad:
            raise FormwrightError(
                "Reentrant checkpointing loses the gradient of the map that PartialFormer's layers share: leave "
                "use_reentrant out of the gradient checkpointing arguments, or set it to False."
            )
        return made.logits

    def _refuse(self, context: Context) -> None:
        if context.memory is not None and self.residual:
            raise refuse(
                "PartialFormer",
                asked="cross-attention with the first layer's map",
                because="that map is of one sequence",
                instead='Give it as cross_mixer="partialformer(residual=false)".',
            )
        if hooks(context.shared_position) & SCORE_HOOKS:
            raise refuse(
                "PartialFormer",
                asked="a position that acts on queries, keys or scores",
                because="its maps of attention are made by a network over their heads",
                instead='Choose a position that is added to the tokens, such as "sinusoidal".',
            )
