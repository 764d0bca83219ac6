"""Reversible blocks: a stack of any depth keeps the activations of its last layer alone for the backward pass.

Paper    Gomez, Ren, Urtasun, Grosse: The Reversible Residual Network (NeurIPS 2017), arXiv:1707.04585; in Transformers
         Kitaev, Kaiser, Levskaya: Reformer (ICLR 2020), arXiv:2001.04451.
Idea     Two streams instead of one. Every sub-layer reads one and adds to the other, so that what it read and what was
         there before can be computed again from what it left.

             forward    a, b  ->  b, c     c = a + s(norm(b))      s = mixer, (cross-attention,) feed-forward, mixer ...
             backward   b, c  ->  a, b     a = c - s(norm(b))

         The embeddings enter as both streams, the mean of the two leaves the stack. Memory no longer grows with depth;
         each sub-layer is computed once more in the backward pass, as with checkpointing.
Differs  The paper joins the streams by concatenation, which would need a head twice as wide. a is exact but for
         rounding: gradients agree with the ordinary ones to about 1e-6 a layer in float32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from formwright.contracts import Context, FeedForward, Mixer, NormFactory, UnsupportedContext, refuse


class Reversible(nn.Module):
    """(b, n, 2 d) -> (b, n, 2 d): both streams, side by side. A stack of these ends with a norm.

    Args:
        dim: width d of a stream.
        mixer: the token mixer.
        feedforward: none = a block of the mixer alone.
        cross: the mixer that reads the encoder's output; none in an encoder or a plain decoder.
        norm: makes a norm of a given width.
        dropout: probability of dropping an element of what a sub-layer adds.
    """

    final_norm: ClassVar[bool] = True
    streams: ClassVar[int] = 2

    def __init__(
        self,
        *,
        dim: int,
        mixer: Mixer,
        feedforward: FeedForward | None,
        norm: NormFactory,
        cross: Mixer | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = norm(dim), mixer
        self.cross_norm, self.cross = (norm(dim), cross) if cross is not None else (None, None)
        self.feedforward_norm, self.feedforward = (norm(dim), feedforward) if feedforward is not None else (None, None)
        self.dropout = dropout

    def forward(
        self, x: Float[Tensor, "b n two_d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n two_d"]:
        a, b = x.chunk(2, -1)
        for step in self.steps(context, cross):
            a, b = b, a + step(b)
        return torch.cat([a, b], -1)

    def steps(self, context: Context, cross: Context | None) -> Iterator["Step"]:
        """The sub-layers in their order."""
        yield Step(self.mixer_norm, self.mixer, context, self.dropout)
        if self.cross is not None:
            assert cross is not None
            yield Step(self.cross_norm, self.cross, cross, self.dropout)
        if self.feedforward is not None:
            yield Step(self.feedforward_norm, self.feedforward, context, self.dropout)


@dataclass
class Step:
    """What a sub-layer adds to the other stream, and all that its gradient may flow to."""

    norm: nn.Module
    layer: nn.Module
    context: Context
    dropout: float
    random: list[Tensor] = field(default_factory=list)  # the generators' states before it ran

    def __call__(self, b: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        added = self.layer(self.norm(b), self.context)
        return F.dropout(added, self.dropout, self.layer.training) if self.dropout else added

    def tensors(self) -> list[Tensor]:
        shared = self.context.shared_position
        found = [*self.norm.parameters(), *self.layer.parameters()]
        found += [] if shared is None else list(shared.parameters())
        found += [] if self.context.memory is None else [self.context.memory]
        return [one for one in found if one.requires_grad]


def run(steps: Sequence[Step], x: Float[Tensor, "b n two_d"]) -> Float[Tensor, "b n two_d"]:
    """All sub-layers of a stack one after the other; nothing in between is kept for the backward pass.

    Raises:
        UnsupportedContext: a part has a loss of its own or hands something on to a later layer, which would not be
            computed again.
    """
    tensors = list({id(one): one for step in steps for one in step.tensors()}.values())
    a, b = x.chunk(2, -1)
    return torch.cat(_Run.apply(steps, a, b, *tensors), -1)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, steps: Sequence[Step], a: Tensor, b: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        device = a.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        for step in steps:
            step.random = _states(a.device)
            told = len(step.context.losses)
            a, b = b, a + step(b)
            if told != len(step.context.losses):
                raise _refused(step, "it has a loss of its own")
        ctx.steps, ctx.tensors = steps, tensors
        ctx.save_for_backward(a, b)
        return a, b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        b, c = ctx.saved_tensors
        grad_b, grad_c = grads
        found: dict[int, Tensor] = {}
        for step in reversed(ctx.steps):
            own = step.tensors()
            with torch.enable_grad(), _replayed(step.random, b.device), torch.autocast(b.device.type, **ctx.autocast):
                b = b.detach().requires_grad_()
                added = step(b)
                if any(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves(step.context.carry)):
                    raise _refused(step, "it hands something on to a later layer")
                parts = torch.autograd.grad(added, [b, *own], grad_c.to(added.dtype), allow_unused=True)
            through, rest = parts[0], parts[1:]
            for tensor, part in zip(own, rest, strict=True):
                if part is not None:
                    found[id(tensor)] = found[id(tensor)] + part if id(tensor) in found else part
            b, c = c - added.detach(), b.detach()  # a and b
            grad_b, grad_c = grad_c, grad_b if through is None else grad_b + through
        return None, grad_b, grad_c, *(found.get(id(one)) for one in ctx.tensors)


def _refused(step: Step, because: str) -> UnsupportedContext:
    return refuse(
        "A reversible block",
        asked=type(step.layer).__name__,
        because=because,
        instead='Choose block="pre", with gradient_checkpointing_enable() to save memory.',
    )


def _states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """The generators as they were; afterwards as they are."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
