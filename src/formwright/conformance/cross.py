"""Cross-attention: queries from here, keys and values from a memory of another length."""

from dataclasses import replace

import torch
from torch import Tensor

from formwright.conformance.check import check, distance, ensure, ensure_close
from formwright.conformance.subject import Stand, Subject, lengths_to_padding, padding_to_positions, tokens
from formwright.conformance.visibility import SEEN
from formwright.contracts import Context, UnsupportedContext

SLOTS = ("mixer", "attention", "position", "block")
PAIRS = ((5, 11), (11, 5), (1, 7), (7, 1))


def _stand(subject: Subject) -> Stand:
    return subject.stand(causal=False, cross=True) if subject.slot == "block" else subject.stand(causal=False)


def _context(n: int, memory: Tensor, padding: Tensor | None = None) -> Context:
    positions = None if padding is None else padding_to_positions(padding)
    return Context(queries=n, keys=memory.shape[1], memory=memory, padding=padding, positions=positions)


@check("cross", slots=SLOTS)
def cross_attention_takes_other_lengths(subject: Subject) -> None:
    """n queries and m memory tokens give n outputs, and the memory is read, all of it."""
    stand = _stand(subject)
    for n, m in PAIRS:
        x, memory = tokens(n), tokens(m, seed=2)
        with torch.no_grad():
            y = stand(x, _context(n, memory))
            ensure(
                y.shape == x.shape and bool(torch.isfinite(y).all()),
                f"{subject} fails with {n} queries and {m} memory tokens.",
            )
            for t in {0, m - 1}:
                other = memory.clone()
                other[:, t] = 3 * tokens(1, seed=99)[:, 0]
                moved = distance(stand(x, _context(n, other)), y)
                ensure(moved > SEEN, f"{subject} does not read token {t} of a memory of {m}.")


@check("cross", "padding", slots=SLOTS)
def padding_of_the_memory_is_never_read(subject: Subject) -> None:
    """Other pads in the memory, same outputs; a padded memory equals the memory cut to its real tokens."""
    stand = _stand(subject)
    x, memory = tokens(5), tokens(9, seed=2)
    for side in ("left", "right"):
        padding = lengths_to_padding((3, 9, 6), 9, side)
        other = torch.where(padding[..., None], memory, 10 * tokens(9, seed=7))
        with torch.no_grad():
            first, second = (stand(x, _context(5, m, padding)) for m in (memory, other))
            ensure_close(second, first, f"{subject} reads the pads of a memory padded on the {side}.")
            for i, real in enumerate(padding):
                alone = stand(x[i : i + 1], _context(5, memory[i : i + 1, real]))
                ensure_close(
                    first[i : i + 1],
                    alone,
                    f"{subject}: a memory padded on the {side} differs from its real tokens alone.",
                )


@check("cross", "cache", slots=("mixer", "attention"))
def cached_memory_equals_the_memory(subject: Subject) -> None:
    """What is kept of the memory between decoding steps leaves the outputs as they are; a part may refuse, but not
    err.
    """
    stand, x, memory = _stand(subject), tokens(4), tokens(9, seed=2)
    cache = stand.cache()
    with torch.no_grad():
        full = stand(x, _context(4, memory))
        try:
            steps = [stand(x[:, t : t + 1], replace(_context(1, memory), cache=cache)) for t in range(4)]
        except UnsupportedContext:
            return
    ensure_close(torch.cat(steps, dim=1), full, f"{subject}: cross-attention with a cache differs from one without.")
