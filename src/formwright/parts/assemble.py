"""From specs to the parts of one layer, with everything the surrounding model knows."""

import difflib
from typing import Any

from torch import nn

from formwright import catalog
from formwright.build import Spec, build, parse_spec
from formwright.contracts import Mixer
from formwright.errors import FormwrightError
from formwright.parts.mixing.multihead import MultiHeadAttention


def is_attention(spec: Spec) -> bool:
    """Whether a mixer spec names an attention function, which a multi-head mixer then wraps."""
    name = parse_spec(spec)["name"]
    mixers, attentions = (sorted(part.name for part in catalog.provided(slot)) for slot in ("mixer", "attention"))
    if name not in mixers and name not in attentions:
        near = difflib.get_close_matches(name, [*mixers, *attentions], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FormwrightError(f"No mixer is called {name!r}; there are {', '.join([*attentions, *mixers])}.{hint}")
    return name not in mixers


def mixer(spec: Spec, *, position: nn.Module | None = None, qkv_bias: bool = True, **dimensions: Any) -> Mixer:
    """A mixer by the name of a mixer or of an attention function.

    Args:
        spec: such as "mamba", "softmax(dropout=0.1)", {"name": "aft-local", "window": 8}.
        position: the layer's own position, for mixers that take one.
        qkv_bias: whether attention projections have biases.
        dimensions: dim, heads, kv_heads, head_dim, length, layers, layer, causal ...
    """
    if is_attention(spec):
        attention = build("attention", spec, **dimensions)
        shape = {key: dimensions.get(key) for key in ("kv_heads", "head_dim")}
        return MultiHeadAttention(
            dim=dimensions["dim"],
            heads=dimensions["heads"],
            attention=attention,
            position=position,
            bias=qkv_bias,
            **shape,
        )
    return build("mixer", spec, position=position, qkv_bias=qkv_bias, **dimensions)


def feedforward(spec: Spec, *, dim: int, hidden: int | None, **dimensions: Any) -> nn.Module | None:
    """A feed-forward layer; "none" is no layer. Without a hidden width it gets 4 d, or 8/3 d (in steps of 8) with a
    gate.
    """
    name = parse_spec(spec)["name"]
    if name == "none":
        return None
    if hidden is None:
        gated = getattr(catalog.resolve(catalog.find("feedforward", name).target), "gated", False)
        hidden = -(-8 * dim // 3 // 8) * 8 if gated else 4 * dim
    return build("feedforward", spec, dim=dim, hidden=hidden, **dimensions)
