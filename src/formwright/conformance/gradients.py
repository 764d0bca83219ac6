"""Gradients: every parameter learns, and padding does not poison them."""

import torch
from torch import Tensor

from formwright.conformance.check import check, ensure
from formwright.conformance.subject import MIXING, Stand, Subject, lengths_to_padding, padding_to_positions, tokens
from formwright.contracts import Context


def _backward(stand: Stand, x: Tensor, context: Context, *, only: Tensor | None = None) -> None:
    """The gradients of a random cotangent, plus the part's own losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = stand(x, context)
        cotangent = torch.randn_like(y)
    if only is not None:
        cotangent = cotangent * only[..., None]
    loss = (y * cotangent).sum() + sum(value.sum() for value in context.losses.values())
    loss.backward()


@check()
def every_parameter_gets_a_gradient(subject: Subject) -> None:
    """No parameter is left without a gradient, with an all-zero one or with NaN."""
    for causal in subject.causals or (False,):
        for mode in ("train", "eval"):
            stand, x = subject.stand(causal=causal), tokens(63)
            stand.train(mode == "train")
            _backward(stand, x, Context.of(x, causal=causal))
            dead = [
                name for name, p in stand.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
            ]
            if mode == "train":  # in evaluation a hardened part may leave its router out
                ensure(not dead, f"{subject} has dead parameters: {', '.join(dead)} get no gradient (causal={causal}).")
            wild = [
                name for name, p in stand.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            ensure(not wild, f"{subject}: the gradient of {', '.join(wild)} is not finite (causal={causal}).")


@check("cross", slots=("mixer", "attention", "block"))
def every_parameter_gets_a_gradient_in_cross_attention(subject: Subject) -> None:
    """The same when keys and values come from a memory."""
    stand = subject.stand(causal=False, cross=True) if subject.slot == "block" else subject.stand(causal=False)
    stand.train()
    x, memory = tokens(7), tokens(11, seed=2)
    _backward(stand, x, Context(queries=7, keys=11, memory=memory))
    dead = [name for name, p in stand.named_parameters() if p.grad is None or not p.grad.any()]
    ensure(not dead, f"{subject} has parameters without a gradient in cross-attention: {', '.join(dead)}.")


@check()
def input_gets_a_gradient(subject: Subject) -> None:
    """The gradient reaches every token of the input."""
    for causal in subject.causals or (False,):
        stand, x = subject.stand(causal=causal).train(), tokens(9).requires_grad_()
        _backward(stand, x, Context.of(x, causal=causal))
        ensure(
            x.grad is not None and bool(x.grad.any(-1).all()), f"{subject} passes no gradient to some of its tokens."
        )


@check("padding", slots=MIXING)
def pads_get_no_gradient(subject: Subject) -> None:
    """A loss on the real tokens gives the pads no gradient, and padding makes no gradient NaN."""
    for causal in subject.causals:
        for side in ("left", "right"):
            padding = lengths_to_padding((2, 9, 5), 9, side)
            stand, x = subject.stand(causal=causal).train(), tokens(9).requires_grad_()
            context = Context.of(x, causal=causal, padding=padding, positions=padding_to_positions(padding))
            _backward(stand, x, context, only=padding)
            where = f"with {side} padding (causal={causal})"
            ensure(bool(torch.isfinite(x.grad).all()), f"{subject}: the gradient of the tokens is not finite {where}.")
            largest = x.grad[~padding].abs().max() / x.grad[padding].abs().max()
            ensure(largest.item() < 1e-6, f"{subject} sends the pads a gradient {where}.")
            wild = [
                name for name, p in stand.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            ensure(not wild, f"{subject}: the gradient of {', '.join(wild)} is not finite {where}.")
