"""What the language modelling tasks share: symbols of a text, windows over them, n-gram baselines."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from formwright.errors import FormwrightError
from formwright.tasks.base import ACCURACY, BITS, IGNORED, LOSS, Batch, Defaults, Task, score_next
from formwright.tasks.support.files import decode, read_bytes
from formwright.training import Settings
from formwright.training.items import Items

Unit = Literal["bytes", "characters"]


class Windows(Dataset):
    """Windows of L symbols, beginning at given places. Every symbol but a window's first is scored, each once at most.

    Args:
        symbols: the text as numbers.
        length: L.
        starts: where windows begin.
        seen: how many symbols from its beginning on the last window does not score again.
    """

    def __init__(self, symbols: Int[Tensor, " n"], length: int, starts: Int[Tensor, " w"], seen: int = 0) -> None:
        self.symbols, self.length, self.starts, self.seen = symbols, length, starts, seen

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Batch:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        places = torch.as_tensor(indices) % len(self)
        tokens = self.symbols[self.starts[places][:, None] + torch.arange(self.length)].long()
        last = (places == len(self) - 1).nonzero()[:, 0]
        labels = tokens
        if self.seen and len(last):
            labels = tokens.clone()
            labels[last, : self.seen] = IGNORED
        return {"input_ids": tokens, "labels": labels}


def every_window(symbols: Int[Tensor, " n"], length: int) -> Windows:
    """A window from every place: in shuffled order, random windows."""
    return Windows(symbols, length, torch.arange(len(symbols) - length + 1))


def tiled(symbols: Int[Tensor, " n"], length: int) -> Windows:
    """Windows that score every symbol but the first exactly once: each begins with the last one's last symbol."""
    starts = torch.arange(0, len(symbols) - length + 1, length - 1)
    scored = int(starts[-1]) + length
    if scored == len(symbols):
        return Windows(symbols, length, starts)
    last = len(symbols) - length
    return Windows(symbols, length, torch.cat([starts, torch.tensor([last])]), seen=scored - last)


def read_symbols(file: str | Path | None) -> bytes:
    """The text of a file; without one, the English of Python's own manual."""
    if file is not None:
        return read_bytes(file)
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def cut(content: bytes, share: float, unit: Unit, path: str | Path | None) -> tuple[bytes, bytes]:
    """The text before and after the place where its last `share` begins; never inside a character."""
    if not 0 < share < 1:
        raise FormwrightError(
            f"test is {share}, but it is the share of the text, from its end, to test on: above 0 and below 1."
        )
    if unit == "bytes":
        place = int(len(content) * (1 - share))
        return content[:place], content[place:]
    text = decode(content, path or "the text")
    place = int(len(text) * (1 - share))
    return text[:place].encode(), text[place:].encode()


def alphabet(parts: Sequence[bytes], unit: Unit, path: str | Path | None) -> tuple[list[Tensor], list[str]]:
    """Each part as numbers, and what the numbers stand for: every symbol of all the parts, in order.

    The alphabet is all that training learns of the test text; without it a symbol met there alone would cost nothing.
    """
    if unit == "bytes":
        codes = [torch.frombuffer(bytearray(part), dtype=torch.uint8).int() for part in parts]
    else:
        codes = [torch.tensor([ord(c) for c in decode(part, path or "the text")], dtype=torch.int32) for part in parts]
    known = torch.unique(torch.cat(codes))
    numbers = [torch.searchsorted(known, code).int() for code in codes]
    return numbers, [chr(code) for code in known.tolist()]


def language_task(
    *,
    name: str,
    train: Int[Tensor, " m"],
    test: Int[Tensor, " n"],
    vocab_size: int,
    length: int,
    validation: float,
    bytes_a_symbol: float,
    context: bool,
    settings: Settings,
    model: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Task:
    """A causal language modelling task over two texts as numbers.

    Args:
        context: the test text follows the training text, whose last symbol is the context of its first.
        bytes_a_symbol: of the test text, for bits a byte.
    """
    if length < 2:
        raise FormwrightError(f"length is {length}, but a window needs a symbol to read and one to tell: at least 2.")
    if not 0 <= validation < 1:
        raise FormwrightError(
            f"validation is {validation}, but it is the share of the training text set aside: below 1."
        )
    learnt = train[: len(train) - round(validation * len(train))]
    aside = train[len(learnt) :]
    read = torch.cat([train[-1:], test]) if context else test
    for what, part in (("training text", learnt), ("validation text", aside), ("test text", read)):
        if len(part) < length and not (validation == 0 and part is aside):
            raise FormwrightError(
                f"The {what} of {name} has {len(part)} symbols, fewer than one window: choose length "
                f"{max(2, len(part))} or less, "
                "or a longer text."
            )

    def summary(items: Items) -> dict[str, float]:
        return told(items.mean_loss(), items.accuracy(), bytes_a_symbol)

    return Task(
        name=name,
        head="causal-lm",
        model_config={
            "architecture": "decoder",
            "vocab_size": vocab_size,
            "max_position_embeddings": length,
            "pad_token_id": None,
        },
        train=every_window(learnt, length),
        validation=tiled(aside, length) if validation else None,
        test=tiled(read, length),
        metrics=(LOSS, BITS, ACCURACY),
        score=score_next,
        summary=summary,
        baselines=lambda: ngrams(learnt.long(), read.long(), vocab_size, bytes_a_symbol),
        defaults=Defaults(settings=settings, model=dict(SMALL) | dict(model or {})),
        tokenizer=tokenizer,
    )


SMALL: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "init": "normal",
    "position": "rope",
}


def told(loss: float, accuracy: float, bytes_a_symbol: float) -> dict[str, float]:
    return {"loss": loss, "bits_per_byte": loss / math.log(2) / bytes_a_symbol, "accuracy": accuracy}


def ngrams(
    train: Int[Tensor, " m"], test: Int[Tensor, " n"], symbols: int, bytes_a_symbol: float
) -> dict[str, dict[str, float]]:
    """Uniform, unigram (counts + 1) and bigram (Witten-Bell: as much weight for the unigram as there are different
    followers)."""
    before, after = test[:-1], test[1:]
    counts = torch.bincount(train, minlength=symbols).double() + 1
    single = counts / counts.sum()
    pairs, times = torch.unique(train[:-1] * symbols + train[1:], return_counts=True)  # never symbols x symbols cells
    first = pairs // symbols
    total = torch.zeros(symbols, dtype=torch.double).index_add_(0, first, times.double())
    followers = torch.bincount(first, minlength=symbols).double().clamp(min=1)
    asked = before * symbols + after
    place = torch.searchsorted(pairs, asked).clamp(max=len(pairs) - 1)
    met = torch.where(pairs[place] == asked, times[place].double(), 0.0)
    double = (met + followers[before] * single[after]) / (total[before] + followers[before])
    ranked = torch.full((symbols,), -1).scatter_reduce(0, first, times * symbols + pairs % symbols, "amax")
    best = torch.where(ranked < 0, counts.argmax(), ranked % symbols)
    return {
        "uniform": told(math.log(symbols), 1 / symbols, bytes_a_symbol),
        "unigram": told(
            float(-single[after].log().mean()), float((after == counts.argmax()).double().mean()), bytes_a_symbol
        ),
        "bigram": told(float(-double.log().mean()), float((best[before] == after).double().mean()), bytes_a_symbol),
    }


def character_task(
    *,
    name: str,
    train: bytes,
    test: bytes,
    unit: Unit,
    length: int,
    validation: float,
    context: bool,
    path: str | Path | None,
) -> Task:
    """Bytes or characters of two texts."""
    (learnt, read), known = alphabet([train, test], unit, path)
    return language_task(
        name=name,
        train=learnt,
        test=read,
        vocab_size=len(known),
        length=length,
        validation=validation,
        bytes_a_symbol=len(test) / max(1, len(read)),
        context=context,
        settings=Settings(steps=900, batch_size=16, learning_rate=8e-3, weight_decay=0.1, betas=(0.9, 0.95)),
    )
