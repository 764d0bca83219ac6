"""An encoder as a program on whole numbers: what is computed, in which order, whatever carries the numbers.

`encode` is written against `Arithmetic`; i_bert.py has two of them, floats with gradients and integers. The constants
of a step are found by its name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from formwright.compress.anatomy import Anatomy, describe
from formwright.errors import FormwrightError

# Of a classifier: the paths of its two layers ("~" is the base model) and what is between them.
HEADS = {
    "bert": ("~.pooler.dense", "tanh", "classifier"),
    "roberta": ("classifier.dense", "tanh", "classifier.out_proj"),
    "electra": ("classifier.dense", "gelu", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "relu", "classifier"),
}
SUM, TABLES = 22, 16  # bits of residual sums and of the sum of embeddings
FUNCTION = 2.0**-12  # the scale of what a function is applied to
SCORES, WIDE = 24, 20  # its bits: +-2048 for scores, +-128 for GELU and tanh


@runtime_checkable
class Arithmetic(Protocol):
    """What the program is written against; x is whole numbers of some kind, `name` finds the constants."""

    def embed(self, name: str, ids: Tensor) -> Any: ...
    def add(self, name: str, parts: list[Any], bits: int) -> Any: ...
    def norm(self, name: str, x: Any) -> Any: ...
    def linear(self, name: str, x: Any) -> Any: ...
    def rescale(self, name: str, x: Any) -> Any: ...
    def attend(self, name: str, query: Any, key: Any, value: Any, heads: int, mask: Tensor | None) -> Any: ...
    def function(self, name: str, function: str, x: Any) -> Any: ...
    def first(self, x: Any) -> Any: ...


class Plan(NamedTuple):
    """What the program needs to know of a model."""

    heads: list[int]  # of each layer
    activation: str
    typed: bool  # whether there are token types
    projected: bool  # whether the embeddings are narrower than the layers
    head: str  # the function in the head or the pooler, "" if there is neither
    classifier: bool
    padding: int  # positions are counted from the token after it; -1: from 0


class Inputs(NamedTuple):
    ids: Int[Tensor, "b n"]
    positions: Int[Tensor, "b n"]
    types: Int[Tensor, "b n"]
    mask: Bool[Tensor, "b n"] | None


def encode(on: Arithmetic, plan: Plan, inputs: Inputs) -> tuple[Any, Any]:
    """The states of the last layer, and the answer: logits, pooled first states, or None."""
    parts = [on.embed("word", inputs.ids), on.embed("position", inputs.positions)]
    if plan.typed:
        parts.append(on.embed("type", inputs.types))
    x = on.norm("embedded", on.add("embeddings", parts, TABLES))
    if plan.projected:
        x = on.rescale("projected", on.linear("project", x))
    for i, heads in enumerate(plan.heads):
        q, k, v = (on.rescale(f"{i}.{name}_out", on.linear(f"{i}.{name}", x)) for name in ("query", "key", "value"))
        mixed = on.attend(f"{i}.attend", q, k, v, heads, inputs.mask)
        x = on.norm(f"{i}.norm1", on.add(f"{i}.sum1", [on.linear(f"{i}.output", mixed), x], SUM))
        inner = on.function(f"{i}.act", plan.activation, on.linear(f"{i}.up", x))
        x = on.norm(f"{i}.norm2", on.add(f"{i}.sum2", [on.linear(f"{i}.down", inner), x], SUM))
    if not plan.head:
        return x, None
    pooled = on.function("pooled", plan.head, on.linear("pooler", on.first(x)))
    return x, on.linear("classifier", pooled) if plan.classifier else pooled


def names_of(model: PreTrainedModel, anatomy: Anatomy, plan: Plan) -> dict[str, str]:
    """Where the weights of each name lie."""
    base = f"{anatomy.base}." if anatomy.base else ""
    found = {
        "word": anatomy.embeddings.token,
        "position": anatomy.embeddings.position,
        "type": anatomy.embeddings.type,
        "embedded": f"{base}embeddings.LayerNorm",
        "project": f"{base}embeddings_project",
    }
    for i, layer in enumerate(anatomy.layers):
        attention, feed = layer.attention, layer.feedforward
        assert attention is not None
        assert feed is not None
        found |= {f"{i}.{name}": getattr(attention, name) for name in ("query", "key", "value", "output")}
        found |= {f"{i}.norm1": attention.norm, f"{i}.norm2": feed.norm, f"{i}.up": feed.up, f"{i}.down": feed.down}
    first, _, second = HEADS[anatomy.family] if plan.classifier else (f"{base}pooler.dense", "", "")
    found |= {"pooler": first.replace("~.", base), "classifier": second}
    held = {path for path, _ in model.named_modules()}
    return {name: path for name, path in found.items() if path in held and path}


def plan_of(model: PreTrainedModel) -> tuple[Plan, Anatomy]:
    """What a model is, to this program.

    Raises:
        FormwrightError: it is none of those that can be computed in integers.
    """
    anatomy = describe(model)
    family, base = anatomy.family, model.base_model
    if family not in HEADS or getattr(model.config, "is_decoder", False):
        raise FormwrightError(f"i-bert runs the encoders of {', '.join(HEADS)}, and this is {family!r}: leave it out.")
    bare = base is model
    if not bare and "ForSequenceClassification" not in type(model).__name__:
        raise FormwrightError(
            f"i-bert runs bare encoders and sequence classifiers, and this is {type(model).__name__}: leave it out."
        )
    layers = anatomy.layers
    if any(layer.attention is None or layer.feedforward is None for layer in layers):
        raise FormwrightError("i-bert needs every layer's own attention and feed-forward: put it before other changes.")
    activation = layers[0].feedforward.activation  # type: ignore[union-attr]
    pooled = getattr(base, "pooler", None) is not None
    plan = Plan(
        heads=[layer.attention.heads for layer in layers],  # type: ignore[union-attr]
        activation=activation,
        typed=anatomy.embeddings.type is not None,
        projected=hasattr(base, "embeddings_project"),
        head=HEADS[family][1] if not bare else "tanh" if pooled else "",
        classifier=not bare,
        padding=model.config.pad_token_id if family == "roberta" else -1,
    )
    if activation not in ("gelu", "relu"):
        raise FormwrightError(f"i-bert computes gelu and relu in integers, and this model has {activation!r}.")
    for path in names_of(model, anatomy, plan).values():
        module: Any = model.get_submodule(path)
        if type(module) not in (nn.Linear, nn.Embedding, nn.LayerNorm) or not module.weight.is_floating_point():
            raise FormwrightError(f"{path} is a {type(module).__name__} already: put i-bert before what changed it.")
    return plan, anatomy


def inputs_of(plan: Plan, given: Mapping[str, Any], longest: int) -> Inputs:
    """Ids, positions, types and mask of a call."""
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor):
        raise FormwrightError("An integer-only model reads token ids: give it input_ids.")
    positions = given.get("position_ids")
    if positions is None and plan.padding >= 0:
        real = (ids != plan.padding).long()
        positions = real.cumsum(1) * real + plan.padding
    elif positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device)
    positions = positions.expand_as(ids)
    if ids.shape[1] + plan.padding + 1 > longest:
        raise FormwrightError(
            f"The text has {ids.shape[1]} tokens, and the model reads {longest - plan.padding - 1}: truncate it."
        )
    types = given.get("token_type_ids")
    mask = given.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise FormwrightError(f"An integer-only model takes a mask of batch and tokens, got {mask.ndim} axes.")
    return Inputs(
        ids, positions, torch.zeros_like(ids) if types is None else types, None if mask is None else mask != 0
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
