"""Attention functions in Hugging Face models: one call registers the function, its mask function and what it honours.

    import formwright.socket
    formwright.socket.register("clipped-softmax(length=128, alpha=3.2)")     # or register_attention("mine", function)
    model.set_attn_implementation("formwright-clipped-softmax")

transformers looks a name up in two registries, one of attention functions and one of mask functions. A name in the
first alone loses the padding mask, the sliding window and causality without a word. Models also pass keywords that
change scores (position_bias, s_aux, softcap): a function honours them by naming them, and one that does not name them
refuses them here. Importing this module registers formwright-softmax.

The choice is not saved with a model: set it again after from_pretrained. Families whose attention never asks the
registries store the name and ignore it; `check_attention` tells.
"""

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.build import Spec, build, format_spec, parse_spec
from formwright.contracts import Mask, refuse
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import repeat_heads

PREFIX = "formwright-"

# Keywords that change no score, or whose effect is in the mask already.
HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
    | {"encoder_hidden_states", "deterministic", "num_items_in_batch", "is_causal", "sliding_window"}
)

_registered: dict[str, str] = {}  # name -> spec; transformers' registries are as global as this
_calls: ContextVar[list[str] | None] = ContextVar("formwright_attention_calls", default=None)

# (q, k, v, mask, *, scaling, dropout, <keywords it honours>) -> (b, h, q, e), or that and the weights (b, h, q, k)
AttentionFunction = Callable[..., Tensor | tuple[Tensor, Tensor]]


def dense_mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Bool[Tensor, "b 1 q k"] | None:
    """True = may be seen; none only when every query sees every key. transformers' own would leave causality to a
    flag.
    """
    from transformers.masking_utils import sdpa_mask

    del allow_is_causal_skip
    return sdpa_mask(*args, allow_is_causal_skip=False, **kwargs)


def register_attention(slug: str, function: AttentionFunction, *, mask: Callable[..., Any] = dense_mask) -> str:
    """Register an attention function with its mask function, as `formwright-<slug>`.

    Args:
        slug: the name without its prefix.
        function: (q, k, v, mask, *, scaling, dropout, ...) -> mixed values or (mixed values, weights), heads in axis 1
            everywhere and as many key as query heads. Every further keyword it names it honours; others are refused.
        mask: the mask function; the default gives a Boolean mask, True = may be seen, and none when nothing is hidden.
            A mask a caller makes himself arrives as he made it, Boolean or added to the scores.

    Returns:
        The name for set_attn_implementation.

    Raises:
        FormwrightError: the function does not take scaling and dropout.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    named = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    if not {"scaling", "dropout"} <= named:
        raise FormwrightError(f"The attention function {slug!r} must take the keywords scaling and dropout.")
    door = Door(name=PREFIX + slug, function=function, honours=frozenset(named - {"scaling", "dropout"}))
    AttentionInterface.register(door.name, door.attend)
    AttentionMaskInterface.register(door.name, mask)
    return door.name


@dataclass(frozen=True, kw_only=True)
class Door:
    """What stands between a model's call and an attention function."""

    name: str
    function: AttentionFunction
    honours: frozenset[str]

    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "b h q d"],
        key: Float[Tensor, "b g k d"],
        value: Float[Tensor, "b g k e"],
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **given: Any,  # whatever the model's family passes: honoured, known to be harmless, or refused
    ) -> tuple[Float[Tensor, "b q h e"], Tensor | None]:
        """As transformers calls it.

        Raises:
            UnsupportedContext: a keyword, a causality or a request for weights that the function cannot honour.
        """
        calls = _calls.get()
        if calls is not None:
            calls.append(type(module).__name__)
        self._check(module, query, key, attention_mask, given)
        heads = query.shape[1]
        mixed = self.function(
            query,
            repeat_heads(key, heads),
            repeat_heads(value, heads),
            attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
            **{name: said for name, said in given.items() if name in self.honours},
        )
        mixed, weights = mixed if isinstance(mixed, tuple) else (mixed, None)
        if weights is None and (given.get("output_attentions") or _weights_are_recorded()):
            raise refuse(
                self.name,
                asked="output_attentions",
                because="it forms no weights",
                instead="Leave output_attentions out, or set formwright-softmax or eager.",
            )
        return mixed.transpose(1, 2).contiguous(), weights

    def _check(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, given: Mapping[str, Any]
    ) -> None:
        family = type(module).__name__
        unknown = sorted(k for k, v in given.items() if v is not None and k not in HARMLESS | self.honours)
        if unknown:
            raise refuse(
                self.name,
                asked=f"the {', '.join(unknown)} that {family} passes",
                because="it does not know what they do to the scores",
                instead="Set attn_implementation='eager' for this model.",
            )
        causal = given.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        if causal and mask is None and query.shape[2] > 1:
            raise refuse(
                self.name,
                asked=f"the causal {family} without a mask",
                because="tokens would see later ones",
                instead="Let the model make its mask, or pass a 4-dimensional one.",
            )
        window = given.get("sliding_window")
        if window is not None and mask is None and key.shape[2] > window:
            raise refuse(
                self.name,
                asked=f"the sliding window of {window} that {family} passes without a mask",
                because="the window is taken from the mask",
                instead="Let the model make its mask, or pass a 4-dimensional one.",
            )


def _weights_are_recorded() -> bool:
    """Whether a forward with output_attentions=True is under way: hooks collect, and the keyword is not passed down."""
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return collected is not None and any("attention" in key for key in collected)


def register(spec: Spec, *, slug: str | None = None) -> str:
    """Register an attention function of the catalogue, with its options.

    Args:
        spec: name and options, such as "clipped-softmax(length=128, alpha=3.2)".
        slug: the name without its prefix, to hold two settings apart; none = the part's name.

    Returns:
        The name for set_attn_implementation.

    Raises:
        FormwrightError: unknown part or option, a part with parameters of its own or with dropout (which the model's
            config sets), or a name that is taken by other options.
    """
    slug = parse_spec(spec)["name"] if slug is None else slug
    name, text = PREFIX + slug, format_spec(spec)
    if _registered.get(name, text) != text:
        raise FormwrightError(
            f"{name} is registered as {_registered[name]}, and models may be using it: give slug=... for {text}."
        )
    attention = build("attention", spec).eval()  # what draws at random in training does not
    if any(True for _ in attention.parameters()):
        raise FormwrightError(
            f"{text} has parameters, and a Hugging Face model has no place for them; "
            "build a Formwright Transformer with it instead."
        )
    if getattr(attention, "dropout", 0.0):
        raise FormwrightError(f"Leave the dropout out of {text}: a Hugging Face model passes its own, from its config.")
    register_attention(slug, _function(attention, name))
    _registered[name] = text
    return name


def _function(attention: nn.Module, name: str) -> AttentionFunction:
    """A part of the catalogue as an attention function."""

    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scaling: float,
        dropout: float,
        position_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        seen, bias = _structure(mask, q.shape[2], k.shape[2], q.device)
        bias = position_bias if bias is None else bias if position_bias is None else bias + position_bias
        if hasattr(attention, "weights"):
            weights = attention.weights(q, k, mask=seen, bias=bias, scaling=scaling).to(q.dtype)
            return F.dropout(weights, dropout) @ v, weights
        if dropout:
            raise refuse(
                name,
                asked=f"an attention dropout of {dropout}",
                because="it forms no weights to drop",
                instead="Set the attention dropout in the model's config to 0.",
            )
        return attention(q, k, v, mask=seen, bias=bias, scaling=scaling)

    return function


def _structure(mask: Tensor | None, queries: int, keys: int, device: torch.device) -> tuple[Mask, Tensor | None]:
    """A mask that knows its structure, and what is left of a dense one as a bias.

    A Boolean mask is padding, or causal with padding, or something else (a window, a static cache), which becomes 0
    and -inf added to the scores. While compiling, no question is asked and it is always the latter.
    """
    everything = Mask(queries=queries, keys=keys, device=device)
    if mask is None:
        return everything, None
    if mask.dtype != torch.bool:  # added to the scores; the lowest number means hidden
        return everything, mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
    if mask.shape[1] == 1 and not torch.compiler.is_compiling():
        real = mask[:, 0].any(1)
        padding = None if bool(real.all()) else real
        for causal in (False, True):
            known = Mask(queries=queries, keys=keys, causal=causal, padding=padding, device=device)
            dense = known.dense()
            if bool(mask.all()) if dense is None else bool((dense == mask).all()):
                return known, None
    return everything, torch.zeros(mask.shape, device=device).masked_fill(~mask, -torch.inf)


def check_attention(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> int:
    """How many times one forward of the model calls its Formwright attention function.

    Args:
        model: a Hugging Face model with a Formwright attention set.
        inputs: arguments of its forward; none = a few token ids.

    Raises:
        FormwrightError: the family does not use the registries, no Formwright attention is set, the function is never
            called, or the inputs are missing for a model that reads no ids.
    """
    family = type(model).__name__
    if not type(model)._can_set_attn_implementation():
        raise FormwrightError(
            f"{family} has an attention of its own and never asks for another: no attention function can be set on "
            "it. Choose a family that uses transformers' AttentionInterface, such as bert, llama or vit."
        )
    name = model.config._attn_implementation
    if not str(name).startswith(PREFIX):
        raise FormwrightError(
            f"{family} attends by {name!r}; set a Formwright attention first: "
            f'model.set_attn_implementation("{PREFIX}softmax").'
        )
    if inputs is None:
        if model.main_input_name != "input_ids":
            raise FormwrightError(f"{family} reads {model.main_input_name}: give check_attention its inputs.")
        ids = torch.arange(5, device=next(model.parameters()).device)[None]
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    calls: list[str] = []
    token = _calls.set(calls)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    finally:
        model.train(training)
        _calls.reset(token)
    if not calls:
        raise FormwrightError(f"{family} stores {name} in its config, but a forward never calls it: nothing changes.")
    return len(calls)


register("softmax")
