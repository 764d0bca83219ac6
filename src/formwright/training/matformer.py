"""MatFormer's training: the nested sizes of a model learn together.

Paper    Devvrit et al.: MatFormer (NeurIPS 2024), arXiv:2310.07707, section 3.2. The nested layer is
         `formwright.parts.feedforward.matformer`.
Idea     All layers run at one granularity at a time; layers that mix them are met first when the model is used.

             variant="sample"   each step draws i with probability p_i, and trains T_i: the paper's text
             variant="joint"    each step adds up the gradients of all g granularities, then one update: the public
                                reproduction

         A sampled step costs what its sub-model does, a joint one what all of them do together. `History.extras` holds
         the granularity of each sampled step, or the loss of each granularity in each joint one.
Differs  In nothing. A step that is cut into several batches draws once.
"""

from typing import Any, Literal, get_args

import torch
from torch import nn

from formwright.errors import FormwrightError
from formwright.models.matformer import choose, nested_layers
from formwright.training.evaluation import Trainable
from formwright.training.method import Method, Outputs, Pass
from formwright.training.settings import Settings

Variant = Literal["sample", "joint"]


class Nested(Method):
    """Train every granularity of a model whose feed-forward layers are nested.

    Args:
        variant: see above.
        probabilities: p_1 .. p_g of a sampled step, which need not sum to 1; none = all alike.
    """

    def __init__(self, *, variant: Variant = "sample", probabilities: tuple[float, ...] | None = None) -> None:
        if variant not in get_args(Variant):
            raise FormwrightError(f"MatFormer trains by variant={' or '.join(get_args(Variant))}, got {variant!r}.")
        if probabilities is not None and (
            variant == "joint" or min(probabilities, default=0) < 0 or sum(probabilities) <= 0
        ):
            raise FormwrightError(
                "Probabilities are those of variant='sample': one a granularity, none below 0 and one above; "
                f"got {probabilities} with {variant!r}."
            )
        self.variant, self.probabilities = variant, probabilities
        self.seed = 0

    def check(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        most = self._most(model)
        if self.probabilities is not None and len(self.probabilities) != most:
            raise FormwrightError(
                f"The model has {most} granularities, so it takes as many probabilities, not {self.probabilities}."
            )

    def prepare(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        self.seed = settings.seed

    def forward(self, given: Pass) -> Outputs:
        if self.variant == "sample":
            granularity = self.drawn(given.step, self._most(given.model))
            choose(given.model, granularity)
            return _told(given.run(given.batch), {"granularity": torch.tensor(float(granularity))})
        losses = {}
        most = self._most(given.model)
        for granularity in range(1, most + 1):
            choose(given.model, granularity)
            outputs = given.run(given.batch)
            losses[f"granularity {granularity}"] = outputs["loss"].detach()
            if granularity < most:
                given.backward(outputs["loss"])
        return _told(outputs, losses)

    def drawn(self, step: int, most: int) -> int:
        """The granularity of a step: it hangs on seed and step alone, so that all processes and resumed runs agree."""
        weights = torch.tensor(self.probabilities or (1.0,) * most)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return 1 + int(torch.multinomial(weights, 1, generator=draw))

    def stepped(self, model: nn.Module, step: int) -> None:  # noqa: ARG002
        choose(model, self._most(model))  # what is evaluated or saved meanwhile is the whole model

    def finish(self, model: nn.Module) -> None:
        choose(model, self._most(model))

    def _most(self, model: nn.Module) -> int:
        return len(nested_layers(model)[0][0].widths)


def _told(outputs: Any, numbers: dict[str, torch.Tensor]) -> Outputs:
    """The outputs with numbers for the history; a model's own extra losses stay."""
    outputs["extra_losses"] = {**(outputs.get("extra_losses") or {}), **numbers}
    return outputs
