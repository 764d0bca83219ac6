"""Position-wise layers."""

import torch
from jaxtyping import Int
from torch import Tensor, nn

__all__ = ["Usage"]


class Usage(nn.Module):
    """How often each expert of a layer was chosen, in training and evaluation, since the last `reset_parameters`.

    Not counted when compiled or exported, nor kept in saved models.

    Args:
        experts: how many there are.
    """

    counts: Int[Tensor, " experts"]

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.long), persistent=False)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.counts)

    @torch.no_grad()
    def add(self, chosen: Int[Tensor, "..."]) -> None:
        """One choice for every index."""
        if not torch.compiler.is_compiling():
            index = chosen.flatten()
            self.counts.index_add_(0, index, torch.ones_like(index))

    def share(self) -> float:
        """Of the experts, those that were chosen at least once."""
        return (self.counts > 0).double().mean().item()

    def unevenness(self) -> float:
        """The divergence KL(usage || uniform) in nats: 0 = all equally often, ln experts = always the same one."""
        usage = self.counts.double() / self.counts.sum().clamp(min=1)
        return (torch.xlogy(usage, usage * len(usage))).sum().item()
