"""tinyshakespeare: the next byte of a megabyte of Shakespeare's plays; the last tenth is the test."""

from pathlib import Path

from formwright.tasks.base import Task
from formwright.tasks.support.files import folder, read_bytes
from formwright.tasks.support.language import Unit, character_task, cut


def task(*, unit: Unit = "bytes", length: int = 128, validation: float = 0.0, data: Path | None) -> Task:
    """1.84 nats at the default settings (900 steps), 1.58 after 5,000; two methods must lie 0.09 or 0.012 apart to
    be told apart.

    Args:
        unit: what a token is.
        length: tokens a window.
        validation: share of the training text, from its end, set aside.
        data: the data folder, which holds text/tinyshakespeare.txt.
    """
    path = folder(data, "text", "tinyshakespeare") / "tinyshakespeare.txt"
    before, after = cut(read_bytes(path), 0.1, unit, path)
    return character_task(
        name="tinyshakespeare",
        train=before,
        test=after,
        unit=unit,
        length=length,
        validation=validation,
        context=True,
        path=path,
    )
