"""TokenFormer: every projection is attention of the token over learned key and value tokens, so a model grows by rows.

Paper    Wang, Fan, Naeem, Xian, Lenssen, Wang, Tombari, Schiele: TokenFormer (ICLR 2025), arXiv:2410.23168.
Idea     A weight matrix fixes both its widths. Pattention has n parameter tokens in its place, and n is free: more of
         them can be appended to a trained model (`formwright.models.tokenformer.grow`), whose width stays.

             Pattention(x) = theta(x K^T) V             K (n, d1), V (n, d2), no bias, no 1 / sqrt(d)
             theta(a)      = GELU(a tau / |a|_2)        tau = sqrt(n)

             x <- x + MHA(norm(x))                      queries, keys, values and output: a Pattention each
             x <- x + Pattention(norm(x))               the feed-forward layer, n = 4 d; its GELU is the only one

         The norms have no gain and no shift, which would be as wide as the model; the one at the end has both. Keys
         start as N(0, 0.02^2), values as N(0, (2 / (layers sqrt(d)))^2).
Growing  tau is the square root of a number of tokens, `tau_tokens`. Tokens with zero keys have score 0, leave |a|
         alone and add GELU(0) = 0: while tau stays what it was, the grown layer computes what the small one did. The
         paper grows so too, but with tau = sqrt(n) the old scores gain a factor sqrt(n_new / n_old).
Also     The two other forms of theta in the release: GELU first, then GELU(a) tau / |GELU(a)|_2, and tau^2 softmax(a),
         with which a zero key still takes a share.
Differs  |a| is at least 1e-5, as in the release's TPU layer; its other layer divides 0 by 0 there. Not here: the
         release's dropout on the scores, which every published model sets to 0.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from formwright.contracts import Context, FeedForward, Mixer, NormFactory
from formwright.errors import FormwrightError
from formwright.ops.linear import linear
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.block.prenorm import PreNorm
from formwright.parts.mixing.multihead import MultiHeadAttention

Theta = Literal["l2_norm_gelu", "gelu_l2_norm", "softmax"]
NewKeys = Literal["zero", "random"]

KEY_STD = 0.02
EPS = 1e-5


def modified_softmax(a: Float[Tensor, "... n"], tau: float, theta: Theta = "l2_norm_gelu") -> Float[Tensor, "... n"]:
    """The weights of the values: no distribution, GELU lets them be negative."""
    if theta == "softmax":
        return tau**2 * a.softmax(-1)
    a = F.gelu(a) if theta == "gelu_l2_norm" else a
    norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=torch.promote_types(a.dtype, torch.float32))
    a = a * (tau / norm.clamp(min=EPS)).to(a.dtype)
    return F.gelu(a) if theta == "l2_norm_gelu" else a


class Pattention(nn.Module):
    """(.., d1) -> (.., d2): a token attends over n parameter tokens.

    Args:
        inputs: d1.
        outputs: d2.
        tokens: n.
        layers: of the model, for the initial values.
        width: of the model, for the initial values.
        tau_tokens: tau^2; none = n.
        theta: how scores become weights.
    """

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        tokens: int,
        layers: int,
        width: int,
        tau_tokens: int | None = None,
        theta: Theta = "l2_norm_gelu",
    ) -> None:
        super().__init__()
        if tokens < 1 or (tau_tokens is not None and tau_tokens < 1):
            raise FormwrightError(
                f"Pattention needs tokens and tau_tokens of at least 1, got tokens={tokens} and "
                f"tau_tokens={tau_tokens}."
            )
        if theta not in get_args(Theta):
            raise FormwrightError(f"Pattention has theta = {', '.join(get_args(Theta))}; got {theta!r}.")
        self.keys = nn.Parameter(torch.empty(tokens, inputs))  # K
        self.values = nn.Parameter(torch.empty(tokens, outputs))  # V
        self.tau_tokens, self.theta = tau_tokens, theta
        self.value_std = 2 / (layers * math.sqrt(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.keys, std=KEY_STD)
        init.normal_(self.values, std=self.value_std)

    @property
    def tokens(self) -> int:
        return len(self.keys)

    @property
    def tau(self) -> float:
        return math.sqrt(self.tau_tokens or self.tokens)

    def extra_repr(self) -> str:
        inputs, outputs = self.keys.shape[1], self.values.shape[1]
        return f"{inputs}, {outputs}, tokens={self.tokens}, tau_tokens={self.tau_tokens}, theta={self.theta!r}"

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return linear(modified_softmax(linear(x, self.keys), self.tau, self.theta), self.values.T)

    @torch.no_grad()
    def grow(self, tokens: int, *, keys: NewKeys, tau_tokens: int | None) -> None:
        """Append tokens until there are so many. In place; the parameters are new ones.

        Values start at random: with keys and values of 0 neither would ever get a gradient.
        """
        new = tokens - self.tokens
        k, v = self.keys.new_zeros(new, self.keys.shape[1]), self.values.new_empty(new, self.values.shape[1])
        if keys == "random":
            init.normal_(k, std=KEY_STD)
        init.normal_(v, std=self.value_std)
        self.keys = nn.Parameter(torch.cat([self.keys, k]), requires_grad=self.keys.requires_grad)
        self.values = nn.Parameter(torch.cat([self.values, v]), requires_grad=self.values.requires_grad)
        self.tau_tokens = tau_tokens


class TokenFormerFeedForward(Pattention):
    """(b, n, d) -> (b, n, d), every token alone: one Pattention.

    Args:
        dim: width d.
        hidden: parameter tokens.
        layers: of the model, for the initial values.
        tau_tokens: tau^2; none = the parameter tokens.
        theta: how scores become weights.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        layers: int,
        tau_tokens: int | None = None,
        theta: Theta = "l2_norm_gelu",
    ) -> None:
        super().__init__(
            inputs=dim, outputs=dim, tokens=hidden, layers=layers, width=dim, tau_tokens=tau_tokens, theta=theta
        )

    def forward(self, x: Float[Tensor, "b n d"], _context: Context | None = None) -> Float[Tensor, "b n d"]:
        return super().forward(x)


class TokenFormerAttention(MultiHeadAttention):
    """Multi-head softmax attention whose four projections are Pattentions.

    Args:
        dim: width D of the tokens.
        heads: query heads.
        layers: of the model, for the initial values.
        kv_heads: key and value heads, a divisor of `heads`; none = as many.
        head_dim: width of a head; none = dim / heads.
        position: this layer's own position; none = the context's shared one, if any.
        tokens: parameter tokens of each projection; none = D.
        tau_tokens: tau^2; none = the parameter tokens.
        theta: how scores over parameter tokens become weights.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        layers: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: nn.Module | None = None,
        tokens: int | None = None,
        tau_tokens: int | None = None,
        theta: Theta = "l2_norm_gelu",
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            attention=SoftmaxAttention(),
            kv_heads=kv_heads,
            head_dim=head_dim,
            position=position,
            bias=False,
        )
        del self.query_key_value, self.out
        tokens = dim if tokens is None else tokens

        def projection(inputs: int, outputs: int) -> Pattention:
            return Pattention(
                inputs=inputs,
                outputs=outputs,
                tokens=tokens,
                layers=layers,
                width=dim,
                tau_tokens=tau_tokens,
                theta=theta,
            )

        self.query = projection(dim, self.inner_width)
        self.key = projection(dim, self.kv_heads * self.head_dim)
        self.value = projection(dim, self.kv_heads * self.head_dim)
        self.out = projection(self.inner_width, dim)

    @property
    def projections(self) -> tuple[Pattention, Pattention, Pattention, Pattention]:
        return self.query, self.key, self.value, self.out

    def _projected(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        q = self._by_head(self.query(x))
        if context.memory is None:
            return q, self._by_head(self.key(x)), self._by_head(self.value(x))
        stored = None if context.cache is None else context.cache.stored()
        if stored is not None:  # the memory does not change between decoding steps
            return q, *stored
        k, v = self._by_head(self.key(context.memory)), self._by_head(self.value(context.memory))
        if context.cache is not None:
            context.cache.update(k, v)
        return q, k, v

    def _by_head(self, x: Float[Tensor, "b n w"]) -> Float[Tensor, "b h n {self.head_dim}"]:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def without_gain(norm: nn.Module) -> nn.Module:
    """The norm without its gain and shift.

    Raises:
        FormwrightError: it learns something else.
    """
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        norm.elementwise_affine = False
        for name in ("weight", "bias"):
            if hasattr(norm, name):
                norm.register_parameter(name, None)
    if next(norm.parameters(), None) is not None:
        raise FormwrightError(
            f"TokenFormer's norms learn nothing, so that a model may grow, but {type(norm).__name__} does: "
            "choose norm layernorm or rmsnorm, or block pre."
        )
    return norm


class TokenFormerBlock(PreNorm):
    """The pre-norm block with norms that learn nothing. A stack of these ends with an ordinary norm.

    Args:
        dim: width d.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        cross: the mixer that reads the encoder's output; none in an encoder or a plain decoder.
        norm: makes a norm of a given width, whose gain and shift are taken away.
        dropout: probability of dropping an element of what a sub-layer adds.
    """

    def __init__(
        self,
        *,
        dim: int,
        mixer: Mixer,
        feedforward: FeedForward | None,
        norm: NormFactory,
        cross: Mixer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim=dim,
            mixer=mixer,
            feedforward=feedforward,
            norm=lambda width: without_gain(norm(width)),
            cross=cross,
            dropout=dropout,
        )
