"""Training under masks: with what is masked held at zero, or used masked and scored by how it moves."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from formwright.compress.prune.matrices import Masks, Matrix, Scores, zero


@contextmanager
def fixed(
    found: Mapping[str, Matrix],
    masks: Masks,
    *,
    scores: Scores | None = None,
    after_step: Callable[[], None] | None = None,
) -> Iterator[None]:
    """While training, what is masked is exactly zero after every step and gets no gradient.

    Args:
        masks: looked up in every step, so they may be exchanged between steps.
        scores: to which each step's gradient times weight is added.
        after_step: called when an optimizer has moved the weights, before the masks are applied.
    """

    def seeing(path: str, one: Matrix) -> Callable[[Tensor], Tensor]:
        def see(gradient: Tensor) -> Tensor:
            if scores is not None:
                scores[path] += one.seen(gradient).float() * one.values.float()
            return gradient * one.seen(masks[path])

        return see

    own = {id(one.weight) for one in found.values()}

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(weight) in own for group in optimizer.param_groups for weight in group["params"]):
            if after_step is not None:
                after_step()
            zero(found, masks)  # momentum of a weight that was masked just now would move it

    handles = [one.weight.register_hook(seeing(path, one)) for path, one in found.items() if one.weight.requires_grad]
    handles.append(register_optimizer_step_post_hook(step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StraightThrough(nn.Module):
    """w -> w mask, where the score moves by - w dL/d(w mask) whether or not w is masked."""

    def __init__(self, matrix: Matrix, masks: Masks, scores: Scores) -> None:
        super().__init__()
        self.matrix, self.masks, self.scores = matrix, masks, scores

    def forward(self, weight: Tensor) -> Tensor:
        path, seen = self.matrix.path, self.matrix.seen
        masked = weight * seen(self.masks[path])
        if masked.requires_grad:
            value = weight.detach()

            def see(gradient: Tensor) -> None:
                self.scores[path] -= seen(gradient * value).float()

            masked.register_hook(see)
        return masked


@contextmanager
def moving(found: Mapping[str, Matrix], masks: Masks, scores: Scores, after_step: Callable[[], None]) -> Iterator[None]:
    """While training, weights are used masked, kept whole, and scored by how they move; at the end the mask stays."""
    for one in found.values():
        parametrize.register_parametrization(one.module, "weight", StraightThrough(one, masks, scores))
    own = {id(one.module.parametrizations.weight.original) for one in found.values()}

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(weight) in own for group in optimizer.param_groups for weight in group["params"]):
            after_step()

    handle = register_optimizer_step_post_hook(step)
    try:
        yield
    finally:
        handle.remove()
        for one in found.values():
            parametrize.remove_parametrizations(one.module, "weight", leave_parametrized=True)
