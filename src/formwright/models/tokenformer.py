"""Grow a trained TokenFormer: append parameter tokens to its projections, and go on training.

Paper    Wang et al.: TokenFormer (ICLR 2025), arXiv:2410.23168, section 3.3. The layers are in
         `formwright.parts.feedforward.tokenformer`.
Idea     K <- [K; K_new], V <- [V; V_new]. The width, the cache and the attention among tokens stay as they are. With
         K_new = 0 and the old tau the model computes what it did before; a fresh optimizer and schedule then train all
         of it.

             grow(model, tokens=1792, hidden=7168)     # the paper's step from 354M, with 768 and 3072
             fit(model, task, settings)
             model.save_pretrained(folder)             # an ordinary model, whose config has the grown shape

Differs  The paper's tau is sqrt(n) of the grown n (tau="current" here), which scales every old score; the released
         PyTorch code has random new keys as well (keys="random").
"""

import copy
from typing import Any, Literal, get_args

from torch import nn

from formwright.build import Spec, format_spec, parse_spec
from formwright.errors import FormwrightError
from formwright.models.config import TransformerConfig
from formwright.models.transformer import TransformerPreTrainedModel
from formwright.parts.feedforward.tokenformer import NewKeys, Pattention, TokenFormerAttention, TokenFormerFeedForward

Tau = Literal["kept", "current"]
NAME = "tokenformer"
SLOTS = {"tokens": ("mixer", "cross_mixer"), "hidden": ("feedforward",)}  # whose specs hold each count


def grow(
    model: nn.Module,
    *,
    tokens: int | None = None,
    hidden: int | None = None,
    keys: NewKeys = "zero",
    tau: Tau = "kept",
) -> None:
    """Append parameter tokens to every Pattention of a model, in place. With the defaults its outputs stay the same.

    Args:
        model: a Transformer of ours, with any head, that has TokenFormer's mixer or feed-forward layer.
        tokens: parameter tokens of each of an attention's projections from now on; none = as many as before.
        hidden: parameter tokens of a feed-forward layer from now on; none = as many as before.
        keys: of new tokens: 0, or drawn as those of a new model.
        tau: "kept" = the scale of the scores stays; "current" = it is the root of the new number of tokens.

    Raises:
        FormwrightError: there is nothing to grow or it would shrink, or theta="softmax" is to keep what it computes.
    """
    if not isinstance(model, TransformerPreTrainedModel):
        raise FormwrightError(f"A Transformer of Formwright grows, not a {type(model).__name__}.")
    if keys not in get_args(NewKeys):
        raise FormwrightError(f"New keys are {' or '.join(get_args(NewKeys))}, got {keys!r}.")
    config = grown(model.config, tokens=tokens, hidden=hidden, tau=tau)
    found: list[tuple[Pattention, int | None]] = []
    for module in model.modules():
        if isinstance(module, TokenFormerAttention):
            found += [(projection, tokens) for projection in module.projections]
        elif isinstance(module, TokenFormerFeedForward):
            found.append((module, hidden))
    if tau == "kept" and keys == "zero" and any(one.theta == "softmax" for one, wanted in found if wanted):
        raise FormwrightError(
            "Under theta='softmax' a token with a zero key takes a share of the sum, so a grown model computes "
            "something else: ask for keys='random' or tau='current', or train with theta='l2_norm_gelu'."
        )
    for projection, wanted in found:
        if wanted is not None:
            kept = projection.tau_tokens or projection.tokens
            projection.grow(wanted, keys=keys, tau_tokens=kept if tau == "kept" else None)
    for slot in (slot for slots in SLOTS.values() for slot in slots):
        setattr(model.config, slot, getattr(config, slot))


def grown(
    config: TransformerConfig, *, tokens: int | None = None, hidden: int | None = None, tau: Tau = "kept"
) -> TransformerConfig:
    """The config that `grow` gives a model of this config; the given one is left alone.

    Raises:
        FormwrightError: there is nothing to grow, or it would shrink.
    """
    if tau not in get_args(Tau):
        raise FormwrightError(f"tau is {' or '.join(get_args(Tau))}, got {tau!r}.")
    if tokens is None and hidden is None:
        raise FormwrightError("Say how far to grow: tokens for attention's projections, hidden for feed-forward ones.")
    config = copy.deepcopy(config)
    present = {"tokens": config.hidden_size, "hidden": config.intermediate_size or 4 * config.hidden_size}
    for count, wanted in {"tokens": tokens, "hidden": hidden}.items():
        if wanted is None:
            continue
        growing = False
        for slot in SLOTS[count]:
            given = getattr(config, slot)
            specs = given if isinstance(given, list) else [given]
            growing = growing or any(parse_spec(spec)["name"] == NAME for spec in specs)
            specs = [_larger(spec, count, present[count], wanted, tau) for spec in specs]
            setattr(config, slot, specs if isinstance(given, list) else specs[0])
        if not growing:
            part = "mixer" if count == "tokens" else "feed-forward layer"
            raise FormwrightError(f"The model has no {part} called {NAME}: leave {count} out, or build it with one.")
    return config


def _larger(spec: Spec, count: str, default: int, wanted: int, tau: Tau) -> Spec:
    """The spec with so many tokens, if it is one of ours."""
    options: dict[str, Any] = parse_spec(spec)
    if options["name"] != NAME:
        return spec
    present = options.get(count) or default
    if wanted < present:
        raise FormwrightError(f"A TokenFormer grows: {count} is {present} now, so it cannot become {wanted}.")
    kept = options.pop("tau_tokens", None) or present
    options |= {count: wanted} | ({"tau_tokens": kept} if tau == "kept" else {})
    return format_spec(options) if isinstance(spec, str) else options
