"""Embeddings and softmax of a large vocabulary in clusters of falling frequency.

Paper    Grave, Joulin, Cissé, Grangier, Jégou: Efficient softmax approximation for GPUs (ICML 2017), arXiv:1609.04309;
         the input side: Baevski, Auli (ICLR 2019), arXiv:1809.10853; both as Transformer-XL uses them.
Idea     Ids are sorted, the most frequent first, and cut into clusters. The first cluster's softmax has one more entry
         for each other cluster; a rare word costs the tokens that mean it one more, small softmax.

             log p(v) = log head(v)                            v in cluster 0
             log p(v) = log head(cluster c) + log tail_c(v)    else

         Cluster c has embeddings of width D / div_val^c and, with div_val > 1, a matrix that takes them to D.
Differs  In the release the entry of cluster c stands c-th from the end, here c-th after the first cluster's words: the
         same function of weights in another order.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Cluster(NamedTuple):
    """Ids from `first` to below `last`, with embeddings of a width of their own."""

    first: int
    last: int
    width: int


def clusters(vocab: int, dim: int, cutoffs: Sequence[int], div_val: int) -> list[Cluster]:
    edges = [0, *cutoffs, vocab]
    return [Cluster(edges[i], edges[i + 1], dim // div_val**i) for i in range(len(edges) - 1)]


def _tables(parts: Sequence[Cluster]) -> nn.ModuleList:
    return nn.ModuleList(nn.Embedding(part.last - part.first, part.width) for part in parts)


class Projection(nn.Linear):
    """From a cluster's width to D. Starts at N(0, 0.01^2)."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(width, dim, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)


def _projections(parts: Sequence[Cluster], dim: int, div_val: int) -> nn.ModuleList | None:
    return nn.ModuleList(Projection(part.width, dim) for part in parts) if div_val > 1 else None


class AdaptiveEmbedding(nn.Module):
    """Ids (b, n) to tokens (b, n, d), times sqrt(D).

    Args:
        vocab: ids.
        dim: width D.
        cutoffs: the first id of every cluster but the first.
        div_val: what each cluster's width is divided by, once more than the last one's.
    """

    def __init__(self, *, vocab: int, dim: int, cutoffs: Sequence[int], div_val: int = 1) -> None:
        super().__init__()
        self.dim, self.clusters = dim, clusters(vocab, dim, cutoffs, div_val)
        self.tables = _tables(self.clusters)
        self.projections = _projections(self.clusters, dim, div_val)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n {self.dim}"]:
        x = self.tables[0].weight.new_zeros(*ids.shape, self.dim)
        for i, (part, table) in enumerate(zip(self.clusters, self.tables, strict=True)):
            here = (ids >= part.first) & (ids < part.last)
            rows = table(ids[here] - part.first)
            rows = rows if self.projections is None else self.projections[i](rows)
            x = x.masked_scatter(here[..., None], rows.to(x.dtype))
        return x * math.sqrt(self.dim)


class AdaptiveSoftmax(nn.Module):
    """Logarithms of probabilities, of all words or of the right ones alone.

    Args:
        vocab, dim, cutoffs, div_val: as of the embedding.
        tables: whether it has tables of its own; else it reads the embedding's.
        projections: the same for the projections.
        bias: whether every word and cluster has a bias.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        cutoffs: Sequence[int],
        div_val: int = 1,
        tables: bool = False,
        projections: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.clusters = clusters(vocab, dim, cutoffs, div_val)
        self.tables = _tables(self.clusters) if tables else None
        self.projections = _projections(self.clusters, dim, div_val) if projections else None
        self.rest = nn.Linear(dim, len(cutoffs), bias=bias)  # one entry a further cluster, beside the first one's words
        self.biases = nn.ParameterList(torch.empty(part.last - part.first) for part in self.clusters) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for bias in self.biases or ():
            nn.init.zeros_(bias)

    def forward(self, x: Float[Tensor, "*b d"], embedding: AdaptiveEmbedding) -> Float[Tensor, "*b v"]:
        """Of all words, O(b v)."""
        head = self._head(x, embedding)
        words = self.clusters[0].last
        tails = [head[..., words + i - 1, None] + self._tail(x, i, embedding) for i in range(1, len(self.clusters))]
        return torch.cat([head[..., :words], *tails], -1)

    def loss(
        self, x: Float[Tensor, "b n d"], targets: Int[Tensor, "b n"], embedding: AdaptiveEmbedding
    ) -> Float[Tensor, ""]:
        """The mean of -log p over the targets that are not -100; a cluster is computed for its own words alone."""
        x, targets = x[targets != -100], targets[targets != -100]
        head = self._head(x, embedding)
        total = head.new_zeros(())
        for i, part in enumerate(self.clusters):
            here = (targets >= part.first) & (targets < part.last)
            word = (targets[here] - part.first)[:, None]
            if i == 0:
                total = total - head[here].gather(-1, word).sum()
            else:
                cluster = head[here, self.clusters[0].last + i - 1]
                total = total - cluster.sum() - self._tail(x[here], i, embedding).gather(-1, word).sum()
        return total / len(targets)

    def _head(self, x: Tensor, embedding: AdaptiveEmbedding) -> Tensor:
        x = self._narrowed(x, 0, embedding)
        return torch.cat([self._words(x, 0, embedding), self.rest(x)], -1).float().log_softmax(-1)

    def _tail(self, x: Tensor, i: int, embedding: AdaptiveEmbedding) -> Tensor:
        return self._words(self._narrowed(x, i, embedding), i, embedding).float().log_softmax(-1)

    def _narrowed(self, x: Tensor, i: int, embedding: AdaptiveEmbedding) -> Tensor:
        projections = embedding.projections if self.projections is None else self.projections
        return x if projections is None else x @ projections[i].weight

    def _words(self, x: Tensor, i: int, embedding: AdaptiveEmbedding) -> Tensor:
        tables = embedding.tables if self.tables is None else self.tables
        return F.linear(x, tables[i].weight, None if self.biases is None else self.biases[i])
