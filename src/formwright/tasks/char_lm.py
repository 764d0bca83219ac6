"""char-lm: the next byte or character of any text file, the last tenth of it to test on."""

from formwright.tasks.base import Task
from formwright.tasks.support.language import Unit, character_task, cut, read_symbols


def task(
    *,
    file: str | None = None,
    unit: Unit = "bytes",
    length: int = 128,
    test: float = 0.1,
    validation: float = 0.0,
) -> Task:
    """Loss in nats a symbol and in bits a byte; compare units, and tokenizers, in bits a byte only.

    Args:
        file: a text; without one, the manual that comes with Python (0.46 MB of English).
        unit: what a token is; "characters" wants UTF-8.
        length: tokens a window.
        test: share of the text, from its end, to test on.
        validation: share of the training text, from its end, set aside.
    """
    before, after = cut(read_symbols(file), test, unit, file)
    return character_task(
        name="char-lm",
        train=before,
        test=after,
        unit=unit,
        length=length,
        validation=validation,
        context=True,
        path=file,
    )
