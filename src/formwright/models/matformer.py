"""Use a nested model at any size: choose a granularity a layer, draft with a part of it, extract a smaller model.

Paper    Devvrit et al.: MatFormer (NeurIPS 2024), arXiv:2310.07707, sections 3.2 and 3.3. The layer is in
         `formwright.parts.feedforward.matformer`, its training in `formwright.training.matformer`.
Idea     One nested training leaves g^L models of L layers to choose from (Mix'n'Match), of which the paper takes those
         that never decrease with depth and use neighbouring granularities.

             choose(model, 2)                                        # M everywhere, in place; (1, 1, 2, 2) a layer
             small = extract(model, fitting(model, parameters=10**7))    # an ordinary model, to be saved by itself
             model.generate(ids, assistant_model=drafter(model, 1))  # S drafts, XL checks: XL's own text, sooner

Differs  The drafter shares every weight with its model, but each of the two keeps a cache; the paper also shares the
         cache. Granularities, 1 to g, are counted here; the paper calls four of them S, M, L and XL.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import nn

from formwright.build import format_spec
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerPreTrainedModel
from formwright.parts.feedforward.matformer import MatFormerFeedForward

Granularities = int | Sequence[int]  # of all layers, or of each; encoder and decoder alike


def nested_layers(model: nn.Module) -> list[list[MatFormerFeedForward]]:
    """The nested layers of each stack.

    Raises:
        FormwrightError: no Transformer of ours, or one whose layers are not all nested, or not alike.
    """
    if not isinstance(model, TransformerPreTrainedModel):
        raise FormwrightError(
            f"Nested layers are those of a Transformer of Formwright, not of a {type(model).__name__}."
        )
    stacks = [stack for stack in (model.base_model.encoder, model.base_model.decoder) if stack is not None]
    layers = [[layer.block.feedforward for layer in stack.layers] for stack in stacks]
    counts = {len(one.widths) if isinstance(one, MatFormerFeedForward) else 0 for one in chain(*layers)}
    if len(counts) > 1 or 0 in counts:
        raise FormwrightError(
            'Every layer needs a nested feed-forward layer, all with as many granularities: feedforward="matformer".'
        )
    return layers


def choose(model: nn.Module, granularities: Granularities) -> None:
    """Let a model run at these granularities from now on, in place.

    Args:
        granularities: 1 (the smallest) to g of all layers, or a list of one a layer.

    Raises:
        FormwrightError: the model is not nested, or there are no such granularities or layers.
    """
    for layer, granularity in _chosen(model, granularities):
        layer.granularity = granularity


def size(model: nn.Module, granularities: Granularities) -> int:
    """How many parameters the model has that `extract` would give."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for layer, granularity in _chosen(model, granularities):
        total += sum(value.numel() for value in layer.cut(granularity).values())
        total -= sum(value.numel() for value in layer.parameters())
    return total


def extract(model: TransformerPreTrainedModel, granularities: Granularities) -> TransformerPreTrainedModel:
    """The smaller model by itself: plain layers with copies of the weights, of the same class, dtype and device."""
    chosen = list(_chosen(model, granularities))
    deepest = max(nested_layers(model), key=len)
    by_layer = {id(layer): granularity for layer, granularity in chosen}
    config = copy.deepcopy(model.config)
    specs = [
        format_spec({"name": one.form, "hidden": one.widths[by_layer[id(one)] - 1], "bias": one.bias})
        for one in deepest
    ]
    config.feedforward = specs if len(set(specs)) > 1 else specs[0]
    with torch.random.fork_rng(devices=[]):
        small = type(model)(config)
    weights = model.state_dict()
    for path, layer in model.named_modules():
        if isinstance(layer, MatFormerFeedForward):
            weights = {name: value for name, value in weights.items() if not name.startswith(f"{path}.")}
            weights |= {f"{path}.{name}": value for name, value in layer.cut(by_layer[id(layer)]).items()}
    small = small.to(model.device, model.dtype)
    small.load_state_dict(weights)
    small.tie_weights()
    if model.can_generate():
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


def drafter(model: TransformerPreTrainedModel, granularities: Granularities) -> TransformerPreTrainedModel:
    """A second model on the very weights of the first, at granularities of its own: `generate`'s assistant_model."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    draft = copy.deepcopy(model, shared)
    choose(draft, granularities)
    return draft


def mixes(layers: int, granularities: int) -> Iterator[tuple[int, ...]]:
    """The paper's choices for a model, from its smallest to its largest: one layer more, counted from the last, takes
    the next granularity at every step.
    """
    for low in range(1, granularities):
        for larger in range(layers):
            yield (low,) * (layers - larger) + (low + 1,) * larger
    yield (granularities,) * layers


def fitting(model: nn.Module, *, parameters: int) -> tuple[int, ...]:
    """The largest of the model's `mixes` that has no more parameters.

    Raises:
        FormwrightError: even the smallest has.
    """
    stacks = nested_layers(model)
    found = mixes(max(map(len, stacks)), len(stacks[0][0].widths))
    sized = [(size(model, one), one) for one in found]
    if sized[0][0] > parameters:
        raise FormwrightError(
            f"The smallest model that can be extracted has {sized[0][0]:,} parameters, more than {parameters:,}."
        )
    return max(pair for pair in sized if pair[0] <= parameters)[1]


def _chosen(model: nn.Module, granularities: Granularities) -> Iterator[tuple[MatFormerFeedForward, int]]:
    """Every nested layer and its granularity, checked."""
    stacks = nested_layers(model)
    depth, most = max(map(len, stacks)), len(stacks[0][0].widths)
    each = [granularities] * depth if isinstance(granularities, int) else list(granularities)
    if len(each) != depth or not all(isinstance(one, int) and 1 <= one <= most for one in each):
        raise FormwrightError(
            f"The model has {depth} layers with granularities 1 to {most}: give one number for all or one a layer, "
            f"not {granularities!r}."
        )
    for layers in stacks:
        yield from zip(layers, each, strict=False)  # a shorter stack takes the first
