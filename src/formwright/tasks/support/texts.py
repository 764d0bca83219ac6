"""What the text classification tasks share: labelled texts of unequal length, their vocabulary, and a naive Bayes
baseline."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from formwright.errors import FormwrightError
from formwright.tasks.base import ACCURACY, LOSS, Batch, Defaults, Task, share_of_classes
from formwright.tasks.support.files import column
from formwright.tasks.support.words import PAD, byte_pairs, words
from formwright.training import Settings


class Texts(Dataset):
    """Token numbers of texts, each as long as it is. A batch is padded on the right to its longest.

    `lengths` lets training put texts of similar length into one batch.
    """

    def __init__(self, tokens: Sequence[Tensor], labels: Int[Tensor, " rows"], pad: int) -> None:
        self.tokens, self.labels, self.pad = list(tokens), labels, pad
        self.lengths = torch.tensor([len(text) for text in self.tokens])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        text = self.tokens[index].long()
        return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return padded([self[i] for i in indices], self.pad)

    def select(self, rows: Tensor) -> "Texts":
        return Texts([self.tokens[i] for i in rows.tolist()], self.labels[rows], self.pad)


def padded(rows: Batch | Sequence[Batch], pad: int) -> Batch:
    """One batch of rows of unequal length; a batch that was fetched as one passes through."""
    if isinstance(rows, Mapping):
        return dict(rows)
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([row["attention_mask"] for row in rows], batch_first=True),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


def labelled(table: Any, text: str, label: str, path: str | Path) -> tuple[list[str], list[str | int]]:
    """Texts and labels of two columns of a table.

    Raises:
        FormwrightError: a column is missing, a label is, a text is no text, or the labels are numbers with fractions.
    """
    told, labels = column(table, text, path, "text").fillna("").tolist(), labels_of(table, label, path)
    strange = next((i for i, value in enumerate(told) if not isinstance(value, str)), None)
    if strange is not None:
        raise FormwrightError(
            f"{path}: the column {text!r} holds no text in row {strange}, but {told[strange]!r}: choose another "
            "with text=."
        )
    return told, labels


def labels_of(table: Any, label: str, path: str | Path) -> list[str | int]:
    """The labels of a column: names or whole numbers.

    Raises:
        FormwrightError: the column is missing, a label is, or the labels are numbers with fractions.
    """
    labels = column(table, label, path, "label")
    if labels.isna().any():
        first = int(labels.isna().to_numpy().argmax())
        raise FormwrightError(
            f"{path}: {int(labels.isna().sum())} of {len(labels)} labels are missing, the first in row {first}: "
            "remove those rows or label them."
        )
    values = labels.tolist()
    for i, value in enumerate(values):
        if isinstance(value, float):
            if not value.is_integer():
                raise FormwrightError(
                    f"{path}: the label in row {i} is {value}, but labels are names or whole numbers."
                )
            values[i] = int(value)
    return values


def classes_of(labels: Sequence[str | int], path: str | Path) -> list[str | int]:
    """The labels there are, in order.

    Raises:
        FormwrightError: there is only one.
    """
    classes = sorted(set(labels), key=lambda value: (isinstance(value, str), value))
    if len(classes) < 2:
        raise FormwrightError(f"{path}: every label is {classes[0]!r}, so there is nothing to tell apart.")
    return classes


def text_task(
    *,
    name: str,
    train: tuple[Sequence[str], Sequence[str | int]],
    test: tuple[Sequence[str], Sequence[str | int]],
    tokenizer: str,
    vocab: int,
    length: int,
    validation: float,
    path: str | Path,
    class_names: Sequence[str] | None = None,
    settings: Settings | None = None,
) -> Task:
    """A text classification task of what was read.

    Args:
        tokenizer: "word", "bpe", both learnt on the training texts, or the folder of a model that holds one.
        vocab: tokens to learn.
        length: tokens kept of a text, from its beginning.
        class_names: of the classes in order, if the labels are numbers.
    """
    if vocab < 300 or length < 1:
        raise FormwrightError(f"vocab and length are {vocab} and {length}, but they must be at least 300 and 1.")
    if not 0 <= validation < 1:
        raise FormwrightError(
            f"validation is {validation}, but it is the share of the training texts set aside: below 1."
        )
    classes = classes_of(train[1], path)
    number = {label: i for i, label in enumerate(classes)}
    unknown = sorted({str(label) for label in test[1] if label not in number})
    if unknown:
        raise FormwrightError(f"{path}: the test labels {', '.join(unknown)} do not occur in training.")
    encode, made, size, pad = reader(tokenizer, train[0], vocab, length)
    rows = {
        split: Texts(encode(texts), torch.tensor([number[label] for label in labels]), pad)
        for split, (texts, labels) in {"train": train, "test": test}.items()
    }
    learnt, aside = rows["train"], None
    if validation:
        order = torch.randperm(len(learnt), generator=torch.Generator().manual_seed(0))
        count = max(1, round(validation * len(learnt)))
        learnt, aside = learnt.select(order[count:].sort().values), learnt.select(order[:count].sort().values)
    shown = [str(label) for label in classes] if class_names is None else list(class_names)

    def baselines() -> dict[str, dict[str, float]]:
        found = share_of_classes(learnt.labels, rows["test"].labels, len(classes))
        found["naive Bayes"] = naive_bayes(learnt, rows["test"], size, len(classes))
        return found

    usual = Settings(steps=440, batch_size=64, learning_rate=1e-3, weight_decay=0.05)
    return Task(
        name=name,
        head="sequence-classification",
        model_config={
            "architecture": "encoder",
            "vocab_size": size,
            "max_position_embeddings": length,
            "pad_token_id": pad,
            "pooling": "mean",
            "num_labels": len(classes),
            "id2label": dict(enumerate(shown)),
            "label2id": {label: i for i, label in enumerate(shown)},
        },
        train=learnt,
        validation=aside,
        test=rows["test"],
        metrics=(ACCURACY, LOSS),
        collate=lambda rows: padded(rows, pad),
        baselines=baselines,
        defaults=Defaults(
            settings=settings or usual,
            model={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "init": "fan-in",
                "position": "rope",
                "dropout": 0.1,
            },
        ),
        tokenizer=made,
    )


def reader(tokenizer: str, texts: Sequence[str], vocab: int, length: int) -> tuple[Any, Any, int, int]:
    """How texts become numbers: the function, the tokenizer, how many tokens there are, and the padding token."""
    if tokenizer in ("word", "bpe"):
        made = words(texts, vocab) if tokenizer == "word" else byte_pairs(texts, vocab, (PAD,))

        def encode(texts: Sequence[str]) -> list[Tensor]:
            found = made.encode_batch_fast(list(texts), add_special_tokens=False)
            return [torch.tensor(text.ids[:length] or [made.token_to_id(PAD) + 1], dtype=torch.int32) for text in found]

        return encode, made, made.get_vocab_size(), made.token_to_id(PAD)
    if not Path(tokenizer).expanduser().is_dir():
        raise FormwrightError(
            f"tokenizer is {tokenizer!r}, but it must be word, bpe, or the folder of a model that holds a tokenizer."
        )
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(str(Path(tokenizer).expanduser()))
    if given.pad_token_id is None:
        raise FormwrightError(f"The tokenizer in {tokenizer} has no padding token, which texts of unequal length need.")

    def encode_given(texts: Sequence[str]) -> list[Tensor]:
        found = given(list(texts), truncation=True, max_length=length)["input_ids"]
        return [torch.tensor(ids or [given.pad_token_id], dtype=torch.int32) for ids in found]

    return encode_given, given, len(given), given.pad_token_id


def naive_bayes(train: Texts, test: Texts, vocab: int, classes: int) -> dict[str, float]:
    """Multinomial naive Bayes on which tokens a text holds, counts + 1."""

    def bags(rows: Texts) -> tuple[Tensor, Tensor]:
        pairs = [torch.unique(text) for text in rows.tokens]
        return torch.cat(pairs).long(), torch.repeat_interleave(
            torch.arange(len(pairs)), torch.tensor([len(p) for p in pairs])
        )

    tokens, texts = bags(train)
    counts = (
        torch.bincount(train.labels[texts] * vocab + tokens, minlength=classes * vocab).view(classes, vocab).double()
        + 1
    )
    weights = (counts / counts.sum(1, keepdim=True)).log()
    prior = (torch.bincount(train.labels, minlength=classes).double() + 1).log()
    tokens, texts = bags(test)
    scores: Float[Tensor, "rows classes"] = prior.expand(len(test), -1).clone().index_add_(0, texts, weights.T[tokens])
    scores = scores - scores.logsumexp(1, keepdim=True)
    loss = float(F.nll_loss(scores, test.labels))
    return {
        "accuracy": float((scores.argmax(1) == test.labels).double().mean()),
        "loss": loss if math.isfinite(loss) else math.inf,
    }


def divide(
    texts: Sequence[str], labels: Sequence[str | int], share: float, seed: int, path: str | Path
) -> tuple[Any, Any]:
    """Training and test texts of one file, after texts that occur twice were dropped (the first stays)."""
    if not 0 < share < 1:
        raise FormwrightError(f"share is {share}, but it is the share of the texts to test on: above 0 and below 1.")
    first: dict[str, str | int] = {}
    for text, label in zip(texts, labels, strict=True):
        first.setdefault(text, label)
    kept = list(first.items())
    count = max(1, round(share * len(kept)))
    if count >= len(kept):
        raise FormwrightError(f"{path} holds {len(kept)} different texts, too few to train on some and test on others.")
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [kept[i] for i in order[count:]], [kept[i] for i in order[:count]]
    return tuple(([text for text, _ in part], [label for _, label in part]) for part in parts)  # type: ignore[return-value]
