"""All checks, and the ones a part must pass."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from formwright import catalog
from formwright.conformance import (
    cross,
    decoding,
    gradients,
    growth,
    initial,
    options,
    precision,
    randomness,
    refusals,
    shapes,
    storage,
    tracing,
    visibility,
)
from formwright.conformance.check import Check
from formwright.conformance.subject import SLOTS, Subject
from formwright.errors import FormwrightError

FAMILIES = (
    shapes,
    randomness,
    gradients,
    visibility,
    decoding,
    cross,
    precision,
    tracing,
    storage,
    growth,
    refusals,
    options,
    initial,
)
CHECKS: tuple[Check, ...] = tuple(
    value for family in FAMILIES for value in vars(family).values() if isinstance(value, Check)
)


def checks_for(subject: Subject) -> tuple[Check, ...]:
    """The checks its slot and capabilities oblige it to."""
    return tuple(check for check in CHECKS if check.applies(subject))


def run_by_name(slot: str, name: str, check: str) -> str | None:
    """One check of one part on a card; the sentence of what is wrong, none if it passes. For another process: all is
    plain text.
    """
    (chosen,) = [candidate for candidate in CHECKS if candidate.name == check]
    try:
        chosen(Subject.of(catalog.find(slot, name)))
    except AssertionError as error:
        return str(error)
    return None


def check_part(
    target: Callable[..., nn.Module],
    *,
    slot: str,
    capabilities: Iterable[str] = (),
    time: float | None = None,
    memory: float | None = None,
    expected_failures: Iterable[str] = (),
    **chosen: Any,
) -> None:
    """Run every check a part must pass.

    Args:
        target: the part's class; its constructor takes what it needs of dim, heads, kv_heads, head_dim, hidden,
        length, layers, layer, causal. slot: mixer, attention, position, feedforward, norm, block or init.
        capabilities: what it can honour, as a card lists it. time, memory: growth exponents with the number of tokens
        (mixers and attention functions). expected_failures: names of checks that fail for a known reason; one that
        passes is reported, too. chosen: options to build it with.

    Raises:
        AssertionError: one line for every check that failed.
    """
    if slot not in (*SLOTS, "init"):
        raise FormwrightError(f"No checks exist for the slot {slot!r}; choose from {', '.join((*SLOTS, 'init'))}.")
    subject = Subject(
        slot=slot,
        name=getattr(target, "__name__", str(target)),
        target=target,
        capabilities=frozenset(capabilities),
        time=time,
        memory=memory,
        options=chosen,
    )
    expected, failures = set(expected_failures), []
    for check in checks_for(subject):
        try:
            check(subject)
        except Exception as error:  # a part may fail in any way, and the others' verdicts are wanted all the same
            if check.name not in expected:
                failures.append(f"{check.name}: {error if isinstance(error, AssertionError) else repr(error)}")
        else:
            if check.name in expected:
                failures.append(f"{check.name}: passes, though it is listed as failing.")
    if failures:
        raise AssertionError(f"{subject} fails {len(failures)} checks:\n  " + "\n  ".join(failures))
