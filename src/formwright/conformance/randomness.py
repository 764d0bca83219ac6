"""A seed decides everything; evaluation draws nothing."""

import torch

from formwright.conformance.check import check, ensure
from formwright.conformance.subject import Subject, tokens
from formwright.contracts import Context


def _trained(subject: Subject, causal: bool, seed: int) -> torch.Tensor:
    stand, x = subject.stand(causal=causal).train(), tokens(9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return stand(x, Context.of(x, causal=causal))


@check()
def same_seed_same_weights(subject: Subject) -> None:
    """Two parts built under one seed are equal to the bit."""
    first, second = (subject.stand(seed=3, lively=False).state_dict() for _ in range(2))
    for name in first:
        ensure(
            torch.equal(first[name], second[name]), f"{subject}: {name} differs between two parts built under one seed."
        )


@check()
def evaluation_draws_nothing(subject: Subject) -> None:
    """In evaluation mode two calls agree to the bit, and the global random state stays where it was."""
    for causal in subject.causals or (False,):
        stand, x = subject.stand(causal=causal), tokens(9)
        before = torch.random.get_rng_state()
        first, second = (stand(x, Context.of(x, causal=causal)) for _ in range(2))
        ensure(torch.equal(first, second), f"{subject} gives two outputs for one input in evaluation mode.")
        ensure(
            torch.equal(before, torch.random.get_rng_state()),
            f"{subject} moves the global random state in evaluation mode.",
        )


@check()
def training_follows_the_seed(subject: Subject) -> None:
    """In training mode one seed gives one output; only a part whose card says stochastic may depend on the seed at
    all.
    """
    for causal in subject.causals or (False,):
        first, second = (_trained(subject, causal, seed=5) for _ in range(2))
        ensure(torch.equal(first, second), f"{subject} gives two outputs under one seed in training mode.")
        if "stochastic" not in subject.capabilities:
            other = _trained(subject, causal, seed=6)
            ensure(torch.equal(first, other), f"{subject} is random in training, but its card does not say stochastic.")
