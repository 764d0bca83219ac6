"""wikitext2: the next byte of Wikipedia articles; trained on WikiText-2's validation file, tested on the first 200
kB of its test file."""

from pathlib import Path

from formwright.tasks.base import Task
from formwright.tasks.support.files import folder, read_bytes
from formwright.tasks.support.language import Unit, character_task

TEST = 200_000


def task(*, unit: Unit = "bytes", length: int = 128, validation: float = 0.0, data: Path | None) -> Task:
    """About 1.45 nats after 2,200 steps of the default model. No figure for the whole of WikiText-2 compares with it.

    Args:
        unit: what a token is.
        length: tokens a window.
        validation: share of the training text, from its end, set aside.
        data: the data folder, which holds text/wikitext2_valid.txt and text/wikitext2_test.txt.
    """
    here = folder(data, "text", "wikitext2")
    read = read_bytes(here / "wikitext2_test.txt")[:TEST]
    whole = read.decode("utf-8", errors="ignore").encode()  # the cut may fall inside a character
    return character_task(
        name="wikitext2",
        train=read_bytes(here / "wikitext2_valid.txt"),
        test=whole,
        unit=unit,
        length=length,
        validation=validation,
        context=False,
        path=here,
    )
