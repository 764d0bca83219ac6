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

The steps are beside this file: matrices.py (what can be pruned), scores.py (what goes), masked.py (training after it).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from formwright.compress.anatomy import Layer, describe
from formwright.compress.finetune import Budget, takes_labels, trainable
from formwright.compress.modifier import Data, Modifier
from formwright.compress.prune.masked import fixed, moving
from formwright.compress.prune.matrices import (
    Masks,
    Matrix,
    Report,
    Scores,
    Sizes,
    Units,
    matrices,
    report,
    sizes,
    units,
    zero,
)
from formwright.compress.prune.scores import (
    Scope,
    Score,
    cubic,
    gradient_scores,
    input_products,
    keep,
    keep_pattern,
    keep_together,
    lowest_layers,
    parse_pattern,
    sparsegpt,
    tiled,
)
from formwright.compress.surgery import remove_heads, remove_layers, remove_neurons
from formwright.errors import FormwrightError
from formwright.training import fit

Schedule = Literal["one-shot", "iterative", "gradual"]
After = Literal["none", "finetune"]

GRADIENTS = ("snip", "taylor")
INPUTS = ("wanda", "sparsegpt")
PHYSICAL = ("neuron", "head", "layer")
RAMP = 0.7  # the share of a gradual run in which the zeros grow, when training with the final mask follows


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
            zero(found, {path: self.masks[path] for path in found})

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
