"""What a check is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from formwright.conformance.subject import SLOTS, Subject

TOLERANCE = 5e-5  # of the largest value, in float32: a sum of some hundred terms in another order


@dataclass(frozen=True, kw_only=True)
class Check:
    """One property, and the parts that must have it."""

    name: str
    family: str
    slots: frozenset[str]
    needs: frozenset[str]  # capabilities the card must declare
    run: Callable[[Subject], None]
    traces: bool  # whether it traces the part, which only works in a process without jaxtyping's import hook

    def applies(self, subject: Subject) -> bool:
        return subject.slot in self.slots and self.needs <= subject.capabilities

    def __call__(self, subject: Subject) -> None:
        self.run(subject)


def check(
    *needs: str, slots: tuple[str, ...] = SLOTS, traces: bool = False
) -> Callable[[Callable[[Subject], None]], Check]:
    """Make a check of a function; its name is the property, `needs` the capabilities that oblige a part to have it."""

    def decorate(run: Callable[[Subject], None]) -> Check:
        return Check(
            name=run.__name__,
            family=run.__module__.rpartition(".")[2],
            slots=frozenset(slots),
            needs=frozenset(needs),
            run=run,
            traces=traces,
        )

    return decorate


def ensure(condition: bool | Tensor, sentence: str) -> None:
    """`assert`, but not for python -O to remove."""
    if not condition:
        raise AssertionError(sentence)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value of b; infinite where either is not finite."""
    if a.shape != b.shape:
        raise AssertionError(f"The shapes differ: {tuple(a.shape)} and {tuple(b.shape)}.")
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()


def ensure_close(a: Tensor, b: Tensor, sentence: str, *, tolerance: float = TOLERANCE) -> None:
    away = distance(a, b)
    ensure(
        away <= tolerance, f"{sentence} (largest difference {away:.1e} of the largest value, allowed {tolerance:.0e})"
    )
