"""Which weights stay: the lowest scores go, by what the weights are or by what data says of them.

The equations are those of llm_weight_pruning.py.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from formwright.compress.anatomy import Layer, describe
from formwright.compress.prune.matrices import Masks, Matrix, Scores
from formwright.errors import FormwrightError

Score = Literal["magnitude", "random", "snip", "taylor", "movement", "wanda", "sparsegpt"]
Scope = Literal["global", "layer", "row"]

DAMPING, COLUMNS = 0.01, 128  # SparseGPT's lambda, and the columns between two updates of all that follow


def keep(scores: Float[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """False at exactly `count` places, the lowest scores; of equal ones the first go."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(stable=True)[:count]] = False
    return kept.view(scores.shape)


def keep_in_rows(scores: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    """False at exactly `count` places of every row."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], False)


def keep_pattern(scores: Float[Tensor, "out in"], n: int, m: int) -> Bool[Tensor, "out in"]:
    """The n highest of every m neighbours in a row stay."""
    return keep_in_rows(scores.reshape(-1, m), m - n).view(scores.shape)


def keep_together(scores: Scores, amount: float, scope: Scope) -> Masks:
    """The lowest share goes: of all matrices, of each, or of each row."""
    if scope == "row":
        return {path: keep_in_rows(one, round(amount * one.shape[1])) for path, one in scores.items()}
    if scope == "layer":
        return {path: keep(one, round(amount * one.numel())) for path, one in scores.items()}
    flat = torch.cat([one.flatten() for one in scores.values()])
    parts = keep(flat, round(amount * len(flat))).split([one.numel() for one in scores.values()])
    return {path: part.view(one.shape) for (path, one), part in zip(scores.items(), parts, strict=True)}


def tiled(scores: Float[Tensor, "out in"], size: int) -> Float[Tensor, "rows columns"]:
    """The mean score of every tile of size x size."""
    rows, columns = scores.shape
    return scores.view(rows // size, size, columns // size, size).mean((1, 3))


def cubic(step: int, steps: int, amount: float) -> float:
    """The share that is zero after `step` of `steps`: 0 at first, `amount` at the end."""
    return amount * (1 - (1 - min(1.0, step / steps)) ** 3)


def parse_pattern(structure: str) -> tuple[int, int] | None:
    """(2, 4) for "2:4", 2 of 4 neighbours stay; None for what is no pattern."""
    n, colon, m = structure.partition(":")
    if not (colon and n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
        return None
    return int(n), int(m)


def sparsegpt(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    amount: float,
    *,
    scope: Scope = "layer",
    pattern: tuple[int, int] | None = None,
    kept: Bool[Tensor, "out in"] | None = None,
    columns: int = COLUMNS,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Prune column by column, the columns that follow making up for the error; in float32.

    Args:
        weight: left as it is.
        hessian: X X^T over calibration inputs, without damping.
        amount: the share that goes, from every block of columns ("layer") or every row of it ("row").
        pattern: (n, m) in their place: n of m neighbours stay.
        kept: what was pruned before goes first.
        columns: of a block.

    Returns:
        The pruned weight and its mask.
    """
    weight = weight.detach().float().clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    rows, width = weight.shape
    hessian = hessian.float()
    damp = DAMPING * hessian.diagonal().mean()
    damped = hessian + torch.eye(width, device=weight.device) * torch.where(damp > 0, damp, 1.0)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)

    def scored(start: int, end: int) -> Float[Tensor, "out n"]:
        score = (weight[:, start:end] / factor.diagonal()[start:end]).square()
        return score if kept is None else score.masked_fill(~kept[:, start:end], -1.0)

    for start in range(0, width, columns):
        end = min(start + columns, width)
        if pattern is None and scope == "row":
            mask[:, start:end] = keep_in_rows(scored(start, end), round(amount * end) - round(amount * start))
        elif pattern is None:
            count = round(amount * rows * end) - round(amount * rows * start)
            mask[:, start:end] = keep(scored(start, end), count)
        errors = torch.zeros(rows, end - start, device=weight.device)
        for j in range(start, end):
            if pattern is not None and j % pattern[1] == 0:  # inside a block the weights have moved already
                mask[:, j : j + pattern[1]] = keep_pattern(scored(j, j + pattern[1]), *pattern)
            error = weight[:, j].masked_fill(mask[:, j], 0.0) / factor[j, j]
            weight[:, j:end] -= error[:, None] * factor[j, j:end]
            weight[:, j].masked_fill_(~mask[:, j], 0.0)
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight, mask


def lowest_layers(model: PreTrainedModel, scores: Scores, amount: float) -> list[int]:
    """The layers with the lowest mean score; each stack keeps one, and those that others depend on stay."""
    anatomy = describe(model)
    found: dict[int, float] = {}
    for stack in anatomy.stacks:
        means = {}
        for layer in stack.layers:
            inside = [one for path, one in scores.items() if path.startswith(f"{layer.path}.")]
            means[layer.index] = float(sum(one.sum() for one in inside) / sum(one.numel() for one in inside))
        free = {
            layer.index: means[layer.index]
            for layer in stack.layers
            if layer.attention is None or not (layer.attention.bias or "").startswith(f"{layer.path}.")
        }
        if len(free) == len(stack.layers):
            del free[max(free, key=lambda index: free[index])]
        found |= free
    if any(layer.repeats > 1 for layer in anatomy.layers):
        raise FormwrightError("The layers of this model are one and the same: prune neurons or heads instead.")
    return sorted(sorted(found, key=lambda index: found[index])[: round(amount * len(anatomy.layers))])


# What data says about the weights


def gradient_scores(
    model: PreTrainedModel, found: Mapping[str, Matrix], rows: list[dict[str, Tensor]], score: Score
) -> Scores:
    """SNIP's or Taylor's score, the model left as it was."""
    total = {path: torch.zeros_like(one.values, dtype=torch.float32) for path, one in found.items()}
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in asked:
        parameter.requires_grad_(False)
    weights = [one.weight.requires_grad_() for one in found.values()]
    try:
        for batch in rows:
            with torch.enable_grad():
                loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for (path, one), gradient in zip(found.items(), gradients, strict=True):
                if gradient is not None:
                    each = one.seen(gradient).float() * one.values.float()
                    total[path] += (each if score == "snip" else each.square()) / len(rows)
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
    return {path: one.abs() for path, one in total.items()}


class _Enough(Exception):
    """The layer that was asked for has run."""


@torch.no_grad()
def input_products(
    model: PreTrainedModel, layer: Layer, found: Mapping[str, Matrix], rows: list[dict[str, Tensor]], *, full: bool
) -> dict[str, Tensor]:
    """X X^T of the inputs of each matrix of a layer over calibration tokens, or its diagonal alone; padding is left
    out."""
    sums: dict[str, Tensor] = {}
    live: Bool[Tensor, "b n"] | None = None

    def reading(path: str) -> Callable[..., None]:
        def read(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            del module
            inputs = given[0].float()
            inputs = inputs[live] if live is not None and live.shape == inputs.shape[:2] else inputs.flatten(0, -2)
            product = inputs.T @ inputs if full else inputs.square().sum(0)
            sums[path] = sums[path] + product if path in sums else product

        return read

    def enough(*_: Any) -> None:
        raise _Enough

    handles = [one.module.register_forward_pre_hook(reading(path)) for path, one in found.items()]
    if layer.repeats == 1:  # a shared layer is read in all its runs
        handles.append(model.get_submodule(layer.path).register_forward_hook(enough))
    try:
        for batch in rows:
            mask = batch.get("attention_mask")
            live = None if mask is None else mask.to(model.device).bool()
            try:
                model(**{name: value.to(model.device) for name, value in batch.items()})
            except _Enough:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return sums
