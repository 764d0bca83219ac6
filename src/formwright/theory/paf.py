"""What attention and feed-forward do to the tokens of a trained model: how alike these become, and how much is added.

Paper    Sonkar, Baraniuk: Investigating the Role of Feed-Forward Networks in Transformers Using Parallel Attention and
         Feed-Forward Net Design (2023), arXiv:2305.13297.
Idea     Two assumptions let attention and feed-forward stand side by side. The feed-forward layer's part is to keep the
         tokens isotropic, apart from one another: without it they collapse. And attention adds little to its input.

             cosine       1 / (N (N - 1)) sum_{i != j} cos(x_i, x_j)            0 = isotropic, 1 = collapsed
             partition    min_c Z(c) / max_c Z(c), Z(c) = sum_i exp(c . x_i)    1 = isotropic, 0 = collapsed
             residual     ||X - 1 x_mean||_F / ||X||_F                          0 = all tokens are one
             ratio        ||attention(x)_i|| / ||x_i||                          the update itself, before the residual

         c runs over the eigenvectors of X^T X, each in both directions, as an eigenvector has no sign.
Differs  The paper's own formulas for isotropy could not be read; these two are the usual ones (the second is Mu and
         Viswanath's, arXiv:1702.01417). A few features of large mean are enough for a cosine near 1: it is also given
         for tokens less their mean.

    for row in measure(model, {"input_ids": ids, "attention_mask": mask}, without=[tokenizer.cls_token_id]):
        print(row.layer, row.cosine, row.ratio)
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from formwright.compress.anatomy import describe
from formwright.errors import FormwrightError
from formwright.models.body import TransformerPreTrainedModel

Tokens = Float[Tensor, "n d"]

# Of a matrix of tokens


def mean_cosine(x: Tokens) -> float:
    """The mean cosine of two different tokens, in O(n d)."""
    unit = torch.nn.functional.normalize(_several(x), dim=-1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (len(x) * (len(x) - 1)))


def partition_isotropy(x: Tokens) -> float:
    """The smallest by the largest of the partition functions along the principal directions, in O(n d^2)."""
    x = _several(x)
    logs = x @ torch.linalg.eigh(x.T @ x).eigenvectors
    logs = torch.cat([logs, -logs], dim=1).logsumexp(0)
    return float((logs.min() - logs.max()).exp())


def rank_one_residual(x: Tokens) -> float:
    """How much of the matrix is left when every token gives up the mean token."""
    x = _several(x)
    return float((x - x.mean(0)).norm() / x.norm())


def update_ratios(update: Tokens, x: Tokens) -> Float[Tensor, " n"]:
    """The length of what is added to every token by the length of the token."""
    return update.double().norm(dim=-1) / x.double().norm(dim=-1)


def _several(x: Tokens) -> Tokens:
    if len(x) < 2:
        raise FormwrightError(
            f"Tokens are compared with one another, and there is {len(x)}: give texts of two or more."
        )
    return x.double()


# Of a model


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer. The first five are of the tokens that leave it: means over the sequences, `partition` over all tokens.

    Attributes:
        layer: from 0.
        cosine, residual: see the module.
        centred: the cosine of the tokens less the mean of all tokens of the batch.
        partition: see the module.
        ratio: of what attention gives, before a factor of the block if it has one, the mean over the tokens.
        ratios: its 5th, 50th and 95th percentile.
    """

    layer: int
    cosine: float
    centred: float
    residual: float
    partition: float
    ratio: float
    ratios: tuple[float, float, float]


class _Place(NamedTuple):
    """Modules of one layer: what reads and gives the stream, and what gives the two updates, before the residual."""

    layer: nn.Module
    attention: nn.Module
    feedforward: nn.Module | None


class _Call(NamedTuple):
    """What went through a layer once."""

    tokens: Tensor
    added: Tensor  # by attention
    out: Tensor


def measure(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    *,
    without: Collection[int] = (),
    feedforward: bool = True,
) -> list[Row]:
    """Both measurements at every layer of an encoder or decoder of ours or of transformers (of the encoder, if it has
    both), in evaluation mode.

    Args:
        model: with any head or none.
        batch: of its forward. Tokens that its attention_mask hides are not counted.
        without: ids, such as those of special tokens, that are not counted either.
        feedforward: False shows the same model with what its feed-forward layers add taken away, which is not yet what
            a model learns that never had any.

    Raises:
        FormwrightError: the family is not known, attention does not give a vector for every token of the stream (as in
            Swin, where tokens lie in windows), or a sequence counts fewer than two tokens.
    """
    calls: list[_Call] = []  # in order: a layer that several depths share is called again and again
    training, device = model.training, next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with ExitStack() as hooks, torch.no_grad():
        hooks.callback(model.train, training)
        for place in _places(model):
            for handle in _watch(place, calls, feedforward=feedforward):
                hooks.callback(handle.remove)
        model.eval()(**inputs)
    counted = _counted(inputs, without, calls[0].tokens)
    return [_row(depth, call, counted) for depth, call in enumerate(calls)]


def _places(model: PreTrainedModel) -> list[_Place]:
    if isinstance(model, TransformerPreTrainedModel):
        body = model.base_model
        blocks = {one: one.block for one in (body.encoder or body.decoder).layers}
        return [_Place(layer, block.mixer, block.feedforward) for layer, block in blocks.items()]
    stack = describe(model).stacks[0]
    places = []
    for layer in stack.layers:
        if layer.attention is None:
            raise FormwrightError(f"{layer.path} of this model has no attention any more: measure it before it is cut.")
        scaled = [f"{layer.path}.{name}" for name in stack.description.attention.after]
        down = None if layer.feedforward is None else model.get_submodule(layer.feedforward.down)
        attention = model.get_submodule([layer.attention.output, *scaled][-1])
        places.append(_Place(model.get_submodule(layer.path), attention, down))
    return places


def _watch(place: _Place, calls: list[_Call], *, feedforward: bool) -> list[RemovableHandle]:
    seen: dict[str, Tensor] = {}

    def enter(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen["tokens"] = args[0] if args else named["hidden_states"]

    def add(_module: nn.Module, _args: Any, update: Any) -> None:
        seen["added"] = update[0] if isinstance(update, tuple) else update

    def leave(_module: nn.Module, _args: Any, out: Any) -> None:
        calls.append(_Call(seen["tokens"], seen["added"], out[0] if isinstance(out, tuple) else out))

    handles = [
        place.layer.register_forward_pre_hook(enter, with_kwargs=True),
        place.attention.register_forward_hook(add),
        place.layer.register_forward_hook(leave),
    ]
    if not feedforward and place.feedforward is not None:
        handles.append(place.feedforward.register_forward_hook(lambda _module, _args, update: torch.zeros_like(update)))
    return handles


def _counted(inputs: Mapping[str, Any], without: Collection[int], x: Tensor) -> Bool[Tensor, "b n"]:
    counted = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if inputs.get("attention_mask") is not None:
        counted = counted & inputs["attention_mask"].bool()
    if without:
        if "input_ids" not in inputs:
            raise FormwrightError("without names ids, and this batch has no input_ids: leave it out.")
        counted = counted & ~torch.isin(inputs["input_ids"], torch.tensor(list(without), device=x.device))
    return counted


def _row(depth: int, call: _Call, counted: Bool[Tensor, "b n"]) -> Row:
    if call.added.shape != call.tokens.shape:
        raise FormwrightError(
            f"What attention gives in layer {depth} is {tuple(call.added.shape)} and the stream is "
            f"{tuple(call.tokens.shape)}: only models whose attention gives every token its own update can be measured."
        )
    sequences = [tokens[real] for tokens, real in zip(call.out.double(), counted, strict=True)]
    every = torch.cat(sequences)
    centre = every.mean(0)
    ratios = update_ratios(call.added[counted], call.tokens[counted])
    return Row(
        layer=depth,
        cosine=fmean(map(mean_cosine, sequences)),
        centred=fmean(mean_cosine(tokens - centre) for tokens in sequences),
        residual=fmean(map(rank_one_residual, sequences)),
        partition=partition_isotropy(every),
        ratio=float(ratios.mean()),
        ratios=tuple(
            ratios.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=ratios.dtype, device=ratios.device)).tolist()
        ),
    )
