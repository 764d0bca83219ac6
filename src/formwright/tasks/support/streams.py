"""A text as parallel streams: for models that remember, whose batches must go on where the last ones ended."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import IterableDataset

from formwright.errors import FormwrightError
from formwright.tasks.base import IGNORED, Batch, Task, count_cells
from formwright.tasks.support.language import Windows


class Streams(IterableDataset):
    """A text cut into equally long streams, each read segment by segment, all streams' first segments first.

    A batch of as many rows as there are streams holds the next segment of each. Iterating keeps that order, which is
    why this is no dataset that a sampler may shuffle. Every symbol but the first is told exactly once: labels are the
    segment's symbols and the one after it.

    Args:
        symbols: the text as numbers.
        streams: how many; the batch size.
        length: symbols of a segment.
    """

    def __init__(self, symbols: Int[Tensor, " n"], *, streams: int, length: int) -> None:
        if streams < 1 or length < 1 or len(symbols) <= streams:
            raise FormwrightError(
                f"A text of {len(symbols)} symbols cannot be cut into {streams} streams of segments of {length}: both "
                "are at least 1, and a stream needs a symbol to tell."
            )
        self.symbols, self.streams, self.length = symbols, streams, length
        self.told = -(-(len(symbols) - 1) // streams)  # symbols a stream tells; the last one may have fewer

    def __len__(self) -> int:
        return self.streams * -(-self.told // self.length)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self), self.streams):
            rows = self.__getitems__(range(first, first + self.streams))
            yield from ({name: column[i] for name, column in rows.items()} for i in range(self.streams))

    def __getitem__(self, index: int) -> Batch:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(list(indices)) % len(self)
        stream, begin = rows % self.streams, rows // self.streams * self.length
        within = begin[:, None] + torch.arange(self.length + 1)
        place = stream[:, None] * self.told + within
        last = len(self.symbols) - 1
        labels = self.symbols[place.clamp(max=last)].long()
        inputs = labels[:, :-1].clone()
        labels[:, 1:][(within[:, 1:] > self.told) | (place[:, 1:] > last)] = IGNORED
        return {"input_ids": inputs, "labels": labels, "segments": torch.stack([stream, begin], 1)}


def streamed(task: Task, *, streams: int, length: int) -> Task:
    """A language modelling task over the same texts, in streams. Train and evaluate with batch_size=streams.

    Args:
        task: of a text in windows, as tinyshakespeare, wikitext2, char-lm and bpe-lm.
        streams: rows of a batch.
        length: symbols of a segment.
    """
    parts = {name: getattr(task, name) for name in ("train", "validation", "test")}
    if not all(part is None or isinstance(part, Windows) for part in parts.values()):
        raise FormwrightError(
            f"{task.name} is no text in windows: only a language modelling task can be read in streams."
        )
    cut = {
        name: None if part is None else Streams(part.symbols, streams=streams, length=length)
        for name, part in parts.items()
    }
    return replace(
        task,
        **cut,
        score=lambda logits, batch: count_cells(logits, batch["labels"][:, 1:]),
        model_config={**task.model_config, "max_position_embeddings": length},
    )
