"""FST: feed-forward layers trained with 2:4-sparse weights, the last part of the steps dense.

Paper    Hu, Zhao, Huang, Chen, Zhu: Accelerating Transformer Pre-training with 2:4 Sparsity (ICML 2024),
         arXiv:2404.01847.
Idea     Two of four neighbours of a weight are zero, along rows and along columns, so that all three products of a
         training step can use hardware that skips them. The weight itself stays dense and is masked anew now and then;
         a decay of what is masked, on the gradient and so through Adam, keeps weights from changing sides for ever.

             M        of a 4 x 4 block the pattern, of the 90 with two ones a row and a column, that keeps most of |W|
             z        = x (W * M)^T + b
             dL/dx    = dL/dz (W * M)
             dL/dW    = S(dL/dz)^T x                           straight to the dense W
             g        = dL/dW + decay (1 - M) * W              on the clipped gradient, before Adam
             r_t      = |m_t - m_(t-1)|_1 / D                  the flip rate: m_t of the weights after step t

         S keeps two of four tokens' entries of a gradient, drawn so that their mean is the gradient and the variance
         least: i by a_i = |g_i|, then j by the a of those left, each divided by the probability that it is kept.
         At the end the mask falls away and the model is trained dense.
Differs  On a processor without such hardware, as any CPU, nothing is faster: this is the method's arithmetic and its
         record. `on="weights"` is SR-STE, which it is compared with, and `dense=1` a dense run whose flip rate is
         measured.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.anatomy import describe
from formwright.compress.prune.matrices import Matrix
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerPreTrainedModel
from formwright.training.evaluation import Trainable
from formwright.training.loop import fit, seeded
from formwright.training.method import Method, Outputs, Pass
from formwright.training.settings import Settings

On = Literal["gradients", "weights"]

AT_ONCE = 2**16  # blocks that are scored at a time
NEAR, FAR = 0.60, 0.95  # a good decay's flip rate, as a share of a dense run's

# Masks


@functools.cache
def patterns(device: torch.device | None = None) -> Float[Tensor, "90 4 4"]:
    """The 4 x 4 patterns with two ones in every row and column, in a fixed order. One tensor for all: only read it."""
    rows = [row for row in itertools.product((0.0, 1.0), repeat=4) if sum(row) == 2]
    made = torch.tensor(list(itertools.product(rows, repeat=4)), device=device)
    return made[(made.sum(1) == 2).all(1)]


def transposable_mask(weight: Float[Tensor, "o i"]) -> Bool[Tensor, "o i"]:
    """Where a weight stays: of each block the pattern that keeps the largest sum of |W|, the first among equals.

    All patterns are scored in one product, which is a convolution of |W| of stride 4 with 90 kernels.
    """
    outputs, inputs = weight.shape
    found = patterns(weight.device).flatten(1)  # 90 x 16
    blocks = weight.detach().abs().float().unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)
    blocks = blocks.reshape(-1, 16)
    best = torch.cat([(some @ found.T).argmax(1) for some in blocks.split(AT_ONCE)])
    mask = found.bool()[best].view(outputs // 4, inputs // 4, 4, 4)
    return mask.transpose(1, 2).reshape(outputs, inputs)


# Gradients


def sampled(gradient: Float[Tensor, "t o"]) -> Float[Tensor, "t o"]:
    """Of every four tokens' entries two, scaled so that the mean over draws is the gradient.

    Two of four are the first two to arrive, each at a rate of its size: the same as one by size, then one of the rest.
    """
    tokens = len(gradient)
    groups = F.pad(gradient, (0, 0, 0, -tokens % 4)).unflatten(0, (-1, 4))  # t/4 x 4 x o
    size = groups.abs().to(torch.promote_types(groups.dtype, torch.float32))
    size = size / size.amax(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny) + 1e-6  # zeros are drawn, too
    others = torch.einsum("gjo,ij->gio", size, 1 - torch.eye(4, dtype=size.dtype, device=size.device))
    first = size / size.sum(1, keepdim=True)
    odds = first / others
    kept = first + size * (odds.sum(1, keepdim=True) - odds)  # the probability of being one of the two
    arrival = torch.empty_like(size).exponential_() / size
    early, late = torch.aminmax(arrival.unflatten(1, (2, 2)), dim=2)  # of each pair; the second of all four is
    second = torch.minimum(early.amax(1), late.amin(1))[:, None]
    drawn = torch.where(arrival <= second, groups / kept, 0)
    return drawn.flatten(0, 1)[:tokens].to(gradient.dtype)


class SparseProduct(torch.autograd.Function):
    """x (W * M)^T + b, whose gradient goes to the whole of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, sample: bool) -> Tensor:
        masked = weight * mask
        ctx.save_for_backward(x, masked)
        ctx.biased, ctx.sample = bias is not None, sample
        return F.linear(x, masked, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, masked = ctx.saved_tensors
        gradient = gradients[0].to(masked.dtype)  # autocast hands down another
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x = (gradient @ masked).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (sampled(rows) if ctx.sample else rows).T @ x.reshape(-1, x.shape[-1]).to(masked.dtype)
        return to_x, to_weight, None, rows.sum(0) if ctx.biased and ctx.needs_input_grad[3] else None, None


class SparseLinear(nn.Linear):
    """A linear layer with a mask while it has one; otherwise itself."""

    mask: Tensor | None
    sample: bool

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        if self.mask is None:
            return super().forward(x)
        return SparseProduct.apply(x, self.weight, self.mask, self.bias, self.sample)


class SparseConv1D(Conv1D):
    """GPT-2's linear layer, whose weight lies on its side."""

    mask: Tensor | None
    sample: bool

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        if self.mask is None:
            return super().forward(x)
        return SparseProduct.apply(x, self.weight.T, self.mask, self.bias, self.sample)


SPARSE = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


def feedforwards(model: nn.Module) -> dict[str, Matrix]:
    """The plain matrices of a model's feed-forward layers, by path.

    Raises:
        FormwrightError: there are none, or the model's family is unknown.
    """
    if isinstance(model, TransformerPreTrainedModel):
        named = [
            path
            for path, module in model.named_modules()
            if getattr(module, "role", None) in ("up", "down") and "feedforward" in path.split(".")
        ]
    elif isinstance(model, PreTrainedModel):
        parts = [layer.feedforward for layer in describe(model).layers if layer.feedforward is not None]
        named = [path for part in parts for path in (part.gate, part.up, part.down) if path is not None]
    else:
        raise FormwrightError(
            f"{type(model).__name__} is no transformers model, so nobody knows its feed-forwards: train it without "
            "fst-2by4."
        )
    found = {
        path: Matrix(path, model.get_submodule(path)) for path in named if type(model.get_submodule(path)) in SPARSE
    }
    if not found:
        raise FormwrightError(
            f"{type(model).__name__} has no plain linear layers in its feed-forwards: train it without fst-2by4."
        )
    return found


# The method


class FST(Method):
    """Train feed-forward layers 2:4-sparse, then dense. Reports `flip-rate` at every step, that of the step before.

    Args:
        decay: of masked weights. The paper's is 6e-5 for GPT-2 of 124M and 774M, 2e-4 for 350M and 1.5B, at a learning
            rate of 1.5e-4; `find_decay` looks for one.
        on: what it is added to: "gradients", as here, or "weights", as in SR-STE.
        dense: the share of the steps, at the end, that are dense; 0 leaves the model sparse, 1 only watches masks.
        refresh: steps between two masks.
        sample: estimate the weights' gradients from two of four tokens; False takes all.
    """

    def __init__(
        self,
        *,
        decay: float = 6e-5,
        on: On = "gradients",
        dense: float = 1 / 6,
        refresh: int = 40,
        sample: bool = True,
    ) -> None:
        if not 0 <= decay < math.inf:
            raise FormwrightError(f"decay is {decay}, but it must be a number from 0.")
        if not 0 <= dense <= 1:
            raise FormwrightError(f"dense is {dense:g}, but it is a share of the steps: from 0 to 1.")
        if refresh < 1:
            raise FormwrightError(f"refresh is {refresh}, but it must be at least 1 step.")
        if on not in get_args(On):
            raise FormwrightError(f"on is {on!r}, but it must be {' or '.join(get_args(On))}.")
        self.decay, self.on, self.dense, self.refresh, self.sample = decay, on, dense, refresh, sample
        self.found: dict[str, Matrix] = {}
        self.last: dict[str, Tensor] = {}  # masks of the weights as they are
        self.flips = torch.zeros(())

    def check(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        for path, one in feedforwards(model).items():
            outputs, inputs = one.values.shape
            if outputs % 4 or inputs % 4:
                raise FormwrightError(
                    f"{path} is {outputs} x {inputs}, but blocks are 4 x 4: choose widths that 4 divides."
                )

    def prepare(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        self.settings, self.sparse = settings, round(settings.steps * (1 - self.dense))
        self.found = feedforwards(model)
        self.last = {path: transposable_mask(one.values) for path, one in self.found.items()}
        self.flips = torch.zeros((), device=next(model.parameters()).device)
        for path, one in self.found.items():
            one.module.__class__ = SPARSE[type(one.module)]
            one.module.sample = self.sample
            one.module.mask = self.last[path] if self.sparse else None

    def forward(self, given: Pass) -> Outputs:
        if given.step > self.sparse:
            for one in self.found.values():
                one.module.mask = None
        outputs = given.run(given.batch)
        outputs["extra_losses"] = {**(outputs.get("extra_losses") or {}), "flip-rate": self.flips}  # type: ignore[index]
        return outputs

    @torch.no_grad()
    def gradients(self, model: nn.Module, step: int) -> None:  # noqa: ARG002
        if self.on == "gradients" and self.decay:
            for weight, rest in self.masked():
                if weight.grad is not None:
                    weight.grad.add_(rest, alpha=self.decay)

    @torch.no_grad()
    def stepped(self, model: nn.Module, step: int) -> None:  # noqa: ARG002
        if self.on == "weights" and self.decay:
            rate = self.settings.learning_rate * self.settings.rate(step - 1)
            for weight, rest in self.masked():
                weight.sub_(rest, alpha=rate * self.decay)
        new = {path: transposable_mask(one.values) for path, one in self.found.items()}
        flipped = torch.stack([(new[path] ^ old).sum() for path, old in self.last.items()]).sum()
        self.flips = flipped / sum(old.numel() for old in self.last.values())
        self.last = new
        if step % self.refresh == 0 and step < self.sparse:
            for path, one in self.found.items():
                one.module.mask = new[path]

    def masked(self) -> list[tuple[Tensor, Tensor]]:
        """Every sparse weight, and what of it is masked, both as the layer holds them."""
        return [
            (one.weight, one.weight.detach() * one.seen(~one.module.mask))
            for one in self.found.values()
            if one.module.mask is not None
        ]

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:  # noqa: ARG002
        """Plain layers again. What was sparse to the end stays so: its masked weights are set to zero."""
        for one in self.found.values():
            module = one.module
            if isinstance(module, SparseLinear | SparseConv1D):
                if module.mask is not None:
                    module.weight.mul_(one.seen(module.mask))
                del module.mask, module.sample
                module.__class__ = type(module).__mro__[1]
        self.found = {}

    def state(self) -> dict[str, Tensor]:
        masks = {f"mask.{path}": one.module.mask for path, one in self.found.items() if one.module.mask is not None}
        return {**masks, **{f"last.{path}": mask for path, mask in self.last.items()}, "flips": self.flips}

    def load(self, state: dict[str, Tensor]) -> None:
        for path, one in self.found.items():
            mask = state.get(f"mask.{path}")
            one.module.mask = None if mask is None else mask.to(one.weight.device)
            self.last[path] = state[f"last.{path}"].to(one.weight.device)
        self.flips = state["flips"].to(self.flips.device)


def flip_rates(history: Any) -> list[float]:
    """After every step but the last."""
    return history.extras["flip-rate"][1:]


def find_decay(
    model: Callable[[], PreTrainedModel],
    task: Trainable,
    settings: Settings,
    candidates: Sequence[float],
    *,
    steps: int,
    **options: Any,
) -> tuple[float, Mapping[float, float]]:
    """A decay from a few steps of training: its flip rate, as a share of a dense run's, is to be from 0.60 to 0.95.

    Args:
        model: builds the model anew, from the seed of the settings.
        settings: of the whole run, whose first steps these are.
        candidates: decays to try.
        steps: of each; the flip rate is the mean over their second half.
        options: of FST.

    Returns:
        The candidate nearest to the middle of that range, and the share that each gave.
    """
    if not 4 <= steps <= settings.steps:
        raise FormwrightError(f"steps is {steps}, but it must be from 4 to the {settings.steps} of the run.")
    if not candidates:
        raise FormwrightError("find_decay chooses among candidates: give it at least one decay.")

    def rate(method: FST) -> float:
        seeded(settings.seed)
        warmup = min(0.99, settings.warmup * settings.steps / steps)  # as fast as in the whole run
        early = replace(
            settings, steps=steps, warmup=warmup, schedule="constant", methods="none", evaluate_every=0, save_every=0
        )
        seen = flip_rates(fit(model(), task, early, methods=[method]))
        return sum(seen[steps // 2 :]) / len(seen[steps // 2 :])

    plain = rate(FST(dense=1.0))
    if plain == 0:
        raise FormwrightError("No weight changes sides in a dense run this short: give find_decay more steps.")
    shares = {decay: rate(FST(decay=decay, dense=0.0, **options)) / plain for decay in candidates}
    middle = (NEAR + FAR) / 2
    return min(shares, key=lambda decay: abs(shares[decay] - middle)), shares
