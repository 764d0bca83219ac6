"""Pruning: weights, neurons, heads or layers with the lowest scores become zero, and what can be cut out is cut out.

Paper    Gholami, Omar: Can pruning make Large Language Models more efficient? (2023), arXiv:2310.04573.
Idea     A study, not a mechanism: prune trained Transformers at several ratios, at once or in steps, with and without
         training afterwards, and look at quality, size and work. This is the set of tools it takes. Scores of a weight
         w with gradient g and input x (higher stays):

             magnitude   |w|                        random      u ~ U(0, 1)
             snip        |mean_b g_b w|             taylor      mean_b (g_b w)^2           b calibration batches
             movement    - sum_t g_t w_t            over training steps t, g at the masked weight (straight-through)
             wanda       |w_ij| ||x_j||             within a row
             sparsegpt   w_ij^2 / U_jj^2            H = X X^T + 0.01 mean(diag) I, U the upper Cholesky factor of H^-1;
                         with each column j pruned, w_j: -= (w_ij / U_jj) U_j: for the columns after it

         Wanda and SparseGPT read a layer's inputs from the layers before it as they are when pruned. The share that is
         zero grows at once, in rounds, or during training as  s_t = s (1 - (1 - t/T)^3).
Differs  The abstract gives no formulas: scores and schedules are those of the literature (SNIP, Molchanov's Taylor
         score, movement pruning, Wanda, SparseGPT, Zhu and Gupta's cubic). Only matrices inside layers are pruned, so
         norms, biases, embeddings and heads of tasks are spared; `embeddings` adds the token table. A neuron's, head's
         or layer's score is the mean of its weights'. Rewinding to early weights is not here.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.anatomy import Attention, FeedForward, Layer, describe
from formwright.compress.finetune import Budget, takes_labels, trainable
from formwright.compress.modifier import Data, Modifier
from formwright.compress.surgery import remove_heads, remove_layers, remove_neurons
from formwright.errors import FormwrightError
from formwright.training import fit

Score = Literal["magnitude", "random", "snip", "taylor", "movement", "wanda", "sparsegpt"]
Scope = Literal["global", "layer", "row"]
Schedule = Literal["one-shot", "iterative", "gradual"]
After = Literal["none", "finetune"]
Masks = dict[str, Bool[Tensor, "_ _"]]  # by the path of a matrix, true where a weight stays
Scores = dict[str, Float[Tensor, "_ _"]]

GRADIENTS = ("snip", "taylor")
INPUTS = ("wanda", "sparsegpt")
PHYSICAL = ("neuron", "head", "layer")
DAMPING, COLUMNS = 0.01, 128  # SparseGPT's lambda, and the columns between two updates of all that follow
RAMP = 0.7  # the share of a gradual run in which the zeros grow, when training with the final mask follows


# Which weights stay


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


# Where the weights are


@dataclass(frozen=True)
class Matrix:
    """A weight seen as (outputs, inputs); Conv1D holds it the other way round."""

    path: str
    module: Any  # Linear, Conv1D or Embedding

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    def seen(self, value: Tensor) -> Shaped[Tensor, "out in"]:
        """A tensor of the weight's own shape, or back."""
        return value.T if isinstance(self.module, Conv1D) else value

    @property
    def values(self) -> Float[Tensor, "out in"]:
        return self.seen(self.weight.detach())


def matrices(model: PreTrainedModel, *, embeddings: bool = False) -> dict[str, Matrix]:
    """The matrices inside layers, each once, and the token table if asked."""
    anatomy = describe(model)
    inside = tuple(f"{layer.path}." for layer in anatomy.layers)
    found = {
        path: Matrix(path, module)
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and path.startswith(inside)
    }
    table = anatomy.embeddings.token
    if embeddings and table is not None and isinstance(model.get_submodule(table), nn.Embedding):
        found[table] = Matrix(table, model.get_submodule(table))
    return found


@dataclass(frozen=True)
class Units:
    """The neurons or head groups of one layer: of each matrix the axis that counts them, and whose row or column each
    is."""

    layer: int
    count: int
    labels: Mapping[str, tuple[int, Int[Tensor, " n"]]]
    heads: int = 1  # query heads of a group

    def mean(self, scores: Scores) -> Float[Tensor, " units"]:
        """The mean score of the weights of each unit."""
        device = next(iter(scores.values())).device
        total, size = torch.zeros(2, self.count, device=device)
        for path, (axis, labels) in self.labels.items():
            lines = scores[path].sum(1 - axis)
            total.index_add_(0, labels.to(device), lines)
            size.index_add_(0, labels.to(device), torch.full_like(lines, scores[path].shape[1 - axis]))
        return total / size

    def masks(self, kept: Bool[Tensor, " units"], scores: Scores) -> Masks:
        found = {}
        for path, (axis, labels) in self.labels.items():
            line = kept[labels.to(kept.device)]
            found[path] = (line[:, None] if axis == 0 else line[None]).expand(scores[path].shape).clone()
        return found


def units(layer: Layer, structure: str) -> Units | None:
    """The neurons or the heads of a layer; heads that share keys and values are one unit. None where it has none."""
    if structure == "neuron":
        return None if layer.feedforward is None else _neurons(layer.index, layer.feedforward)
    return None if layer.attention is None else _heads(layer.index, layer.attention)


def _neurons(layer: int, part: FeedForward) -> Units:
    each = torch.arange(part.width)
    labels = {part.up: (0, each.repeat(2) if part.gate == part.up else each), part.down: (1, each)}
    if part.gate is not None and part.gate != part.up:
        labels[part.gate] = (0, each)
    return Units(layer, part.width, labels)


def _heads(layer: int, part: Attention) -> Units:
    size = part.heads // part.kv_heads
    pairs = torch.arange(part.kv_heads).repeat_interleave(part.head_dim)
    heads = torch.arange(part.kv_heads).repeat_interleave(size * part.head_dim)
    labels = {part.output: (1, heads)}
    for path, lines in ((part.query, heads), (part.key, pairs), (part.value, pairs)):
        if path is not None:
            labels[path] = (0, lines)
    if part.fused is not None:
        parts = 3 if part.query is None else 2
        in_turn = torch.arange(part.heads).repeat_interleave(parts * part.head_dim)
        labels[part.fused] = (0, heads.repeat(parts) if part.layout == "blocks" else in_turn)
    return Units(layer, part.kv_heads, labels, size)


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


# Training under masks


@contextmanager
def fixed(
    found: Mapping[str, Matrix],
    masks: Masks,
    *,
    scores: Scores | None = None,
    after_step: Callable[[], None] | None = None,
) -> Iterator[None]:
    """While training, what is masked is exactly zero after every step and gets no gradient.

    Args:
        masks: looked up in every step, so they may be exchanged between steps.
        scores: to which each step's gradient times weight is added.
        after_step: called when an optimizer has moved the weights, before the masks are applied.
    """

    def seeing(path: str, one: Matrix) -> Callable[[Tensor], Tensor]:
        def see(gradient: Tensor) -> Tensor:
            if scores is not None:
                scores[path] += one.seen(gradient).float() * one.values.float()
            return gradient * one.seen(masks[path])

        return see

    own = {id(one.weight) for one in found.values()}

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(weight) in own for group in optimizer.param_groups for weight in group["params"]):
            if after_step is not None:
                after_step()
            _zero(found, masks)  # momentum of a weight that was masked just now would move it

    handles = [one.weight.register_hook(seeing(path, one)) for path, one in found.items() if one.weight.requires_grad]
    handles.append(register_optimizer_step_post_hook(step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StraightThrough(nn.Module):
    """w -> w mask, where the score moves by - w dL/d(w mask) whether or not w is masked."""

    def __init__(self, matrix: Matrix, masks: Masks, scores: Scores) -> None:
        super().__init__()
        self.matrix, self.masks, self.scores = matrix, masks, scores

    def forward(self, weight: Tensor) -> Tensor:
        path, seen = self.matrix.path, self.matrix.seen
        masked = weight * seen(self.masks[path])
        if masked.requires_grad:
            value = weight.detach()

            def see(gradient: Tensor) -> None:
                self.scores[path] -= seen(gradient * value).float()

            masked.register_hook(see)
        return masked


@contextmanager
def moving(found: Mapping[str, Matrix], masks: Masks, scores: Scores, after_step: Callable[[], None]) -> Iterator[None]:
    """While training, weights are used masked, kept whole, and scored by how they move; at the end the mask stays."""
    for one in found.values():
        parametrize.register_parametrization(one.module, "weight", StraightThrough(one, masks, scores))
    own = {id(one.module.parametrizations.weight.original) for one in found.values()}

    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(weight) in own for group in optimizer.param_groups for weight in group["params"]):
            after_step()

    handle = register_optimizer_step_post_hook(step)
    try:
        yield
    finally:
        handle.remove()
        for one in found.values():
            parametrize.remove_parametrizations(one.module, "weight", leave_parametrized=True)


@torch.no_grad()
def _zero(found: Mapping[str, Matrix], masks: Masks) -> None:
    for path, mask in masks.items():
        found[path].weight.masked_fill_(~found[path].seen(mask), 0.0)


# What it comes to


@dataclass(frozen=True, kw_only=True)
class Report:
    """What pruning left. Work and storage are of the prunable matrices, work as a share of the dense ones'.

    Args:
        sparsity: the share of zeros of each matrix that is left, by path.
        prunable: the share of the prunable weights that are zero or gone.
        total: the same number of weights as a share of all the model's.
        dense: bytes of what is left, zeros included.
        bitmask: bytes of the non-zeros and a bit for every weight.
        csr: bytes of the non-zeros with a 32-bit column each, and of the rows' beginnings.
        theoretical: multiplications by what is not zero.
        realised: multiplications that dense kernels do: only what was cut out is saved.
    """

    sparsity: dict[str, float]
    prunable: float
    total: float
    dense: int
    bitmask: int
    csr: int
    theoretical: float
    realised: float


def report(model: PreTrainedModel, dense: "Sizes | None" = None, *, embeddings: bool = False) -> Report:
    """How sparse a model is.

    Args:
        dense: the sizes of the model before; none = of the model as it is.
        embeddings: the token table counts as prunable.
    """
    found = matrices(model, embeddings=embeddings)
    dense = dense or sizes(model, embeddings=embeddings)
    left = used = entries = size = bitmask = csr = 0
    sparsity = {}
    for path, one in found.items():
        values = one.values
        nonzero, count, width = int(values.count_nonzero()), values.numel(), values.element_size()
        sparsity[path] = 1 - nonzero / count
        left, size = left + nonzero, size + count * width
        if not isinstance(one.module, nn.Embedding):  # a table is looked up
            used, entries = used + nonzero, entries + count
        bitmask += math.ceil(count / 8) + nonzero * width
        csr += nonzero * (width + 4) + 4 * (len(values) + 1)
    return Report(
        sparsity=sparsity,
        prunable=1 - left / dense.prunable,
        total=(dense.prunable - left) / dense.total,
        dense=size,
        bitmask=bitmask,
        csr=csr,
        theoretical=used / dense.multiplied,
        realised=entries / dense.multiplied,
    )


@dataclass(frozen=True)
class Sizes:
    """How many weights can be pruned, how many there are, and how many of the prunable a token is multiplied by."""

    prunable: int
    total: int
    multiplied: int


def sizes(model: PreTrainedModel, *, embeddings: bool = False) -> Sizes:
    """Tied weights count once."""
    prunable, multiplied = (
        sum(one.values.numel() for one in matrices(model, embeddings=tables).values()) for tables in (embeddings, False)
    )
    return Sizes(prunable, sum(parameter.numel() for parameter in model.parameters()), multiplied)


# The method


class Prune(Modifier):
    """Set the lowest scores to zero, and cut out neurons, heads and layers that are zero.

    Args:
        score: see the module. Movement is learnt while training: gradual only.
        scope: scores are compared in the whole model ("global"), in each matrix or layer ("layer"), or in each "row";
            none = row for wanda, global for whole layers, else layer.
        structure: "unstructured", a pattern such as "2:4" (2 of 4 neighbours in a row stay), "block", "neuron", "head"
            or "layer".
        amount: the share that goes; 0.5 by default. A pattern has its own.
        block: the side of a block's square; none = 4.
        schedule: "one-shot"; "iterative", in `rounds` with training between them; "gradual", while training. A whole
            layer goes in one shot.
        rounds: of the iterative schedule, and in which the zeros of the gradual one grow; none = 8.
        after: "finetune" trains what is left, the zeros staying zero.
        embeddings: prune the token table too, single weights only.
        batches: calibration batches, where the score reads data; none = 4.
        steps: of all training together; none = as the data's settings say, as for the next two.
        learning_rate: the highest of the schedule.
        batch_size: rows a step, and rows of a calibration batch.
    """

    def __init__(
        self,
        *,
        score: Score = "magnitude",
        scope: Scope | None = None,
        structure: str = "unstructured",
        amount: float | None = None,
        block: int | None = None,
        schedule: Schedule | None = None,
        rounds: int | None = None,
        after: After = "none",
        embeddings: bool = False,
        batches: int | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        for name, value, kind in (
            ("score", score, Score),
            ("after", after, After),
            ("scope", scope, Scope),
            ("schedule", schedule, Schedule),
        ):
            if value is not None and value not in get_args(kind):
                raise FormwrightError(f"{name} is {value!r}, but it must be {', '.join(get_args(kind))}.")
        self.pattern = parse_pattern(structure)
        if self.pattern is None and structure not in ("unstructured", "block", *PHYSICAL):
            raise FormwrightError(
                f"structure is {structure!r}: use unstructured, a pattern such as 2:4, block, neuron, head or layer."
            )
        if amount is not None and not 0 <= amount < 1:
            raise FormwrightError(f"amount is {amount:g}, but it is the share that goes: from 0 to below 1.")
        for name, number in (("batches", batches), ("rounds", rounds), ("block", block)):
            if number is not None and number < 1:
                raise FormwrightError(f"{name} is {number}, but it must be at least 1.")
        default = "global" if structure == "layer" else "layer"
        if score == "wanda" and structure == "unstructured":
            default = "row"
        self.score, self.structure, self.after, self.embeddings = score, structure, after, embeddings
        self.amount = 0.5 if amount is None else amount
        self.scope: Scope = scope or default  # type: ignore[assignment]
        self.schedule: Schedule = schedule or ("gradual" if score == "movement" else "one-shot")
        self.block, self.rounds, self.batches, self.batch_size = block or 4, rounds or 8, batches or 4, batch_size or 32
        self.trains = self.schedule != "one-shot" or after == "finetune"  # type: ignore[misc]
        self.simulated = structure not in PHYSICAL  # type: ignore[misc]
        reads, single = score in INPUTS, structure == "unstructured"
        at_once = self.pattern is not None or structure == "layer"
        for wrong, reason in (
            (self.pattern and (scope or amount is not None), "a pattern says how many go: leave scope and amount out"),
            (at_once and self.schedule != "one-shot", f"{structure} goes in one shot: leave schedule and movement out"),
            (structure == "layer" and (self.scope != "global" or reads), "layers are compared with each other by their "
             "weights: leave scope out, and take another score than wanda or sparsegpt"),
            (score == "movement" and self.schedule != "gradual", "movement is learnt while training: leave schedule "
             "out, or write gradual"),
            (reads and self.schedule == "gradual", f"{score} reads layer by layer, not while training: use iterative"),
            (reads and self.scope == "global", f"{score} goes layer by layer: use scope=layer"),
            (score == "sparsegpt" and not (single or self.pattern), "sparsegpt makes up for single weights: use "
             "unstructured or a pattern"),
            (self.scope == "row" and not single, "only single weights are compared in a row: leave scope out"),
            (embeddings and (reads or score == "movement" or not single), "the token table loses single "
             "weights, by a score of its weights or gradients: leave embeddings out"),
            (block is not None and structure != "block", "block is for structure=block: leave it out"),
            (rounds is not None and self.schedule == "one-shot", "one shot has no rounds: leave them out"),
            (batches is not None and not reads and score not in GRADIENTS, f"{score} reads no data: leave batches out"),
            ((steps or learning_rate) and not self.trains, "nothing is trained: write after=finetune, or leave steps "
             "and learning_rate out"),
        ):  # fmt: skip
            if wrong:
                raise FormwrightError(f"prune: {reason}.")
        self.budget = Budget(steps=steps, learning_rate=learning_rate, batch_size=batch_size)
        self.rows: list[dict[str, Tensor]] = []
        self.masks: Masks = {}
        self.scores: Scores = {}
        self.gone: dict[int, list[int]] = {}
        self.dense: Sizes | None = None
        self.report: Report | None = None

    # The acts

    def check(self, model: PreTrainedModel) -> None:
        found = matrices(model, embeddings=self.embeddings)
        if not found:
            raise FormwrightError(f"{type(model).__name__} has no plain matrices left: prune before quantizing.")
        if self.trains:
            trainable(model, "prune")
        if (self.trains or self.score in GRADIENTS) and not takes_labels(model):
            raise FormwrightError(
                f"{type(model).__name__} computes no loss: prune by magnitude, random, wanda or sparsegpt, in one shot "
                "and with after=none."
            )
        step = self.pattern[1] if self.pattern else self.block if self.structure == "block" else 1
        for path, one in found.items():
            sides = one.values.shape if self.structure == "block" else one.values.shape[1:]
            if any(side % step for side in sides):
                raise FormwrightError(
                    f"{path} is {' x '.join(map(str, one.values.shape))}, which does not divide into groups of {step}: "
                    "choose a smaller group."
                )
        layers = describe(model).layers
        if self.structure in ("neuron", "head") and not any(units(one, self.structure) for one in layers):
            raise FormwrightError(f"{type(model).__name__} has no {self.structure}s left to prune.")

    def calibrate(self, model: PreTrainedModel, data: Data) -> None:  # noqa: ARG002 - read when it is pruned
        if self.score in GRADIENTS or self.score in INPUTS:
            labels = self.score in GRADIENTS
            self.rows = list(data.batches(self.batches, batch_size=self.batch_size, labels=labels))

    def apply(self, model: PreTrainedModel) -> None:
        self.dense = sizes(model, embeddings=self.embeddings)
        found = matrices(model, embeddings=self.embeddings)
        self.masks = {path: torch.ones_like(one.values, dtype=torch.bool) for path, one in found.items()}
        if self.schedule != "gradual":
            self.cut(model, self.reached(1))
        if self.structure == "layer":
            remove_layers(model, self.gone)
            self.masks = {}

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        if not self.trains:
            return
        found = matrices(model, embeddings=self.embeddings)
        settings = self.budget.settings(data)
        if self.schedule == "gradual":
            self.grow(model, data, found)
            return
        rounds = self.rounds if self.schedule == "iterative" else 1
        runs = rounds - 1 + (self.after == "finetune")
        for number in range(runs):
            steps = settings.steps * (number + 1) // runs - settings.steps * number // runs
            if steps:
                with fixed({path: found[path] for path in self.masks}, self.masks):
                    fit(model, data.task, replace(settings, steps=steps))
                model.eval()
            if number + 2 <= rounds:
                self.cut(model, self.reached(number + 2))

    def finalize(self, model: PreTrainedModel) -> None:
        if self.structure == "neuron":
            remove_neurons(model, self.gone)
        elif self.structure == "head":
            remove_heads(model, self.gone)
        for one in matrices(model, embeddings=self.embeddings).values():
            if not one.weight.any():
                one.module.emptied = True  # kept with the model, so that later training does not take it for a new one
        self.report = report(model, self.dense, embeddings=self.embeddings)
        self.rows, self.scores = [], {}

    # How they do it

    def reached(self, number: int) -> float:
        """The share that is gone after a round: each round prunes the same share of what was left."""
        return 1 - (1 - self.amount) ** (number / self.rounds) if self.schedule == "iterative" else self.amount

    def cut(self, model: PreTrainedModel, amount: float) -> None:
        """Score the model as it is and zero the lowest."""
        found = matrices(model, embeddings=self.embeddings)
        if self.score not in INPUTS:
            self.settle(model, found, self.measure(model, found), amount)
            return
        for layer in describe(model).layers:  # the layers before are pruned already
            inside = {path: one for path, one in found.items() if path.startswith(f"{layer.path}.")}
            products = input_products(model, layer, inside, self.rows, full=self.score == "sparsegpt")
            inside = {path: inside[path] for path in products}
            if self.score == "wanda":
                scores = {path: one.values.float().abs() * products[path].sqrt() for path, one in inside.items()}
                self.settle(model, inside, scores, amount, (layer,))
                continue
            for path, one in inside.items():
                made, self.masks[path] = sparsegpt(
                    one.values, products[path], amount, scope=self.scope, pattern=self.pattern, kept=self.masks[path]
                )  # fmt: skip
                one.weight.data.copy_(one.seen(made))

    def measure(self, model: PreTrainedModel, found: Mapping[str, Matrix]) -> Scores:
        if self.score in GRADIENTS:
            return gradient_scores(model, found, self.rows, self.score)
        if self.score == "random":
            return {path: torch.rand_like(one.values, dtype=torch.float32) for path, one in found.items()}
        return {path: one.values.float().abs() for path, one in found.items()}

    def settle(
        self,
        model: PreTrainedModel,
        found: Mapping[str, Matrix],
        scores: Scores,
        amount: float,
        layers: tuple[Layer, ...] | None = None,
        *,
        nested: bool = True,
    ) -> None:
        """Choose what goes, and zero it unless nothing is final yet.

        Args:
            layers: whose units are compared; none = all.
            nested: what is gone stays gone, and is zero; else masks alone are chosen anew.
        """
        if nested and self.structure not in ("layer", "neuron", "head"):
            scores = {path: one.masked_fill(~self.masks[path], -torch.inf) for path, one in scores.items()}
        if self.structure == "layer":
            self.gone = {index: [] for index in lowest_layers(model, scores, amount)}
            return
        if self.structure in ("neuron", "head"):
            every = describe(model).layers if layers is None else layers
            parts = [part for layer in every if (part := units(layer, self.structure)) is not None]
            self.masks.update(self.choose_units(parts, scores, amount, nested=nested))
        elif self.pattern is not None:
            self.masks.update({path: keep_pattern(one, *self.pattern) for path, one in scores.items()})
        elif self.structure == "block":
            tiles = keep_together({path: tiled(one, self.block) for path, one in scores.items()}, amount, self.scope)
            spread = {path: one.repeat_interleave(self.block, 0) for path, one in tiles.items()}
            self.masks.update({path: one.repeat_interleave(self.block, 1) for path, one in spread.items()})
        else:
            self.masks.update(keep_together(scores, amount, self.scope))
        if nested:
            _zero(found, {path: self.masks[path] for path in found})

    def choose_units(self, parts: list[Units], scores: Scores, amount: float, *, nested: bool) -> Masks:
        """Neurons or heads; the best of each layer stays, so that no layer is left without."""
        means = []
        for part in parts:
            mean = part.mean(scores)
            if nested and part.layer in self.gone:
                past = sorted({unit // part.heads for unit in self.gone[part.layer]})
                mean[past] = -torch.inf
            mean[mean.argmax()] = torch.inf
            means.append(mean)
        if self.scope == "global":
            flat = torch.cat(means)
            count = min(round(amount * len(flat)), len(flat) - len(means))
            kept = keep(flat, count).split([part.count for part in parts])
        else:
            kept = [keep(mean, min(round(amount * len(mean)), len(mean) - 1)) for mean in means]
        found: Masks = {}
        for part, one in zip(parts, kept, strict=True):
            gone = (~one).nonzero().flatten().tolist()
            self.gone[part.layer] = [unit * part.heads + i for unit in gone for i in range(part.heads)]
            found |= part.masks(one, scores)
        return found

    def grow(self, model: PreTrainedModel, data: Data, found: Mapping[str, Matrix]) -> None:
        """Train while the zeros grow along the cubic, in `rounds` steps."""
        settings = self.budget.settings(data)
        ramp = max(1, round(settings.steps * (RAMP if self.after == "finetune" else 1.0)))
        rounds = min(self.rounds, ramp)
        turns = {ramp * number // rounds: number for number in range(1, rounds + 1)}
        self.scores = {path: torch.zeros_like(one.values, dtype=torch.float32) for path, one in found.items()}
        drawn = self.measure(model, found) if self.score == "random" else {}
        moves, step = self.score == "movement", 0

        def after_step() -> None:
            nonlocal step
            step += 1
            if step not in turns:
                return
            amount = cubic(turns[step], rounds, self.amount)
            if moves:
                self.settle(model, found, self.scores, amount, nested=False)
                return
            if self.score in GRADIENTS:
                scores = {path: one.abs() for path, one in self.scores.items()}
            else:
                scores = drawn or self.measure(model, found)
            self.settle(model, found, scores, amount)
            for one in self.scores.values():
                one.zero_()

        gathered = self.scores if self.score in GRADIENTS else None
        with (
            moving(found, self.masks, self.scores, after_step)
            if moves
            else fixed(found, self.masks, scores=gathered, after_step=after_step)
        ):
            fit(model, data.task, settings)


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
