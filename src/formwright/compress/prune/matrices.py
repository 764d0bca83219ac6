"""The matrices of a model that can be pruned, the neurons and heads they make up, and how sparse they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.anatomy import Attention, FeedForward, Layer, describe

Masks = dict[str, Bool[Tensor, "_ _"]]  # by the path of a matrix, true where a weight stays
Scores = dict[str, Float[Tensor, "_ _"]]


@dataclass(frozen=True)
class Matrix:
    """A weight seen as (outputs, inputs); Conv1D holds it the other way round."""

    path: str
    module: Any  # Linear, Conv1D or Embedding

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    def seen(self, value: Tensor) -> Shaped[Tensor, "out in"]:
        """A tensor of the weight's own shape, or back."""
        return value.T if isinstance(self.module, Conv1D) else value

    @property
    def values(self) -> Float[Tensor, "out in"]:
        return self.seen(self.weight.detach())


def matrices(model: PreTrainedModel, *, embeddings: bool = False) -> dict[str, Matrix]:
    """The matrices inside layers, each once, and the token table if asked."""
    anatomy = describe(model)
    inside = tuple(f"{layer.path}." for layer in anatomy.layers)
    found = {
        path: Matrix(path, module)
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and path.startswith(inside)
    }
    table = anatomy.embeddings.token
    if embeddings and table is not None and isinstance(model.get_submodule(table), nn.Embedding):
        found[table] = Matrix(table, model.get_submodule(table))
    return found


@dataclass(frozen=True)
class Units:
    """The neurons or head groups of one layer: of each matrix the axis that counts them, and whose row or column each
    is."""

    layer: int
    count: int
    labels: Mapping[str, tuple[int, Int[Tensor, " n"]]]
    heads: int = 1  # query heads of a group

    def mean(self, scores: Scores) -> Float[Tensor, " units"]:
        """The mean score of the weights of each unit."""
        device = next(iter(scores.values())).device
        total, size = torch.zeros(2, self.count, device=device)
        for path, (axis, labels) in self.labels.items():
            lines = scores[path].sum(1 - axis)
            total.index_add_(0, labels.to(device), lines)
            size.index_add_(0, labels.to(device), torch.full_like(lines, scores[path].shape[1 - axis]))
        return total / size

    def masks(self, kept: Bool[Tensor, " units"], scores: Scores) -> Masks:
        found = {}
        for path, (axis, labels) in self.labels.items():
            line = kept[labels.to(kept.device)]
            found[path] = (line[:, None] if axis == 0 else line[None]).expand(scores[path].shape).clone()
        return found


def units(layer: Layer, structure: str) -> Units | None:
    """The neurons or the heads of a layer; heads that share keys and values are one unit. None where it has none."""
    if structure == "neuron":
        return None if layer.feedforward is None else _neurons(layer.index, layer.feedforward)
    return None if layer.attention is None else _heads(layer.index, layer.attention)


def _neurons(layer: int, part: FeedForward) -> Units:
    each = torch.arange(part.width)
    labels = {part.up: (0, each.repeat(2) if part.gate == part.up else each), part.down: (1, each)}
    if part.gate is not None and part.gate != part.up:
        labels[part.gate] = (0, each)
    return Units(layer, part.width, labels)


def _heads(layer: int, part: Attention) -> Units:
    size = part.heads // part.kv_heads
    pairs = torch.arange(part.kv_heads).repeat_interleave(part.head_dim)
    heads = torch.arange(part.kv_heads).repeat_interleave(size * part.head_dim)
    labels = {part.output: (1, heads)}
    for path, lines in ((part.query, heads), (part.key, pairs), (part.value, pairs)):
        if path is not None:
            labels[path] = (0, lines)
    if part.fused is not None:
        parts = 3 if part.query is None else 2
        in_turn = torch.arange(part.heads).repeat_interleave(parts * part.head_dim)
        labels[part.fused] = (0, heads.repeat(parts) if part.layout == "blocks" else in_turn)
    return Units(layer, part.kv_heads, labels, size)


@torch.no_grad()
def zero(found: Mapping[str, Matrix], masks: Masks) -> None:
    for path, mask in masks.items():
        found[path].weight.masked_fill_(~found[path].seen(mask), 0.0)


# What it comes to


@dataclass(frozen=True, kw_only=True)
class Report:
    """What pruning left. Work and storage are of the prunable matrices, work as a share of the dense ones'.

    Args:
        sparsity: the share of zeros of each matrix that is left, by path.
        prunable: the share of the prunable weights that are zero or gone.
        total: the same number of weights as a share of all the model's.
        dense: bytes of what is left, zeros included.
        bitmask: bytes of the non-zeros and a bit for every weight.
        csr: bytes of the non-zeros with a 32-bit column each, and of the rows' beginnings.
        theoretical: multiplications by what is not zero.
        realised: multiplications that dense kernels do: only what was cut out is saved.
    """

    sparsity: dict[str, float]
    prunable: float
    total: float
    dense: int
    bitmask: int
    csr: int
    theoretical: float
    realised: float


def report(model: PreTrainedModel, dense: "Sizes | None" = None, *, embeddings: bool = False) -> Report:
    """How sparse a model is.

    Args:
        dense: the sizes of the model before; none = of the model as it is.
        embeddings: the token table counts as prunable.
    """
    found = matrices(model, embeddings=embeddings)
    dense = dense or sizes(model, embeddings=embeddings)
    left = used = entries = size = bitmask = csr = 0
    sparsity = {}
    for path, one in found.items():
        values = one.values
        nonzero, count, width = int(values.count_nonzero()), values.numel(), values.element_size()
        sparsity[path] = 1 - nonzero / count
        left, size = left + nonzero, size + count * width
        if not isinstance(one.module, nn.Embedding):  # a table is looked up
            used, entries = used + nonzero, entries + count
        bitmask += math.ceil(count / 8) + nonzero * width
        csr += nonzero * (width + 4) + 4 * (len(values) + 1)
    return Report(
        sparsity=sparsity,
        prunable=1 - left / dense.prunable,
        total=(dense.prunable - left) / dense.total,
        dense=size,
        bitmask=bitmask,
        csr=csr,
        theoretical=used / dense.multiplied,
        realised=entries / dense.multiplied,
    )


@dataclass(frozen=True)
class Sizes:
    """How many weights can be pruned, how many there are, and how many of the prunable a token is multiplied by."""

    prunable: int
    total: int
    multiplied: int


def sizes(model: PreTrainedModel, *, embeddings: bool = False) -> Sizes:
    """Tied weights count once."""
    prunable, multiplied = (
        sum(one.values.numel() for one in matrices(model, embeddings=tables).values()) for tables in (embeddings, False)
    )
    return Sizes(prunable, sum(parameter.numel() for parameter in model.parameters()), multiplied)
