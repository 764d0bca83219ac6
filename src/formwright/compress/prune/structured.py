"""Cut the feed-forward neurons, heads and layers that carry least, and be left with a smaller dense model.

Structured magnitude pruning, with whole layers chosen as by Men et al. 2024, "ShortGPT", arXiv 2403.03853. What is cut
is gone: parameters, FLOPs, memory and time fall together, on any hardware.

    neuron i    |up row i| |down column i|
    head h      |value rows of h| |output columns of h|
    layer       1 - mean cos(what goes in, what comes out), over calibration texts

Within a layer the lowest scores go, the same share in each, so that layers keep equal widths. Layers go before widths
are chosen.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from formwright.compress.anatomy import Attention, FeedForward, describe
from formwright.compress.modifier import Data, Modifier
from formwright.compress.surgery import remove_heads, remove_layers, remove_neurons
from formwright.errors import FormwrightError


class Cut(Modifier):
    """Remove the parts with the lowest scores.

    Args:
        neurons: the share of hidden neurons that goes, in every feed-forward.
        heads: the share of heads that goes, in every self-attention; whole key-value groups.
        layers: how many layers go.
        batches: calibration batches the layers are scored on.
    """

    def __init__(self, *, neurons: float = 0.0, heads: float = 0.0, layers: int = 0, batches: int = 4) -> None:
        for name, share in (("neurons", neurons), ("heads", heads)):
            if not 0 <= share < 1:
                raise FormwrightError(f"{name} is {share:g}, but it is the share that goes: from 0 to below 1.")
        if layers < 0 or batches < 1:
            raise FormwrightError(f"layers is {layers} and batches {batches}: neither can be negative, nor batches 0.")
        if not (neurons or heads or layers):
            raise FormwrightError("cut has nothing to do: write cut(neurons=0.25), cut(heads=0.25) or cut(layers=1).")
        self.neurons, self.heads, self.layers, self.batches = neurons, heads, layers, batches
        self.redundant: list[int] = []

    def check(self, model: PreTrainedModel) -> None:
        layers = describe(model).layers
        if self.layers >= len(layers):
            raise FormwrightError(f"The model has {len(layers)} layers: cut(layers={self.layers}) would leave none.")
        if self.heads and all(one.attention is None or one.attention.kv_heads < 2 for one in layers):
            raise FormwrightError("No layer of this model has more than one key-value head: leave heads out.")

    def calibrate(self, model: PreTrainedModel, data: Data) -> None:
        if self.layers:
            scores = importance(model, data, self.batches)
            self.redundant = sorted(scores, key=lambda index: scores[index])[: self.layers]

    def apply(self, model: PreTrainedModel) -> None:
        if self.redundant:
            remove_layers(model, self.redundant)
        layers = describe(model).layers
        if self.heads:
            found = {one.index: one.attention for one in layers if one.attention is not None}
            remove_heads(model, {i: weakest_heads(model, part, self.heads) for i, part in found.items()})
        if self.neurons:
            widths = {one.index: one.feedforward for one in layers if one.feedforward is not None}
            remove_neurons(model, {i: weakest_neurons(model, part, self.neurons) for i, part in widths.items()})


def weakest_neurons(model: nn.Module, part: FeedForward, share: float) -> list[int]:
    """The hidden neurons with the lowest scores; at least one is left."""
    up, down = _matrix(model, part.up), _matrix(model, part.down)
    score = up[-part.width :].norm(dim=1) * down.norm(dim=0)  # a gate in the same matrix comes first
    return _lowest(score, min(round(share * part.width), part.width - 1))


def weakest_heads(model: nn.Module, part: Attention, share: float) -> list[int]:
    """The query heads of the key-value groups with the lowest scores; at least one group is left."""
    out = _matrix(model, part.output)
    grouped = out.reshape(out.shape[0], part.kv_heads, -1).pow(2).sum((0, 2)).sqrt()
    if part.value is not None:
        grouped = grouped * _matrix(model, part.value).reshape(part.kv_heads, -1).norm(dim=1)
    size = part.heads // part.kv_heads
    gone = _lowest(grouped, min(round(share * part.kv_heads), part.kv_heads - 1))
    return [head for group in gone for head in range(group * size, (group + 1) * size)]


def _lowest(scores: Float[Tensor, " n"], count: int) -> list[int]:
    return scores.argsort(stable=True)[:count].sort().values.tolist()


def _matrix(model: nn.Module, path: str) -> Float[Tensor, "out in"]:
    """A projection's weight with outputs in rows, as Linear has it and GPT-2's Conv1D has not."""
    module = model.get_submodule(path)
    weight = module.weight.detach().float()
    return weight if isinstance(module, nn.Linear) else weight.T


@torch.no_grad()
def importance(model: PreTrainedModel, data: Data, batches: int) -> dict[int, float]:
    """How far each layer turns what passes through it: 1 - mean cosine, on calibration rows."""
    layers = describe(model).layers
    if any(layer.repeats > 1 for layer in layers):
        raise FormwrightError("The layers of this model are one and the same: cut neurons or heads instead.")
    sums = {layer.index: [0.0, 0.0] for layer in layers}
    with _watched(model, {layer.index: layer.path for layer in layers}, sums):
        for batch in data.batches(batches):
            model(**{name: value.to(model.device) for name, value in batch.items()})
    return {index: 1 - total / max(1.0, count) for index, (total, count) in sums.items()}


@contextmanager
def _watched(model: nn.Module, paths: dict[int, str], sums: dict[int, list[float]]) -> Iterator[None]:
    def hook(index: int):  # a hook of torch
        def see(module: nn.Module, given: tuple, named: dict, out: object) -> None:
            del module
            before = given[0] if given else named["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index][0] += float(cosine.sum())
            sums[index][1] += cosine.numel()

        return see

    handles = [
        model.get_submodule(path).register_forward_hook(hook(index), with_kwargs=True) for index, path in paths.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
