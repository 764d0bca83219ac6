"""SVD: a weight as the product of two narrow matrices, the best of their rank.

Paper    Eckart, Young: The approximation of one matrix by another of lower rank (Psychometrika 1936).
Idea     The largest singular values of a matrix are kept.

             W (o x i) = U diag(s) V^T  ~  (U_r sqrt(s_r)) (sqrt(s_r) V_r^T)      r = o i / (ratio (o + i))

         No product of that rank is nearer to W in squared error. It knows nothing of the task: train afterwards, by
         the steps finetune or distill.
Differs  The square root of a singular value goes to either side, so that both factors learn at one rate.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from formwright.compress.factorize.sites import sites
from formwright.compress.modifier import Modifier
from formwright.compress.structure import Rebuilt, replace
from formwright.errors import FormwrightError


class LowRankLinear(Rebuilt):
    """y = wide(narrow(x))."""

    kind: ClassVar[str] = "low-rank-linear"

    def __init__(self, *, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.narrow, self.wide = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)

    def structure(self) -> dict[str, Any]:
        sizes = {"inputs": self.in_features, "outputs": self.out_features, "rank": self.rank}
        return {**sizes, "bias": self.wide.bias is not None}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "LowRankLinear":  # noqa: ARG003 - it stands alone
        return cls(**structure)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Float[Tensor, "o i"], bias: Tensor | None, rank: int) -> "LowRankLinear":
        """The nearest of this rank."""
        outputs, inputs = weight.shape
        made = cls(inputs=inputs, outputs=outputs, rank=rank, bias=bias is not None).to(weight)
        left, singular, right = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), False)
        root = singular[:rank].sqrt()
        made.narrow.weight.copy_(root[:, None] * right[:rank])
        made.wide.weight.copy_(left[:, :rank] * root)
        if bias is not None:
            made.wide.bias.copy_(bias)
        return made

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """What the factors stand for; families ask for its dtype."""
        return self.wide.weight @ self.narrow.weight

    @property
    def bias(self) -> Float[Tensor, " o"] | None:
        return self.wide.bias

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        return self.wide(self.narrow(x))


class SVD(Modifier):
    """Replace the projections of attention and feed-forward layers by two narrow matrices.

    Args:
        ratio: numbers of a matrix before, over those after; above 1.
        rank: of all matrices instead; it must be small enough to save something in each.
    """

    def __init__(self, *, ratio: float | None = None, rank: int | None = None) -> None:
        if ratio is not None and rank is not None:
            raise FormwrightError(f"ratio={ratio:g} and rank={rank} say the same thing twice: leave one out.")
        if ratio is not None and not ratio > 1:
            raise FormwrightError(f"ratio is {ratio:g}, but it is how many times smaller a matrix gets: above 1.")
        if rank is not None and rank < 1:
            raise FormwrightError(f"rank is {rank}, but it must be at least 1.")
        self.ratio, self.rank = 2.0 if ratio is None else ratio, rank

    def rank_of(self, outputs: int, inputs: int) -> int:
        return self.rank or int(outputs * inputs / (self.ratio * (outputs + inputs)))

    def check(self, model: PreTrainedModel) -> None:
        for site in sites(model):
            outputs, inputs = site.matrix.values.shape
            rank = self.rank_of(outputs, inputs)
            if rank < 1:
                raise FormwrightError(
                    f"{site.path} is {outputs} x {inputs}: two factors are never {self.ratio:g} times smaller; choose "
                    "a smaller ratio."
                )
            if rank * (outputs + inputs) >= outputs * inputs:
                raise FormwrightError(
                    f"{site.path} is {outputs} x {inputs}: factors of rank {rank} are no smaller; choose a lower rank."
                )

    def apply(self, model: PreTrainedModel) -> None:
        for site in sites(model):
            weight = site.matrix.values
            replace(model, site.path, LowRankLinear.of(weight, site.bias, self.rank_of(*weight.shape)))
