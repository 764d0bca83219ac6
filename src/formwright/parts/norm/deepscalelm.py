"""DeepScaleLM: matrices drawn so that every sub-layer gives variance 1, at any depth, before and behind the norm.

Paper    Kedia et al.: Transformers Get Stable (ICML 2024), arXiv:2403.09635.
Idea     The moments of every component are known (`formwright.ops.moments`), so that the spread of a matrix can be
         solved for. What attention gives depends on r, the correlation of the tokens it averages, which is followed
         through the layers. With dropout p, width d, n_e embedding tables and hidden width f:

             embeddings           (1 - p) / n_e
             queries, keys        1 / d
             values, outputs      sqrt((1 - p) / r_l) / d              r_l = correlation of the tokens at layer l
             feed-forward, ReLU   sqrt(2 (1 - p) / (d f))              = sqrt((1 - p) / 2) / d for f = 4 d
             other matrices       1 / inputs

         r starts at r_0 (1 - p), and with the weights of the residuals (block "deepscalelm"), skip^2 + branch^2 = 1,

             r <- skip^2 r + branch^2 (1 - p)                                                    after attention
             r <- skip^2 r + branch^2 (1 - p) (r + (sqrt(1 - r^2) - r arccos r) / pi)            after feed-forward

         A head that shares the embeddings reads tokens times 1 / sqrt(d (1 - p) / n_e).
Differs  r_0 = 0.221 is the paper's, of BERT's text; `token_correlation` estimates that of a batch. Other activations
         are solved for numerically from what their layer computes; the paper derives GELU's, the release changes to
         ReLU. In an encoder-decoder, cross-attention takes r from the encoder's end and counts as a sub-layer. Values
         of another width than d, and matrices of convolutions, follow the same equations. Positions that are no learned
         table, or are given a spread of their own, are left as they are.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import init

from formwright.errors import FormwrightError
from formwright.ops.moments import Moments, relu
from formwright.parts.norm.init import MATRICES, common, fan_in, is_loaded, slices
from formwright.parts.position.learned import Learned

BERT = 0.221  # the paper's r_0: segments of two kinds and the words of Wikipedia


class Residual(NamedTuple):
    """What skip and branch are multiplied by; the squares sum to 1."""

    skip: float
    branch: float


def residual(layers: int) -> Residual:
    """skip^2 = 1 - 1 / N, branch^2 = 1 / N."""
    if layers < 2:
        raise FormwrightError(
            f"DeepScaleLM divides what a sub-layer adds by the root of the depth and keeps the rest of the stream: of "
            f"{layers} layer nothing would be kept. Build two layers or more, or choose another block."
        )
    return Residual(skip=math.sqrt(1 - 1 / layers), branch=math.sqrt(1 / layers))


def correlations(
    layers: int, *, dropout: float, r0: float = BERT, crossed: bool = False, weights: Residual | None = None
) -> list[float]:
    """r at the input of every layer, and behind the last one.

    Args:
        layers: N.
        dropout: p.
        r0: the correlation of the embedded tokens, before dropout.
        crossed: whether a cross-attention follows self-attention.
        weights: of the residuals; none = those of N layers.
    """
    skip, branch = residual(layers) if weights is None else weights

    def joined(r: float, given: float) -> float:
        return (skip**2 * r + branch**2 * given) / (skip**2 + branch**2)

    found = [r0 * (1 - dropout)]
    for _ in range(layers):
        r = found[-1]
        for _ in range(2 if crossed else 1):  # all tokens get nearly the same mean of values
            r = joined(r, 1 - dropout)
        hidden = relu(Moments(variance=1.0, covariance=r))
        found.append(joined(r, (1 - dropout) * (hidden.covariance + hidden.mean**2) / hidden.second))
    return found


def token_correlation(
    ids: Int[Tensor, "b n"], types: Int[Tensor, "b n"] | None = None, *, tables: int | None = None
) -> float:
    """r_0 of a batch: how often two tokens of a text share their row, on average over the embedding tables.

    Args:
        ids: texts without padding.
        types: token types, where the model has any.
        tables: embedding tables that are summed; none = one, and one more with types.
    """
    if ids.shape[1] < 2:
        raise FormwrightError("A correlation of tokens needs texts of two tokens at least.")
    read = [ids] if types is None else [ids, types]
    return sum(share_alike(one) for one in read) / (len(read) if tables is None else tables)


def share_alike(ids: Int[Tensor, "b n"]) -> float:
    """Of all pairs of places in a text, the share that hold the same id."""
    _, n = ids.shape
    same = torch.stack([torch.unique(row, return_counts=True)[1].square().sum() for row in ids]).double()
    return float((same - n).mean() / (n * (n - 1)))


class DeepScaleLM:
    """A scheme for blocks whose residuals are weighted: block "deepscalelm" or "deepscalelm-post".

    Args:
        dim: width d.
        encoder_layers: N, 0 in a decoder-only model.
        decoder_layers: M, 0 in an encoder-only model.
        dropout: p, the model's own.
        tables: n_e, embedding tables that are summed.
        r0: the correlation of the embedded tokens, before dropout; see `token_correlation`.
    """

    def __init__(
        self,
        *,
        dim: int,
        encoder_layers: int,
        decoder_layers: int,
        dropout: float = 0.0,
        tables: int = 1,
        r0: float = BERT,
    ) -> None:
        if not 0 <= dropout < 1 or tables < 1 or not 0 < r0 <= 1:
            raise FormwrightError(
                "DeepScaleLM needs dropout from 0 to below 1, tables from 1 and r0 above 0 up to 1, "
                f"got dropout={dropout}, tables={tables} and r0={r0}."
            )
        self.kept, self.embedding_std = 1 - dropout, math.sqrt((1 - dropout) / tables)
        self.tied_factor = 1 / (math.sqrt(dim) * self.embedding_std)
        crossed = encoder_layers > 0 and decoder_layers > 0
        self.r: dict[str, list[float]] = {}
        if encoder_layers:
            self.r["encoder"] = correlations(encoder_layers, dropout=dropout, r0=r0)
        if decoder_layers:
            self.r["decoder"] = correlations(decoder_layers, dropout=dropout, r0=r0, crossed=crossed)
        if crossed:
            self.r["cross"] = [self.r["encoder"][-1]] * decoder_layers

    def __call__(self, layer: nn.Module) -> None:
        if not common(layer, embedding_std=self.embedding_std):
            return
        if not isinstance(layer, nn.Linear):  # pixels of variance 1 become tokens
            init.normal_(layer.weight, std=self.embedding_std * fan_in(layer) ** -0.5)
            return
        for name, matrix in slices(layer):
            init.normal_(matrix, std=math.sqrt(self.variance(layer, name)))

    def variance(self, layer: nn.Linear, name: str) -> float:
        """Of the matrix called `name` in a layer. A feed-forward layer alone is taken for one with ReLU."""
        if name in ("up", "down"):
            return math.sqrt(2 * self.kept / layer.weight.numel())
        if name in ("value", "out"):
            r = self.r.get(getattr(layer, "stack", ""), next(iter(self.r.values())))
            return math.sqrt(self.kept / r[getattr(layer, "place", 0)]) / layer.in_features
        return 1 / layer.in_features

    def finish(self, part: nn.Module) -> None:
        """What a part as a whole decides: the activation of a feed-forward layer, a table of positions."""
        if isinstance(part, Learned) and part.std is None and not is_loaded(part.weight):
            init.normal_(part.weight, std=self.embedding_std)
        matrices = [getattr(part, "up", None), getattr(part, "down", None)]
        if hasattr(part, "activation") and all(isinstance(matrix, MATRICES) for matrix in matrices):
            std = self.feedforward_std(part)
            for matrix in matrices:
                if not is_loaded(matrix.weight):
                    init.normal_(matrix.weight, std=std)

    def feedforward_std(self, part: nn.Module) -> float:
        """Of both matrices, so that tokens of variance 1 come out with variance 1 - p: halved until they do."""
        inputs, hidden = part.up.in_features, part.down.in_features

        def given(std: float) -> float:
            return hidden * std**2 * hidden_square(part, std * math.sqrt(inputs))

        low, high = 0.0, 1.0
        while given(high) < self.kept:
            high *= 2
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if given(middle) < self.kept else (low, middle)
        return high


@torch.no_grad()
def hidden_square(part: nn.Module, std: float) -> float:
    """The mean square of what the last matrix of a feed-forward layer reads when the first gives N(0, std^2)."""
    if not isinstance(part.inner, nn.Identity):
        return 1.0  # a norm
    hidden = part.down.in_features
    order = torch.randperm(64 * hidden, generator=torch.Generator().manual_seed(0))
    share = (order.double() + 0.5) / (64 * hidden)
    normal = math.sqrt(2) * torch.special.erfinv(2 * share - 1)
    weight = part.down.weight
    z = std * normal.view(1, 64, hidden).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    square = float(part.activation(z).square().mean())
    return square * std**2 if getattr(part, "gated", False) else square
