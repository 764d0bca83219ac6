"""text-classification: a class for each text of your own CSV, TSV, Parquet, JSON-lines file or dataset saved by
`datasets`."""

from formwright.errors import FormwrightError
from formwright.tasks.base import Task
from formwright.tasks.support.files import read_table
from formwright.tasks.support.texts import divide, labelled, text_task


def task(
    *,
    file: str,
    test: str | None = None,
    text: str = "text",
    label: str = "label",
    share: float = 0.2,
    seed: int = 0,
    tokenizer: str = "word",
    vocab: int = 8000,
    length: int = 256,
    validation: float = 0.0,
) -> Task:
    """Accuracy and loss; the baselines show what the commonest class and naive Bayes reach.

    Args:
        file: labelled texts.
        test: a second file to test on, whose texts are not trained on if the first holds them too; without one, a
            share of the first, after duplicates were dropped.
        text: the column of the texts.
        label: the column of the labels, names or whole numbers.
        share: of the texts to test on, if there is no second file.
        seed: of that split.
        tokenizer: "word", "bpe", or the folder of a model that holds a tokenizer.
        vocab: tokens to learn from the training texts.
        length: tokens kept of a text.
        validation: share of the training texts set aside.
    """
    texts, labels = labelled(read_table(file), text, label, file)
    if test is None:
        train, read = divide(texts, labels, share, seed, file)
    else:
        read = labelled(read_table(test), text, label, test)
        held_out = set(read[0])
        if held_out <= set(texts):
            raise FormwrightError(f"Every text of {test} stands in {file} too, so nothing is left to test on.")
        kept = [pair for pair in zip(texts, labels, strict=True) if pair[0] not in held_out]
        if not kept:
            raise FormwrightError(f"Every text of {file} stands in {test} too, so nothing is left to train on.")
        train = [text for text, _ in kept], [label for _, label in kept]
    return text_task(
        name="text-classification",
        train=train,
        test=read,
        tokenizer=tokenizer,
        vocab=vocab,
        length=length,
        validation=validation,
        path=file,
    )
