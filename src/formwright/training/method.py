"""What changes how a model is trained: the contract of every training method. The loop stays the Trainer's.

A method is named in `Settings.methods`, where + joins several, and is what a card provides as `training/<name>`; `fit`
takes objects too. They see a step in the order in which they are named:

    check, prepare                    once, before the optimizer is built
    forward                           every batch: the first wraps the second, ..., the last wraps the model
    gradients, then stepped           every step, around the optimizer
    finish                            once, in the opposite order; also when training ends with an error
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from formwright.build import build
from formwright.errors import FormwrightError
from formwright.training.evaluation import Batch, Trainable
from formwright.training.settings import Settings, named

Collate = Callable[[Any], Batch]
Outputs = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One batch on its way through the model in training.

    Args:
        model: the bare model, not what wraps it in several processes.
        batch: with its labels, on the model's device.
        step: 1 in the first step, the same for all batches that a step accumulates.
        run: the model, seen through the methods that come later.
        backward: propagates a part of the loss at once, scaled as the loss that `forward` returns will be.
    """

    model: nn.Module
    batch: Batch
    step: int
    run: Callable[[Batch], Outputs]
    backward: Callable[[Tensor], None]


class Method:
    """One method. What a subclass leaves out does nothing."""

    def check(self, model: nn.Module, task: Trainable, settings: Settings) -> None:
        """Raises FormwrightError where the method cannot work."""

    def prepare(self, model: nn.Module, task: Trainable, settings: Settings) -> None:
        """Change the model in place: what is to be trained, saved and resumed hangs on the model."""

    def collate(self, collate: Collate) -> Collate:
        """The function that makes a batch of rows in training, given the task's."""
        return collate

    def forward(self, given: Pass) -> Outputs:
        """The outputs of a batch, `loss` among them. Numbers in `extra_losses` are recorded, not added to the loss."""
        return given.run(given.batch)

    def gradients(self, model: nn.Module, step: int) -> None:
        """The gradients of a step are complete and clipped; the optimizer has not seen them."""

    def stepped(self, model: nn.Module, step: int) -> None:
        """The optimizer has moved the weights."""

    def finish(self, model: nn.Module) -> None:
        """Take away what `prepare` put there."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights of the model; random state is kept anyway."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`, given on the CPU."""


def methods_of(settings: Settings) -> list[Method]:
    """The methods that the settings name.

    Raises:
        FormwrightError: an unknown one, or options it does not have.
    """
    found = [build("training", spec) for spec in named(settings.methods)]
    for spec, method in zip(named(settings.methods), found, strict=True):
        if not isinstance(method, Method):
            raise FormwrightError(f"{spec} is no training method: its class must be a formwright.training.Method.")
    return found


@contextmanager
def prepared(methods: Sequence[Method], model: nn.Module, task: Trainable, settings: Settings) -> Iterator[None]:
    """The model as the methods want it while it is trained."""
    for method in methods:
        method.check(model, task, settings)
    begun: list[Method] = []
    try:
        for method in methods:
            begun.append(method)
            method.prepare(model, task, settings)
        yield
    finally:
        for method in reversed(begun):
            method.finish(model)


def through(methods: Sequence[Method], given: Pass) -> Outputs:
    """The outputs of a batch, seen through all methods."""
    if not methods:
        return given.run(given.batch)
    first, rest = methods[0], methods[1:]

    def inner(batch: Batch) -> Outputs:
        return through(
            rest, Pass(model=given.model, batch=batch, step=given.step, run=given.run, backward=given.backward)
        )

    return first.forward(
        Pass(model=given.model, batch=given.batch, step=given.step, run=inner, backward=given.backward)
    )


def packed(methods: Sequence[Method]) -> dict[str, Tensor]:
    """The states of all methods under names of one level."""
    return {
        f"{place}.{name}": value.detach().cpu().clone()
        for place, method in enumerate(methods)
        for name, value in method.state().items()
    }


def unpack(methods: Sequence[Method], states: Mapping[str, Tensor]) -> None:
    """Give every method its state back."""
    for place, method in enumerate(methods):
        own = re.compile(rf"{place}\.(.*)", re.DOTALL)
        method.load({match[1]: value for name, value in states.items() if (match := own.fullmatch(name))})
