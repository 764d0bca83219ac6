"""The matrices of a model that factorisation replaces: the projections of attention and feed-forward layers."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.anatomy import Attention, describe
from formwright.compress.prune.matrices import Matrix
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerPreTrainedModel


@dataclass(frozen=True)
class Site:
    """One projection: `makes_heads` of queries, keys and values, whose outputs are heads side by side."""

    matrix: Matrix
    head_dim: int
    makes_heads: bool

    @property
    def path(self) -> str:
        return self.matrix.path

    @property
    def bias(self) -> nn.Parameter | None:
        return self.matrix.module.bias


def sites(model: PreTrainedModel) -> list[Site]:
    """The plain Linear and Conv1D among the projections of every layer, each once; what is another module is left out.

    Raises:
        FormwrightError: the family is unknown, or none is left.
    """
    named = _ours(model) if isinstance(model, TransformerPreTrainedModel) else _theirs(model)
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in named}
    found = [
        Site(Matrix(path, module), *named[path])
        for path, module in modules.items()
        if type(module) in (nn.Linear, Conv1D) and module.weight.is_floating_point()
    ]
    if not found:
        raise FormwrightError(f"{type(model).__name__} has no plain projections left to factorise: factorise it first.")
    return found


def _theirs(model: PreTrainedModel) -> dict[str, tuple[int, bool]]:
    named: dict[str, tuple[int, bool]] = {}
    for layer in describe(model).layers:
        attentions = [one for one in (layer.attention, layer.cross) if one is not None]
        for one in attentions:
            named |= _of_attention(one)
        if layer.feedforward is not None and attentions:
            part = layer.feedforward
            width = attentions[0].head_dim
            named |= {path: (width, False) for path in (part.gate, part.up, part.down) if path is not None}
    return named


def _of_attention(part: Attention) -> dict[str, tuple[int, bool]]:
    makers = (part.query, part.key, part.value, part.fused)
    return {path: (part.head_dim, True) for path in makers if path is not None} | {part.output: (part.head_dim, False)}


def _ours(model: PreTrainedModel) -> dict[str, tuple[int, bool]]:
    """Of the configurable Transformer: what its parts give a role."""
    config = model.config
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    return {
        path: (head_dim, module.role == "query-key-value")
        for path, module in model.named_modules()
        if getattr(module, "role", None) in ("query-key-value", "out", "up", "down")
    }
