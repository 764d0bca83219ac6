"""Attention that lets a head do nothing: clipped softmax and gated attention, and the outliers they remove.

Paper    Bondarenko, Nagel, Blankevoort: Quantizable Transformers (NeurIPS 2023), arXiv:2306.12929.
Idea     A head that wants to leave a token alone must put all its weight on tokens with small values, and to get near 0
         elsewhere it pushes the scores, and with them a few activations, ever higher. INT8 ranges then go to those few.
         Two independent ways out:

             clipped softmax     p = clip((zeta - gamma) softmax(s) + gamma, 0, 1)       zeta >= 1, gamma <= 0
             gated attention     out_h,t = sigmoid(G_h(x_t,h)) * (softmax(q k^T / sqrt(d)) v)_h,t

         A weight is exactly 0 where softmax <= -gamma / (zeta - gamma), without a gradient, and rows need not sum to 1:
         they are not scaled back. gamma = -alpha / T with T the longest length of training, a constant, keeps its
         meaning over lengths. G_h reads its head's slice of what the layer reads, x_t,h, not q and not the output.
Differs  Gates are conditional on every token; the paper's gates on a mean over tokens, and on nothing, are left out. A
         position that scales weights does so after clipping.
"""

import math
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from formwright.contracts import Mask, Structured, dense
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import SoftmaxAttention, attention_scores, repeat_heads, softmax_or_zero
from formwright.parts.mixing.multihead import MultiHeadAttention

Gate = Literal["linear", "mlp", "all-heads"]
ALPHA = 3.2  # BERT's best, gamma = -0.025 at T = 128


class ClippedSoftmax(nn.Module):
    """Softmax attention that can give weights of exactly 0 (gamma < 0) and 1 (zeta > 1). No parameters.

    Args:
        length: T, the longest sequence of training.
        alpha: gamma = -alpha / T; none = 3.2 when no gamma is given (BERT 2 to 4, OPT 12).
        gamma: the lower stretch itself, at most 0, instead of alpha.
        zeta: the upper stretch, at least 1; 1 is the paper's best.
        dropout: probability of dropping a weight in training, after clipping.
    """

    grouped: ClassVar[bool] = False

    def __init__(
        self,
        *,
        length: int,
        alpha: float | None = None,
        gamma: float | None = None,
        zeta: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if alpha is not None and gamma is not None:
            raise FormwrightError(f"Clipped softmax takes alpha or gamma, got alpha={alpha} and gamma={gamma}.")
        if gamma is None:
            alpha = ALPHA if alpha is None else alpha
            if length < 1 or alpha < 0:
                raise FormwrightError(
                    f"Clipped softmax needs length from 1 and alpha from 0 for gamma = -alpha / length, "
                    f"got length={length} and alpha={alpha}."
                )
            gamma = -alpha / length
        if gamma > 0 or zeta < 1:
            raise FormwrightError(f"Clipped softmax needs gamma <= 0 and zeta >= 1, got gamma={gamma} and zeta={zeta}.")
        if not 0 <= dropout < 1:
            raise FormwrightError(f"Attention dropout is a probability from 0 to below 1, got {dropout}.")
        self.gamma, self.zeta, self.dropout = gamma, zeta, dropout

    def clip(self, weights: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
        """Stretch to gamma .. zeta and cut at 0 and 1. A masked key has weight 0, goes to gamma and comes back to 0."""
        return ((self.zeta - self.gamma) * weights + self.gamma).clamp(0, 1)

    def weights(
        self,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b g k d"],
        *,
        mask: Mask,
        bias: Structured | None = None,
        scale: Structured | None = None,
        scaling: float | None = None,
    ) -> Float[Tensor, "b h q k"]:
        """The weights, from 0 to 1; a row sums to anything from 0."""
        weights = self.clip(softmax_or_zero(attention_scores(q, k, mask=mask, bias=bias, scaling=scaling)))
        return weights if scale is None else weights * dense(scale).to(weights.dtype)

    def forward(
        self,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b g k d"],
        v: Float[Tensor, "b g k e"],
        *,
        mask: Mask,
        bias: Structured | None = None,
        scale: Structured | None = None,
        scaling: float | None = None,
    ) -> Float[Tensor, "b h q e"]:
        weights = self.weights(q, k, mask=mask, bias=bias, scale=scale, scaling=scaling)
        return F.dropout(weights, self.dropout, self.training) @ repeat_heads(v, q.shape[1])


class HeadGate(nn.Module):
    """How open each head is for each token: (b, n, d) -> (b, h, n, 1), from 0 to 1.

    Args:
        dim: width D of the layer's input.
        heads: h; head h reads slice h of the input, D / h wide, unless the gate is all-heads.
        kind: one linear map a head, a two-layer one with ReLU (D / 4h hidden units), or one map from D to all heads.
        opening: pi, how open it starts: bias = logit(pi).
        std: of the initial weights; none = uniform within 1 / sqrt(inputs).
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kind: Gate,
        opening: float,
        std: float | None,
    ) -> None:
        super().__init__()
        if kind not in get_args(Gate):
            raise FormwrightError(f"A gate is one of {', '.join(get_args(Gate))}, got {kind!r}.")
        if not 0 < opening < 1:
            raise FormwrightError(f"A gate's opening is a share between 0 and 1, got {opening}.")
        if kind != "all-heads" and dim % heads:
            raise FormwrightError(
                f"A width of {dim} does not split into {heads} slices, one a head; choose another width or all-heads."
            )
        self.heads, self.kind, self.opening, self.std = heads, kind, opening, std
        width = dim if kind == "all-heads" else dim // heads
        if kind == "mlp":
            hidden = max(1, width // 4)
            self.first = nn.Parameter(torch.empty(heads, width, hidden))
            self.first_bias = nn.Parameter(torch.empty(heads, hidden))
            width = hidden
        self.weight, self.bias = nn.Parameter(torch.empty(heads, width)), nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        matrices = [self.first, self.first_bias, self.weight] if self.kind == "mlp" else [self.weight]
        for matrix in matrices:
            inputs = self.first.shape[1] if matrix is not self.weight and self.kind == "mlp" else self.weight.shape[1]
            if self.std is None:
                init.uniform_(matrix, -(inputs**-0.5), inputs**-0.5)
            else:
                init.normal_(matrix, std=self.std)
        init.constant_(self.bias, math.log(self.opening / (1 - self.opening)))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n 1"]:
        if self.kind == "all-heads":
            return F.linear(x, self.weight, self.bias).sigmoid().mT[..., None]
        slices = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, h, n, d / h)
        if self.kind == "mlp":
            slices = (slices @ self.first + self.first_bias[:, None]).relu()
        return (slices @ self.weight[..., None] + self.bias[:, None, None]).sigmoid()


class GatedAttention(MultiHeadAttention):
    """Multi-head softmax attention whose heads close for tokens they have nothing to add to.

    Args:
        dim: width D of the tokens.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; none = as many.
        head_dim: width of a head; none = dim / heads.
        position: this layer's own position; none = the context's shared one, if any.
        qkv_bias: whether the projections have biases.
        gate: what computes a gate, see HeadGate.
        opening: pi, how open the gates start: 0.5 in BERT, 0.25 in OPT.
        start: "pretrained" divides the gated heads by pi and starts the gates' weights at N(0, 0.01^2), so that
            weights of plain attention go on nearly unchanged.
        dropout: probability of dropping a weight in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: nn.Module | None = None,
        qkv_bias: bool = True,
        gate: Gate = "mlp",
        opening: float = 0.5,
        start: Literal["scratch", "pretrained"] = "scratch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            attention=SoftmaxAttention(dropout=dropout),
            kv_heads=kv_heads,
            head_dim=head_dim,
            position=position,
            bias=qkv_bias,
        )
        if start not in ("scratch", "pretrained"):
            raise FormwrightError(f"Gated attention starts from scratch or pretrained weights, got start={start!r}.")
        pretrained = start == "pretrained"
        self.gate = HeadGate(dim=dim, heads=heads, kind=gate, opening=opening, std=0.01 if pretrained else None)
        self.factor = 1 / opening if pretrained else 1.0

    def gather(
        self, mixed: Float[Tensor, "b h n e"], x: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b n {self.inner_width}"]:
        return super().gather(mixed * (self.gate(x) * self.factor), x)


def infinity_norm(x: Float[Tensor, "*b d"]) -> Float[Tensor, ""]:
    """The largest absolute value of a layer's output, the paper's first measure of outliers."""
    return x.abs().amax()


def kurtosis(x: Float[Tensor, "*b d"]) -> Float[Tensor, ""]:
    """Fourth moment over the squared variance along the features (3 for a Gaussian), the mean over the tokens."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    away = x - x.mean(-1, keepdim=True)
    return (away.pow(4).mean(-1) / (away.pow(2).mean(-1).square() + 1e-6)).mean()
