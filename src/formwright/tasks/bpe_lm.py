"""bpe-lm: the next token of any text file, tokens being byte pairs merged by their frequency in the training text."""

from formwright.errors import FormwrightError
from formwright.tasks.base import Task
from formwright.tasks.support.files import decode
from formwright.tasks.support.language import cut, language_task, read_symbols
from formwright.tasks.support.words import byte_pairs, numbers
from formwright.training import Settings


def task(
    *,
    file: str | None = None,
    vocab: int = 2048,
    length: int = 128,
    test: float = 0.1,
    validation: float = 0.0,
) -> Task:
    """Loss in nats a token and in bits a byte; compare tokenizers in bits a byte only.

    Args:
        file: a text in UTF-8; without one, the manual that comes with Python (0.46 MB of English).
        vocab: tokens, the 256 bytes among them. The merges are learnt on the training text alone.
        length: tokens a window.
        test: share of the text, from its end, to test on.
        validation: share of the training text, from its end, set aside.
    """
    if vocab < 257:
        raise FormwrightError(f"vocab is {vocab}, but the 256 bytes are tokens already: at least 257.")
    before, after = (decode(part, file or "the text") for part in cut(read_symbols(file), test, "characters", file))
    tokenizer = byte_pairs([before], vocab)
    learnt, read = (numbers(tokenizer, text) for text in (before, after))
    return language_task(
        name="bpe-lm",
        train=learnt,
        test=read,
        vocab_size=tokenizer.get_vocab_size(),
        length=length,
        validation=validation,
        bytes_a_symbol=len(after.encode()) / max(1, len(read)),
        context=True,
        settings=Settings(steps=1400, batch_size=16, learning_rate=8e-3, weight_decay=0.1, betas=(0.9, 0.95)),
        tokenizer=tokenizer,
    )
