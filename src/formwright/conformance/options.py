"""Constructor options: typed, validated, and none of them dropped in silence."""

import inspect
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

from formwright.build import build
from formwright.conformance.check import check, ensure
from formwright.conformance.subject import LENGTH, SLOTS, Subject, lengths_to_padding, padding_to_positions, tokens
from formwright.contracts import Context
from formwright.errors import FormwrightError

# What the surrounding model hands to constructors that ask for it; all other keywords are the user's options.
DIMENSIONS = frozenset(
    {
        "dim",
        "heads",
        "kv_heads",
        "head_dim",
        "hidden",
        "length",
        "layers",
        "layer",
        "causal",
        "grid",
        "vocab",
        "position",
        "qkv_bias",
        "mixer",
        "feedforward",
        "cross",
        "norm",
        "encoder_layers",
        "decoder_layers",
    }
)


def options(subject: Subject) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in subject.parameters().items() if name not in DIMENSIONS}


def values(parameter: inspect.Parameter) -> Iterator[Any]:
    """Values other than the default that the type allows; each choice of a Literal."""
    default = parameter.default
    kinds = _kinds(parameter.annotation)
    for kind in kinds:
        if get_origin(kind) is Literal:
            yield from (choice for choice in get_args(kind) if choice != default)
        elif kind is bool:
            yield not default
        elif kind is int:
            start = default if isinstance(default, int) else 4
            near = (start + 1, 2 * start, start // 2, 1, 2, 3, 4, 8)
            yield from (value for value in dict.fromkeys(near) if value != default)
        elif kind is float:
            start = float(default) if isinstance(default, int | float) else 0.5
            near = (start / 2, 2 * start, start + 0.25, start - 0.25, 0.3, -0.3, 0.9, 1e-3, 4.0, 100 * start)
            yield from (value for value in dict.fromkeys(near) if value != default)


def _kinds(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def fingerprint(subject: Subject, *, lengths: tuple[int, ...]) -> list[Tensor]:
    """All that a user can tell a part by: state, statistics, and outputs, gradients and losses in both modes."""
    seen: list[Tensor] = []
    for causal in subject.causals or (False,):
        sizes = {"length": max(LENGTH, *lengths), "cross": subject.slot == "block"}
        stand = subject.stand(causal=causal, dtype=torch.float64, lively=False, **sizes)
        seen += [torch.tensor(sorted(map(hash, stand.state_dict()))), *stand.state_dict().values()]
        for n in lengths:
            for mode in (True, False):
                stand.train(mode)
                seen += _calls(subject, stand, causal, n)
        seen += [buffer.clone() for buffer in stand.buffers()]  # statistics that training gathers
    return seen


def _calls(subject: Subject, stand: Any, causal: bool, n: int) -> Iterator[Tensor]:
    x = tokens(n, dtype=torch.float64)
    contexts = [Context.of(x, causal=causal)]
    if "padding" in subject.capabilities and n > 2:
        padding = lengths_to_padding((n, n - 1, 2), n, "left")
        contexts.append(Context.of(x, causal=causal, padding=padding, positions=padding_to_positions(padding)))
    if subject.slot == "block":
        contexts = [Context(queries=n, keys=5, memory=tokens(5, seed=2, dtype=torch.float64))]
    for context in contexts:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            y = stand(x, context)
        loss = y.sum() + sum(value.sum() for value in context.losses.values())
        parameters = [p for p in stand.parameters() if p.requires_grad]
        yield y.detach()
        yield from (value.detach() for value in context.losses.values())
        if parameters and loss.requires_grad:
            yield from (g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


@check(slots=(*SLOTS, "init"))
def options_are_typed_keywords(subject: Subject) -> None:
    """Every constructor argument is keyword-only and typed, every option has a default, and nothing is swallowed by
    **kwargs.
    """
    for name, parameter in subject.parameters().items():
        ensure(
            parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL),
            f"{subject} takes *{name}: a mistyped option would vanish in it.",
        )
        ensure(
            parameter.kind == parameter.KEYWORD_ONLY,
            f"{subject}: {name} can be given by position; make it keyword-only.",
        )
        ensure(parameter.annotation is not parameter.empty, f"{subject}: {name} has no type.")
        ensure(
            name in DIMENSIONS or parameter.default is not parameter.empty,
            f"{subject}: the option {name} has no default.",
        )


@check()
def no_option_is_dropped(subject: Subject) -> None:
    """Some other value of every option, and every choice of a Literal, changes state, outputs, gradients or losses,
    or is refused.
    """
    for name, parameter in options(subject).items():
        ensure_option_matters(subject, name, parameter)


def ensure_option_matters(subject: Subject, name: str, parameter: inspect.Parameter) -> None:
    choices = any(get_origin(kind) is Literal for kind in _kinds(parameter.annotation))
    silent: list[Any] = []
    tried = 0
    for value in values(parameter):
        tried += 1
        verdict = _matters(subject.with_options(**{name: value}), subject)
        if verdict and not choices:
            return
        if not verdict:
            silent.append(value)
    ensure(
        tried > 0,
        f"{subject}: no value of {name} but the default can be thought of; type it as Literal, bool, int or float.",
    )
    ensure(
        not silent,
        f"{subject} drops {name}: {next(iter(silent), None)!r} in place of {parameter.default!r} changes nothing.",
    )


def _matters(changed: Subject, plain: Subject) -> bool:
    """Whether the change shows, at ordinary lengths or at a long one; refusing the value counts."""
    for lengths in ((1, 9, 40), (300,)):
        try:
            if not same(fingerprint(changed, lengths=lengths), fingerprint(plain, lengths=lengths)):
                return True
        except ValueError:
            return True
    return False


@check(slots=(*SLOTS, "init"))
def unknown_and_ill_typed_options_are_refused(subject: Subject) -> None:
    """On the command line an unknown option is refused with the valid ones named, and a word where a number belongs
    too.
    """
    if not subject.on_card:
        return
    error = _refusal(subject, no_such_option=1)
    ensure(error is not None, f"{subject} takes an option that does not exist.")
    unnamed = [name for name in options(subject) if name not in str(error)]
    ensure(not unnamed, f"{subject} refuses an unknown option without naming {', '.join(unnamed)}.")
    for name in options(subject):
        error = _refusal(subject, **{name: "no-such-value"})
        ensure(error is not None, f"{subject} takes {name}='no-such-value'.")
        ensure(name in str(error), f"{subject} refuses {name}='no-such-value' without naming {name}: {error}")


def _refusal(subject: Subject, **wrong: Any) -> FormwrightError | None:
    dimensions = {name: True if name == "causal" else 4 for name in subject.parameters() if name in DIMENSIONS}
    try:
        build(subject.slot, {"name": subject.name, **wrong}, **dimensions)
    except FormwrightError as error:
        return error
    return None
