"""Cut heads, neurons and layers out of a model, in place, or let a layer's attention rest.

    remove_heads(model, {0: [1, 5], 3: [2]})
    remove_neurons(model, {0: range(100, 200)})
    skip_attention(model, [4])
    remove_layers(model, [2])

The weights that stay are untouched, so cutting what was zero changes no output. Layers are numbered as in
`describe(model).layers`. A shared layer (ALBERT) is one layer: a cut in it is a cut in all its repeats. Everything is
checked before anything is changed.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.anatomy import Anatomy, Attention, Layer, Stack, describe
from formwright.compress.structure import Rebuilt, adopt, replace
from formwright.errors import FormwrightError

# What stands where something was taken out


class Identity(Rebuilt):
    """x -> x, in place of the norm or the scale of a skipped attention."""

    kind = "identity"

    def structure(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "Identity":
        del old
        return cls(**structure)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class SkippedAttention(Rebuilt):
    """An attention that adds nothing to its input, and nothing to the cache.

    Args:
        residual: it stands for a module that adds the residual itself, and gives x; without it, it gives zero.
        hands_on: it hands the position bias on to the next layer, as T5's layers do.
    """

    kind = "skipped-attention"

    def __init__(self, *, residual: bool, hands_on: bool) -> None:
        super().__init__()
        self.residual, self.hands_on = residual, hands_on

    def structure(self) -> dict[str, Any]:
        return {"residual": self.residual, "hands_on": self.hands_on}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "SkippedAttention":
        del old
        return cls(**structure)

    def forward(
        self,
        hidden_states: Float[Tensor, "b n d"],
        *_: Any,  # masks, caches and rotations: of an attention that is not there
        position_bias: Tensor | None = None,
        **__: Any,
    ) -> tuple[Float[Tensor, "b n d"], Tensor | None] | tuple[Float[Tensor, "b n d"], Tensor | None, None]:
        out = hidden_states if self.residual else torch.zeros_like(hidden_states)
        return (out, position_bias, None) if self.hands_on else (out, None)


class BiasedHeads(Rebuilt):
    """An attention with some of its heads, in a stack whose layers share a position bias of all heads (T5, MPNet).

    It takes over the weights and attributes of the attention it replaces; its class is that attention's, too.

    Args:
        old: the attention.
        kept: which heads of the shared bias are left here.
    """

    kind = "biased-heads"

    def __init__(self, old: nn.Module, kept: list[int]) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(old))
        self.kept = list(kept)

    @staticmethod
    def of(old: nn.Module, kept: list[int]) -> "BiasedHeads":
        """The attention with these of its heads."""
        return _biased(type(old))(old, kept)  # type: ignore[arg-type]

    def structure(self) -> dict[str, Any]:
        numbers = {name: value for name, value in vars(self).items() if type(value) is int and name[0] != "_"}
        return {"kept": self.kept, "attributes": numbers}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "BiasedHeads":
        if old is None:
            raise FormwrightError("The saved model has a cut attention where a fresh one has none: save it again.")
        made = cls.of(old, structure["kept"])
        for name, value in structure["attributes"].items():
            if name not in made.structure()["attributes"] or type(value) is not int:
                raise FormwrightError(f"The saved model sets {name} of an attention, which has no such number.")
            setattr(made, name, value)
        return made

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, position_bias: Tensor | None = None, **given: Any
    ) -> tuple[Tensor | None, ...]:
        attend = super().forward
        if position_bias is not None:
            out = attend(hidden_states, mask, position_bias=position_bias[:, self.kept], **given)
        else:  # T5's first layer makes the bias for all: here for its own heads, below for the other layers
            cache = given.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            past = past.clone() if isinstance(past, Tensor) else past
            out = attend(hidden_states, mask, position_bias=None, **given)
            position_bias = super().compute_bias(  # type: ignore[misc]
                *out[1].shape[-2:], device=hidden_states.device, past_seen_tokens=past
            )
        return (out[0], position_bias, *out[2:]) if len(out) == 3 else out  # MPNet's hand no bias on

    def compute_bias(self, *args: Any, **kwargs: Any) -> Float[Tensor, "1 h q k"]:
        return super().compute_bias(*args, **kwargs)[:, self.kept]  # type: ignore[misc]


@functools.cache
def _biased(attention: type[nn.Module]) -> type[BiasedHeads]:
    return type(f"Biased{attention.__name__}", (BiasedHeads, attention), {})


# The cuts


def remove_heads(model: PreTrainedModel, heads: Mapping[int, Iterable[int]]) -> None:
    """Remove heads of the self-attention, by layer. Where query heads share keys and values, whole groups only.

    Raises:
        FormwrightError: no such layer or head, part of a group, the last head, or projections that cannot be cut.
    """
    layers = describe(model).layers
    plan: list[tuple[Attention, list[int]]] = []
    for index, removed in heads.items():
        layer = _layer(model, layers, index)
        if layer.attention is None:
            raise FormwrightError(f"The attention of layer {index} was skipped or replaced: leave its heads out.")
        gone = _within(removed, layer.attention.heads, f"heads of layer {index}")
        _check_groups(layer.attention, gone, index)
        kept = [head for head in range(layer.attention.heads) if head not in gone]
        if gone:
            plan.append((layer.attention, kept))
    for attention, _ in plan:
        _check_projections(model, attention.query, attention.key, attention.value, attention.fused, attention.output)
    adopt(model)
    for attention, kept in plan:
        _keep_heads(model, attention, kept)


def _check_groups(attention: Attention, gone: set[int], index: int) -> None:
    size = attention.heads // attention.kv_heads
    torn = [group for group in range(attention.kv_heads) if 0 < len(gone & set(_group(group, size))) < size]
    if torn:
        raise FormwrightError(
            f"Layer {index} has {size} query heads to a key-value head: remove whole groups, such as heads "
            f"{', '.join(map(str, _group(torn[0], size)))} together."
        )


def _group(group: int, size: int) -> range:
    return range(group * size, (group + 1) * size)


def _keep_heads(model: PreTrainedModel, attention: Attention, kept: list[int]) -> None:
    width, size = attention.head_dim, attention.heads // attention.kv_heads
    rows = _rows(kept, width)
    if attention.fused is None:
        pairs = _rows(sorted({head // size for head in kept}), width)
        _keep(model, attention.key, out=pairs)
        _keep(model, attention.value, out=pairs)
        _keep(model, attention.query, out=rows)
    else:
        parts = 3 if attention.query is None else 2
        whole = attention.heads * width
        blocks = [part * whole + row for part in range(parts) for row in rows]
        _keep(model, attention.fused, out=blocks if attention.layout == "blocks" else _rows(kept, parts * width))
        _keep(model, attention.query, out=rows)
    _keep(model, attention.output, into=rows)
    module = model.get_submodule(attention.path)
    for name, what in attention.counts.items():
        setattr(module, name, len(kept) * (width if what == "width" else 1))
    if isinstance(module, BiasedHeads):
        module.kept = [module.kept[head] for head in kept]
    elif attention.bias is not None:
        replace(model, attention.path, BiasedHeads.of(module, kept))


def remove_neurons(model: PreTrainedModel, neurons: Mapping[int, Iterable[int]]) -> None:
    """Remove hidden neurons of the feed-forward, by layer, with their gates.

    Raises:
        FormwrightError: no such layer or neuron, the last neuron, or projections that cannot be cut.
    """
    layers = describe(model).layers
    plan = []
    for index, removed in neurons.items():
        part = _layer(model, layers, index).feedforward
        if part is None:
            raise FormwrightError(f"The feed-forward of layer {index} was replaced: leave its neurons out.")
        gone = _within(removed, part.width, f"neurons of layer {index}")
        if gone:
            plan.append((part, [neuron for neuron in range(part.width) if neuron not in gone]))
    for part, _ in plan:
        _check_projections(model, part.up, part.gate, part.down)
    adopt(model)
    for part, kept in plan:
        if part.gate == part.up:  # one projection: the gates, then the values
            _keep(model, part.up, out=kept + [part.width + neuron for neuron in kept])
        else:
            _keep(model, part.up, out=kept)
            _keep(model, part.gate, out=kept)
        _keep(model, part.down, into=kept)
        for count in part.counts:
            path, _, name = count.rpartition(".")
            setattr(model.get_submodule(path), name, len(kept))


def remove_layers(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Remove layers. Of a shared layer it removes repeats: then `layers` counts them, and only how many go matters.

    Raises:
        FormwrightError: no such layer, the last one of a stack, a layer the others depend on (T5's first), or a head
            that reads the outputs of all layers.
    """
    anatomy = describe(model)
    total = sum(layer.repeats for layer in anatomy.layers)
    gone = _numbers(layers, total, "layers")
    if not gone:
        return
    if hasattr(model, "out_features"):
        raise FormwrightError("A backbone gives the outputs of its layers by their number: no layer can be removed.")
    if hasattr(model, "layer_weights"):
        raise FormwrightError("The head weighs the outputs of all layers (layer_weights): no layer can be removed.")
    if anatomy.shared:
        _remove_repeats(model, anatomy, len(gone))
        return
    for stack in anatomy.stacks:
        if all(layer.index in gone for layer in stack.layers):
            raise FormwrightError(f"All layers of {stack.path} would be gone: leave at least one.")
        for layer in stack.layers:
            if layer.index in gone:
                _check_bias(layer, "removed")
    adopt(model)
    for stack in anatomy.stacks:
        kept = [i for i, layer in enumerate(stack.layers) if layer.index not in gone]
        if len(kept) == len(stack.layers):
            continue
        modules = model.get_submodule(stack.path)
        model.set_submodule(stack.path, nn.ModuleList([modules[i] for i in kept]))  # type: ignore[index]
        _cut_config(model, stack, kept)
    _renumber(model)


def _cut_config(model: PreTrainedModel, stack: Stack, kept: list[int]) -> None:
    """Let the config say how many layers there are, and of which kind."""
    config: Any = model.config
    types = getattr(config, "layer_types", None)
    setattr(config, stack.count, len(kept))
    if types is not None:
        config.layer_types = [types[i] for i in kept]
    if getattr(config, "stage_names", None) is not None:  # DINOv2 names its layers, and what it gives as a backbone
        config.stage_names = config.stage_names[: len(kept) + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)
    own: Any = getattr(model.get_submodule(stack.path.rpartition(".")[0]), "config", config)
    if own is not config:  # T5's stacks have configs of their own, which size the cache
        own.num_hidden_layers = len(kept)


def _remove_repeats(model: PreTrainedModel, anatomy: Anatomy, count: int) -> None:
    if len(anatomy.layers) > 1:
        raise FormwrightError(
            f"The {anatomy.family} has {len(anatomy.layers)} shared layers that take turns, and none of their repeats "
            "can go alone: remove heads and neurons instead."
        )
    if count >= anatomy.layers[0].repeats:
        raise FormwrightError("All repeats of the shared layer would be gone: leave at least one.")
    adopt(model)
    setattr(model.config, anatomy.stacks[0].count, anatomy.layers[0].repeats - count)


def skip_attention(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Make the self-attention of these layers, with its norm, x -> x; the cache has no entry for it any more.

    Raises:
        FormwrightError: no such layer or none with an attention, the last attention of a stack, or one that others
            depend on: T5's first, or the last of the kind (full, sliding) by which the cache counts its tokens.
    """
    anatomy = describe(model)
    gone = _numbers(layers, len(anatomy.layers), "layers")
    for stack in anatomy.stacks:
        left = [layer for layer in stack.layers if layer.attention is not None and layer.index not in gone]
        skipped = [layer for layer in stack.layers if layer.index in gone]
        for layer in skipped:
            if layer.attention is None:
                raise FormwrightError(f"The attention of layer {layer.index} was skipped or replaced: leave it out.")
            _check_bias(layer, "skipped")
        if skipped and not left:
            raise FormwrightError(f"No attention of {stack.path} would be left: keep at least one.")
        types = _types(model, stack)
        if skipped and stack.causal and types[0] not in {types[layer.index - stack.layers[0].index] for layer in left}:
            raise FormwrightError(
                f"The cache counts its tokens in a layer of {types[0]}: keep at least one such attention."
            )
    if not gone:
        return
    adopt(model)
    for stack in anatomy.stacks:
        described = stack.description.attention
        for layer in stack.layers:
            if layer.index not in gone:
                continue
            path = f"{layer.path}.{described.skip or described.module}"
            replace(model, path, SkippedAttention(residual=described.residual, hands_on=described.hands_on))
            beside = () if described.residual else (described.norm, *described.after)
            for one in (f"{layer.path}.{name}" for name in beside if name is not None):
                if type(model.get_submodule(one)) is not nn.Identity:  # ModernBERT's first layer has no norm
                    replace(model, one, Identity())
    _renumber(model)


def _types(model: PreTrainedModel, stack: Stack) -> list[str]:
    """The kind of cache each layer gets."""
    types = getattr(model.config, "layer_types", None)
    return list(types) if types is not None else ["full_attention"] * len(stack.layers)


def _renumber(model: PreTrainedModel) -> None:
    """Number the layers anew. An attention's number is its place in the cache, which sliding ones share with sliding
    ones and full ones with full ones: skipped attentions leave no gap, since the first places count the tokens.
    """
    for stack in describe(model).stacks:
        types = _types(model, stack)
        for parts in ([layer.attention for layer in stack.layers], [layer.cross for layer in stack.layers]):
            places = defaultdict(list)
            for place, kind in enumerate(types):
                places[kind].append(place)
            for part, kind in zip(parts, types, strict=True):
                if part is not None:
                    _number(model.get_submodule(part.path), places[kind].pop(0))
        for index, layer in enumerate(stack.layers):
            _number(model.get_submodule(layer.path), index)


def _number(module: nn.Module, index: int) -> None:
    if getattr(module, "layer_idx", None) is not None:
        module.layer_idx = index  # type: ignore[assignment]


# What the cuts are made of


def _keep(
    model: PreTrainedModel, path: str | None, *, out: list[int] | None = None, into: list[int] | None = None
) -> None:
    """Leave these outputs or inputs of a projection; nothing where there is none."""
    if path is None:
        return
    module: Any = model.get_submodule(path)
    transposed = isinstance(module, Conv1D)  # its weight is (inputs, outputs)
    kept = out if out is not None else into
    index = torch.tensor(kept, device=module.weight.device)
    axis = int((out is None) != transposed)
    module.weight = _picked(module.weight, index, axis)
    if out is not None and module.bias is not None:
        module.bias = _picked(module.bias, index, 0)
    name = ("nf" if out is not None else "nx") if transposed else ("out_features" if out is not None else "in_features")
    setattr(module, name, len(index))


def _picked(weight: Any, index: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(weight.detach().index_select(axis, index), requires_grad=weight.requires_grad)


def _rows(units: Iterable[int], width: int) -> list[int]:
    return [unit * width + i for unit in units for i in range(width)]


def _layer(model: PreTrainedModel, layers: tuple[Layer, ...], index: int) -> Layer:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(layers):
        shared = any(layer.repeats > 1 for layer in layers)
        raise FormwrightError(
            f"{type(model).__name__} has no layer {index}: its layers are 0 to {len(layers) - 1}"
            f"{', each run several times, and a cut is one in all its repeats' if shared else ''}."
        )
    return layers[index]


def _numbers(given: Iterable[int], total: int, what: str) -> set[int]:
    found = set(given)
    wrong = [one for one in found if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < total]
    if wrong:
        raise FormwrightError(f"There are {total} {what}, 0 to {total - 1}: leave {wrong[0]!r} out.")
    return found


def _within(given: Iterable[int], total: int, what: str) -> set[int]:
    """Units to remove, which are there and not all.

    Raises:
        FormwrightError: they are not, or nothing would be left.
    """
    found = _numbers(given, total, what)
    if len(found) == total:
        raise FormwrightError(f"All {total} {what} would be gone: leave at least one.")
    return found


def _check_bias(layer: Layer, done: str) -> None:
    if layer.attention is not None and (layer.attention.bias or "").startswith(f"{layer.path}."):
        raise FormwrightError(
            f"Layer {layer.index} makes the position bias for its whole stack and cannot be {done}: leave it out."
        )


def _check_projections(model: PreTrainedModel, *paths: str | None) -> None:
    for path in paths:
        if path is not None and type(model.get_submodule(path)) not in (nn.Linear, Conv1D):
            found = type(model.get_submodule(path)).__name__
            raise FormwrightError(f"{path} is a {found}, which cannot be cut: cut first, then replace or quantize.")
