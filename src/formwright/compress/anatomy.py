"""Where things sit in a transformers model: attention, feed-forwards, norms, embeddings, pooler and head.

    anatomy = describe(model)
    anatomy.layers[3].attention.query          # "bert.encoder.layer.3.attention.self.query"
    anatomy.layers[3].feedforward.width        # of the projections, not of the config: the model may be cut already

Families are data, in families.py. An attention or a feed-forward that a module of ours stands for is None in the
anatomy: there is nothing left to cut.

Layers count through all stacks: those of an encoder come first, then those of its decoder. A family that shares layers
(ALBERT) has each once, with the number of times it runs: what is done to it is done to all repeats.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.families import (
    AttentionDescription,
    Family,
    FeedForwardDescription,
    Fused,
    StackDescription,
    family_called,
)
from formwright.compress.structure import PREFIX, Rebuilt
from formwright.errors import FormwrightError

# What a model has


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention: paths from the model, sizes from its weights.

    `counts` tells which attributes of the module hold what: "heads" or "width", heads x head_dim.
    """

    path: str
    query: str | None
    key: str | None
    value: str | None
    fused: str | None
    layout: Fused | None
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    counts: Mapping[str, str]
    norm: str | None
    bias: str | None  # a position bias, an embedding of one column a head, which all layers of the stack share


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """down(act(up(x))), or down(act(gate(x)) * up(x)). Gate and up of one path are one projection, whose first half
    is the gate.
    """

    up: str
    gate: str | None
    down: str
    activation: str
    width: int
    counts: tuple[str, ...]  # paths of attributes that hold the width
    norm: str | None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer; `index` counts through all stacks."""

    path: str
    index: int
    norm_first: bool
    repeats: int
    attention: Attention | None
    cross: Attention | None
    feedforward: FeedForward | None
    norms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that run one after the other. `path` leads to their ModuleList, `count` names its length in the config."""

    path: str
    causal: bool
    layers: tuple[Layer, ...]
    final_norm: str | None
    count: str
    description: "StackDescription"


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What turns the input into vectors; for images and sound `token` is the projection of a patch or a frame."""

    token: str | None
    position: str | None
    type: str | None


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model taken apart. `base` is the path of the model without its head, "" for the model itself."""

    family: str
    base: str
    stacks: tuple[Stack, ...]
    embeddings: Embeddings
    pooler: str | None
    head: tuple[str, ...]
    causal: bool
    shared: bool

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    @property
    def final_norm(self) -> str | None:
        """Of the last stack: what the head reads."""
        return self.stacks[-1].final_norm


# Taking a model apart


def describe(model: PreTrainedModel) -> Anatomy:
    """Where things sit in the model, with any head or none, cut or whole.

    Raises:
        FormwrightError: its family is unknown, or its description does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise FormwrightError(
            f"{type(model).__name__} is no transformers model: load it with AutoModel.from_pretrained or the like."
        )
    name = model.config.model_type.removeprefix(PREFIX)
    family = family_called(name)
    base = model.base_model
    root = next((path for path, module in model.named_modules() if module is base), "")
    stacks: list[Stack] = []
    for one in family.stacks:
        path = _find(base, one.layers)
        if path is not None:
            stacks.append(_stack(model, _join(root, path), one, sum(len(stack.layers) for stack in stacks)))
    if not stacks or not any(layer.attention for stack in stacks for layer in stack.layers):
        raise FormwrightError(f"{type(model).__name__} has no layers where the description of {name} looks for them.")
    return Anatomy(
        family=name,
        base=root,
        stacks=tuple(stacks),
        embeddings=Embeddings(
            token=_path(model, root, family.token),
            position=_path(model, root, family.position),
            type=_path(model, root, family.type),
        ),
        pooler=_path(model, root, family.pooler),
        head=_head(model, root, family),
        causal=stacks[-1].causal,
        shared=any(stack.description.shared for stack in stacks),
    )


def _stack(model: PreTrainedModel, path: str, described: StackDescription, first: int) -> Stack:
    paths = _entries(model, path)
    repeats = 1
    if described.shared:
        repeats = getattr(model.config, described.count) // len(paths)
        paths = [one for group in paths for one in _entries(model, f"{group}.{described.shared}")]
    base, _, _ = path.rpartition(".")
    # The final norm lies beside the layers or one level up, wherever the description says: it is looked for from both.
    outer = base.rpartition(".")[0]
    norm_first = _truth(model, described.norm_first)
    final = _path(model, base, described.final_norm) or _path(model, outer, described.final_norm)
    return Stack(
        path=path,
        causal=_truth(model, described.causal),
        layers=tuple(_layer(model, one, first + i, repeats, described, path) for i, one in enumerate(paths)),
        final_norm=final if norm_first else None,
        count=described.count,
        description=described,
    )


def _entries(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]


def _layer(
    model: PreTrainedModel, path: str, index: int, repeats: int, described: StackDescription, stack: str
) -> Layer:
    attention = _attention(model, path, described.attention, stack)
    cross = described.cross
    across = (
        None if cross is None or _path(model, path, cross.module) is None else _attention(model, path, cross, stack)
    )
    feedforward = _feedforward(model, path, described.feedforward)
    norms = [part.norm for part in (attention, across, feedforward) if part is not None and part.norm is not None]
    return Layer(
        path=path,
        index=index,
        norm_first=_truth(model, described.norm_first),
        repeats=repeats,
        attention=attention,
        cross=across,
        feedforward=feedforward,
        norms=tuple(norms),
    )


def _attention(model: PreTrainedModel, layer: str, described: AttentionDescription, stack: str) -> Attention | None:
    found: dict[str, str] = {}
    for name in ("module", "query", "key", "value", "fused", "output"):
        if getattr(described, name) is not None:
            lies = _part(model, layer, getattr(described, name))
            if lies is None:
                return None
            found[name] = lies
    path = found["module"]
    head_dim = getattr(model.get_submodule(path), described.head_dim)
    if described.fused is None:
        heads, kv_heads = (widths(model, found[name])[1] // head_dim for name in ("query", "key"))
    else:
        parts = 3 if described.query is None else 2
        heads = kv_heads = widths(model, found["fused"])[1] // head_dim // parts
    return Attention(
        path=path,
        query=found.get("query"),
        key=found.get("key"),
        value=found.get("value"),
        fused=found.get("fused"),
        layout=described.layout if described.fused else None,
        output=found["output"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        counts=described.counts,
        norm=_path(model, layer, described.norm),
        bias=_path(model, stack.rpartition(".")[0], described.bias),
    )


def _feedforward(model: PreTrainedModel, layer: str, described: FeedForwardDescription) -> FeedForward | None:
    up, down = _part(model, layer, described.up), _part(model, layer, described.down)
    if up is None or down is None:
        return None
    gate = _path(model, layer, described.gate)
    named = described.gated if gate is not None else None
    return FeedForward(
        up=up,
        gate=gate,
        down=down,
        activation=named or str(getattr(model.config, described.activation)),
        width=widths(model, down)[0],
        counts=tuple(f"{layer}.{one}" for one in described.counts),
        norm=_path(model, layer, described.norm),
    )


def widths(model: nn.Module, path: str) -> tuple[int, int]:
    """Fan-in and fan-out of the projection there.

    Raises:
        FormwrightError: it is no projection.
    """
    module = model.get_submodule(path)
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    raise FormwrightError(f"{path} is a {type(module).__name__}, of which no width is known: it must be a projection.")


def _head(model: PreTrainedModel, root: str, family: Family) -> tuple[str, ...]:
    outside = root.partition(".")[0]
    return tuple(
        name
        for name, child in model.named_children()
        if any(True for _ in child.parameters())
        and (name != outside if root else name in family.heads)
        and name != "executor"
    )


def _truth(model: PreTrainedModel, said: bool | str) -> bool:
    return said if isinstance(said, bool) else bool(getattr(model.config, said))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _path(model: nn.Module, root: str, said: str | None) -> str | None:
    """The path from the model of what lies at `said` under the root, a module or a parameter, or None."""
    if said is None:
        return None
    found = _find(model.get_submodule(root), said)
    return None if found is None else _join(root, found)


def _find(module: nn.Module, said: str) -> str | None:
    return next((path for path in said.split("|") if _lies(module, path)), None)


def _lies(module: nn.Module, path: str) -> bool:
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return isinstance(found, nn.Module | nn.Parameter)


def _part(model: nn.Module, layer: str, said: str) -> str | None:
    """As `_path`, but what is missing must have given way to a module of ours.

    Raises:
        FormwrightError: it is missing from an unchanged layer.
    """
    path = _path(model, layer, said)
    if path is not None:
        return path
    found = model.get_submodule(layer)
    for name in said.split("|")[0].split("."):
        if isinstance(found, Rebuilt):
            return None
        found = getattr(found, name, None)  # type: ignore[assignment]
        if found is None:
            break
    raise FormwrightError(f"{layer} has no {said}: the description of this family does not fit the model.")
