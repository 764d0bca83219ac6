"""Receptive fields of a decoder: how far its relative positions reach by theory, and how far it reads by measurement.

Paper    Qin, Zhong, Deng: Exploring Transformer Extrapolation (AAAI 2024), arXiv:2307.10156.
Idea     By theory a head reaches as far as all but epsilon of the sum of its exp(bias), and the model reads longer
         texts than those of training if that sum converges in all heads (see `formwright.ops.relative_kernels`). By
         measurement it reaches as far as the smallest window w of attention with

             perplexity(w) <= (1 + epsilon) perplexity(all)

Differs  Biases that are learned without a formula (T5's, FIRE's), and factors after the softmax (URPE's), are read off
         the part up to a length. ERF is defined as remembered from the paper.

    python -m formwright.theory.receptive_field FOLDER          the heads of a saved decoder
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, Structured, Toeplitz, dense, hooks
from formwright.errors import FormwrightError
from formwright.models.body import Stack
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.position import by_distance


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far one head reaches by its bias alone.

    Attributes:
        converges: whether the sum over all distances is known to converge.
        field: the tokens that hold all of it but epsilon; infinite when it is not known to converge.
        within: the same of the sum up to `length` only, of any bias.
    """

    converges: bool
    field: float | int
    within: int


def extrapolates(position: nn.Module | None) -> bool:
    """Whether, by the criterion, a decoder with this position reads texts of any length as it reads those of training.

    Only a bias can fulfil it, one whose exponentials have a finite sum in every head. The criterion is sufficient:
    False means that it promises nothing (no position, rotations, positions added to the tokens, biases that do not
    fall).
    """
    known = getattr(position, "series", None)
    return known is not None and "embed" not in hooks(position) and all(series.converges for series in known())


@torch.no_grad()
def reach(position: nn.Module | None, *, heads: int, epsilon: float = 0.01, length: int = 4096) -> list[Reach]:
    """The theoretical receptive field of every head of a position, trained or not.

    Args:
        position: none = all keys alike.
        heads: attention heads, for positions without a bias.
        epsilon: the share of the sum that is beyond.
        length: tokens of the longest text, for `within`; a bias that counts places too is read at its last token.
    """
    _share(epsilon)
    if length < 1:
        raise FormwrightError(f"length is {length}, but a text has at least one token.")
    weights = _weights(position, heads, length)
    kept = weights.cumsum(-1) > (1 - epsilon) * weights.sum(-1, keepdim=True)
    within = (kept.int().argmax(-1) + 1).tolist()
    known = getattr(position, "series", None)
    series = [None] * len(within) if known is None or "scale" in hooks(position) else known()
    sure = known is not None and "embed" not in hooks(position)
    converging = [one.converges for one in known()] if sure else [False] * len(within)
    return [
        Reach(
            converges=converges,
            field=math.inf if one is None or not converges else one.receptive_field(epsilon),
            within=near,
        )
        for one, converges, near in zip(series, converging, within, strict=True)
    ]


def _weights(position: nn.Module | None, heads: int, length: int) -> Float[Tensor, "h {length}"]:
    """exp(bias), times the factor, of the last token's keys, the nearest first, scaled to at most 1."""
    if getattr(position, "reads_tokens", False) and hooks(position) & {"bias", "scale"}:
        raise FormwrightError(
            f"The bias of {type(position).__name__} is made of the tokens: measure its receptive field instead."
        )
    device = next((p.device for p in position.parameters()), torch.device("cpu")) if position is not None else "cpu"
    context = Context(queries=1, keys=length, causal=True, device=torch.device(device))
    logs = torch.zeros(1, length, dtype=torch.float64, device=device)
    if "bias" in hooks(position):
        logs = logs + dense(position.bias(context))[0, :, 0].double().flip(-1)
    if "scale" in hooks(position):
        logs = logs + dense(position.scale(context))[0, :, 0].double().abs().log().flip(-1)
    weights = (logs - logs.amax(-1, keepdim=True)).exp()
    return weights.expand(heads, -1) if hooks(position).isdisjoint({"bias", "scale"}) else weights


def receptive_fields(model: nn.Module, *, epsilon: float = 0.01, length: int = 4096) -> list[list[Reach]]:
    """`reach` of every layer of a decoder of ours.

    Raises:
        FormwrightError: the model is no decoder of ours, or a layer is no attention.
    """
    return [reach(position, heads=mixer.heads, epsilon=epsilon, length=length) for mixer, position in _attention(model)]


def _share(epsilon: float) -> None:
    if not 0 < epsilon < 1:
        raise FormwrightError(f"epsilon is {epsilon}, but it is a share of the sum, between 0 and 1.")


def _attention(model: nn.Module) -> list[tuple[MultiHeadAttention, nn.Module | None]]:
    """The attention of every layer and the position that acts on its scores."""
    body = getattr(model, "model", model)
    stack = getattr(body, "decoder", None)
    if not isinstance(stack, Stack):
        raise FormwrightError(
            f"A receptive field is that of a decoder of Formwright's; {type(model).__name__} is none."
        )
    found = []
    for i, layer in enumerate(stack.layers):
        mixer = layer.block.mixer
        if not isinstance(mixer, MultiHeadAttention):
            raise FormwrightError(
                f"Layer {i} mixes tokens by {type(mixer).__name__}, which has no window; a receptive field needs "
                "attention in every layer."
            )
        shared = stack.position if layer.uses_position else None
        found.append((mixer, shared if mixer.position is None else mixer.position))
    return found


class Window(nn.Module):
    """Another position, or none, and keys at a distance of `window` or more out of sight."""

    def __init__(self, position: nn.Module | None, window: int) -> None:
        super().__init__()
        if "scores" in hooks(position):
            raise FormwrightError(
                f"{type(position).__name__} makes the scores itself and leaves no place for a window; measure a model "
                "with another position."
            )
        self.position, self.window = position, window

    def __getattr__(self, name: str) -> Any:
        if name in ("rotate", "scale", "turns_stored", "reads_tokens"):
            return getattr(self.position, name)
        return super().__getattr__(name)

    def bias(self, context: Context) -> Structured:
        def sees(lags: Int[Tensor, "..."]) -> Float[Tensor, "1 ..."]:
            return torch.zeros(lags.shape, device=lags.device).masked_fill(lags >= self.window, -math.inf)[None]

        sight = by_distance(context, sees)
        if "bias" not in hooks(self.position):
            return sight
        bias = self.position.bias(context)
        if isinstance(bias, Toeplitz) and isinstance(sight, Toeplitz):
            return Toeplitz(bias.diagonals + sight.diagonals, bias.keys)
        return dense(bias) + dense(sight)


@contextmanager
def windowed(model: nn.Module, window: int) -> Iterator[None]:
    """Every layer of a decoder of ours sees the last `window` keys alone, the token itself being the first.

    Raises:
        FormwrightError: the model is no decoder of ours, or some attention takes no bias.
    """
    if window < 1:
        raise FormwrightError(f"window is {window}, but a token sees at least itself.")
    layers = _attention(model)
    for mixer, _ in layers:
        if "bias" not in mixer.hooks:
            raise FormwrightError(f"{type(mixer.attention).__name__} takes no bias, so that no window can be set.")
    owned = [mixer.position for mixer, _ in layers]
    windows = [Window(position, window) for _, position in layers]
    try:
        for (mixer, _), position in zip(layers, windows, strict=True):
            mixer.position = position
        yield
    finally:
        for (mixer, _), position in zip(layers, owned, strict=True):
            mixer.position = position


@torch.no_grad()
def empirical_receptive_field(model: nn.Module, ids: Int[Tensor, "b n"], *, epsilon: float = 0.01) -> int:
    """The smallest window with which a trained language model reads a text as well as with all of it, within epsilon
    of its perplexity. Windows are doubled until one is enough, then halved in between.

    Args:
        model: a decoder of ours with a language model's head.
        ids: texts of equal length, longer than what may be reached.
        epsilon: by how much the perplexity may be higher, as a share.

    Raises:
        FormwrightError: the model is no decoder of ours, or some layer takes no window.
    """
    _share(epsilon)
    training = model.training
    model.eval()
    try:
        most = float(model(ids, labels=ids, use_cache=False).loss) + math.log1p(epsilon)

        def enough(window: int) -> bool:
            with windowed(model, window):
                return float(model(ids, labels=ids, use_cache=False).loss) <= most

        low, high = 0, 1
        while high < ids.shape[1] and not enough(high):
            low, high = high, 2 * high
        high = min(high, ids.shape[1])
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high
    finally:
        model.train(training)


def main(words: list[str] | None = None) -> None:
    """Print the heads of a saved decoder."""
    from transformers import AutoModel

    import formwright.models.transformer  # noqa: F401 makes the Auto classes know it

    parser = argparse.ArgumentParser(prog="python -m formwright.theory.receptive_field", description=main.__doc__)
    parser.add_argument("folder", help="where save_pretrained put the model")
    parser.add_argument("--epsilon", type=float, default=0.01, help="share of the sum that is beyond (0.01)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the longest text (4096)")
    given = parser.parse_args(words)
    model = AutoModel.from_pretrained(given.folder)
    print("layer\thead\tconverges\tfield\tfield within the length")
    for i, heads in enumerate(receptive_fields(model, epsilon=given.epsilon, length=given.length)):
        for h, head in enumerate(heads):
            print(f"{i}\t{h}\t{'yes' if head.converges else 'no'}\t{head.field}\t{head.within}")


if __name__ == "__main__":
    try:
        main()
    except (FormwrightError, OSError) as error:
        raise SystemExit(f"Error: {error}") from None
