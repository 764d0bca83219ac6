"""Training as a step of a recipe, and the classifier an encoder needs before it can have a recipe.

    finetune     the whole model on the task's own loss; what was pruned to zero stays zero
    with_head    an encoder becomes a classifier of the given classes; the new head is drawn, not yet trained
    ensure_head  the same, trained on the task; a model that has its head passes through

All goes through `formwright.training.fit`.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from formwright.compress.modifier import Data, Modifier
from formwright.compress.structure import Adopted, load
from formwright.errors import FormwrightError
from formwright.training import Settings, fit, seeded
from formwright.training.evaluation import Trainable


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long and how fast a step trains; what is None is as the data's settings say.

    Args:
        steps: optimizer steps.
        epochs: the same, counted in passes over the training rows.
        learning_rate: the highest of the schedule.
        batch_size: rows a step.
    """

    steps: int | None = None
    epochs: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise FormwrightError(f"steps={self.steps} and epochs={self.epochs} say the same thing twice: leave one.")
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise FormwrightError(f"{name} is {value}, but it must be above 0.")

    def settings(self, data: Data) -> Settings:
        """Of the run: without learning curve or checkpoints, which a step of a recipe has no use for."""
        rows = len(data.task.train)  # type: ignore[arg-type]
        batch_size = self.batch_size or max(1, min(data.settings.batch_size, rows))
        steps = data.settings.steps if self.steps is None else self.steps
        unlabelled = data.kind == "sentence-embedding"
        if self.epochs is not None:
            steps = max(1, round(self.epochs * rows / batch_size))
        return replace(
            data.settings,
            steps=steps,
            batch_size=batch_size,
            learning_rate=self.learning_rate or data.settings.learning_rate,
            # parts of a batch are weighed by their labels, and must be equal
            accumulate=1 if unlabelled or batch_size % data.settings.accumulate else data.settings.accumulate,
            evaluate_every=0,
            save_every=0,
        )


class Finetune(Modifier):
    """Train the whole model on the task.

    Args:
        steps: optimizer steps.
        epochs: instead of steps, passes over the training rows.
        learning_rate: the highest of the schedule.
        batch_size: rows a step.
    """

    trains: ClassVar[bool] = True

    def __init__(
        self,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.budget = Budget(steps=steps, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)

    def check(self, model: PreTrainedModel) -> None:
        trainable(model, "finetune")
        if not takes_labels(model):
            raise FormwrightError(
                f"{type(model).__name__} computes no loss to fine-tune on: use distill, which learns from the original."
            )

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        if data.kind == "sentence-embedding":
            raise FormwrightError(
                "Texts to embed have no labels to fine-tune on: use distill, which learns from the original model."
            )
        with zeros_kept(model):
            fit(model, data.task, self.budget.settings(data))


def trainable(model: nn.Module, step: str) -> None:
    """Raise unless the model has weights that training by small steps can move.

    Raises:
        FormwrightError: all are frozen or integers, or of a dtype in which small steps are lost.
    """
    moved = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not moved:
        raise FormwrightError(f"{step} finds no weights to train: put it before the step that froze them.")
    short = next((one.dtype for one in moved if one.dtype in (torch.float16, torch.bfloat16)), None)
    if short is not None:
        raise FormwrightError(
            f"{step} trains in float32, and this model's weights are {str(short).removeprefix('torch.')}, where small "
            "steps are lost: put it before the step that lowers the precision, or load the model with dtype=float32."
        )


def takes_labels(model: nn.Module) -> bool:
    """Whether the model computes a loss of its own."""
    return "labels" in inspect.signature(model.forward).parameters


@contextmanager
def zeros_kept(model: nn.Module) -> Iterator[None]:
    """While training, entries of matrices that are exactly zero get no gradient, so that a pruned model stays pruned.

    Adam starts without momentum and weight decay shrinks zero to zero, so no gradient is enough. A matrix that is zero
    throughout was pruned if its module is marked `emptied`, as pruning leaves it; else it was not begun and is trained.
    """
    hooks = []
    owners = {weight: module for module in model.modules() for weight in module.parameters(recurse=False)}
    for weight, module in owners.items():
        if weight.requires_grad and weight.ndim > 1:
            kept = weight.detach() != 0
            if not kept.all() and (kept.any() or getattr(module, "emptied", False)):
                hooks.append(weight.register_hook(lambda gradient, kept=kept: gradient * kept))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# The head


class Labelled(Trainable, Protocol):
    """A task with classes: `model_config` holds their `id2label`, `tokenizer` is the model's, if it reads text."""

    @property
    def model_config(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer(self) -> Any: ...


HEADS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}


HEAD = Settings(steps=300, batch_size=16, learning_rate=5e-5, warmup=0.1, weight_decay=0.01)


def with_head(model: PreTrainedModel, labels: Sequence[str], head: str = "sequence-classification") -> PreTrainedModel:
    """A classifier of these labels on the encoder's weights; the head is drawn anew. The given model stays as it is.

    Args:
        head: "sequence-classification" or "image-classification".

    Raises:
        FormwrightError: one label, a changed model, or a family without such a head.
    """
    if len(labels) < 2:
        raise FormwrightError(f"A classifier tells at least 2 classes apart, got {len(labels)}.")
    if isinstance(model, Adopted):
        raise FormwrightError("This model was compressed already: give it a head first, then compress it.")
    auto = HEADS[head]
    if type(model.config) not in auto._model_mapping:
        raise FormwrightError(f"{type(model).__name__} has no {head} head in transformers: choose another model.")
    config = type(model.config).from_dict(
        {
            **model.config.to_dict(),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    )
    made = auto.from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    report = made.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    lost = [name for name in report.missing_keys if not name.startswith("pooler")]  # a pooler belongs to the head
    if lost:
        raise FormwrightError(f"{type(model).__name__} lacks the weight {lost[0]} that a classifier needs.")
    return made.to(model.device).train(model.training)


def is_classifier(model: PreTrainedModel, head: str) -> bool:
    """Whether the model has this head already."""
    known = HEADS[head]._model_mapping
    # a changed model's config is a subclass of its family's
    return any(isinstance(model, known[config]) for config in type(model.config).__mro__ if config in known)


def ensure_head(
    model: PreTrainedModel | str | Path, task: Labelled, settings: Settings | None = None
) -> PreTrainedModel:
    """The classifier of a task's classes: the model itself if it is one, else its encoder with a trained head.

    Args:
        model: a model, or the folder of one.
        task: the classes, and rows to train on.
        settings: of that training, which moves the encoder too.

    Raises:
        FormwrightError: the model is a classifier of other classes, or cannot become one.
    """
    model = model if isinstance(model, PreTrainedModel) else load(model)
    if task.head not in HEADS:
        return model
    names = list(task.model_config["id2label"].values())
    if is_classifier(model, task.head):
        if model.config.num_labels != len(names):
            raise FormwrightError(
                f"The model tells {model.config.num_labels} classes apart and {task.name} has {len(names)}: choose a "
                "model of these classes, or its encoder without the head."
            )
        return model
    settings = settings or replace(HEAD, batch_size=min(HEAD.batch_size, len(task.train)))  # type: ignore[arg-type]
    seeded(settings.seed)
    made = with_head(model, names, task.head)
    if task.tokenizer is not None and getattr(made.config, "pad_token_id", None) is None:
        made.config.pad_token_id = task.tokenizer.pad_token_id  # a decoder finds its last token by it
    trainable(made, "A new head")
    fit(made, task, settings)
    return made
