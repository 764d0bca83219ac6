"""Prefill and step-by-step decoding give what one forward gives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from formwright.conformance.check import check, ensure, ensure_close
from formwright.conformance.subject import MIXING, Stand, Subject, lengths_to_padding, padding_to_positions, tokens
from formwright.contracts import Context

CUTS = {
    "token by token": (1,) * 9,
    "prefill of 5, then token by token": (5, 1, 1, 1, 1),
    "chunked prefill": (2, 3, 3, 1),
}


def decode(
    stand: Stand, x: Tensor, cuts: Sequence[int], padding: Tensor | None = None, beams: Tensor | None = None
) -> Tensor:
    """The outputs of a sequence read in pieces. `beams` reorders the rows, once, after the first piece."""
    cache, outputs, end = stand.cache(), [], 0
    for count in cuts:
        start, end = end, end + count
        real = None if padding is None else padding[:, :end]
        context = Context(
            queries=count,
            keys=end,
            causal=True,
            padding=real,
            positions=None if padding is None else padding_to_positions(real),
            cache=cache,
        )
        outputs.append(stand(x[:, start:end], context))
        if beams is not None and start == 0:
            cache.reorder_cache(beams)
            x = x[beams]
    return torch.cat(outputs, dim=1)


@check("cache", "causal", slots=MIXING)
def decoding_equals_the_full_forward(subject: Subject) -> None:
    """Whatever the pieces, the outputs are those of one forward without a cache."""
    stand, x = subject.stand(causal=True), tokens(9)
    with torch.no_grad():
        full = stand(x, Context.of(x, causal=True))
        for how, cuts in CUTS.items():
            ensure_close(
                decode(stand, x, cuts),
                full,
                f"{subject}: decoding with the cache ({how}) differs from the full forward.",
            )


@check("cache", "causal", "padding", slots=MIXING)
def decoding_with_left_padding_equals_the_row_alone(subject: Subject) -> None:
    """Rows of a prompt padded on the left decode as they do alone."""
    stand, x = subject.stand(causal=True), tokens(9)
    padding = lengths_to_padding((5, 9, 7), 9, "left")
    with torch.no_grad():
        for how, cuts in CUTS.items():
            y = decode(stand, x, cuts, padding)
            ensure(bool(torch.isfinite(y).all()), f"{subject} gives NaN or infinity when decoding with left padding.")
            for i, real in enumerate(padding):
                row = x[i : i + 1, real]
                alone = stand(row, Context.of(row, causal=True))
                ensure_close(
                    y[i : i + 1, real],
                    alone,
                    f"{subject}: decoding ({how}) a left-padded row differs from the row alone.",
                )


@check("cache", "causal", slots=MIXING)
def cache_follows_reordered_rows(subject: Subject) -> None:
    """Beam search reorders the cache's rows between steps; the rows then continue as if they had always stood there."""
    stand, x = subject.stand(causal=True), tokens(7)
    beams = torch.tensor([2, 0, 0])
    with torch.no_grad():
        y = decode(stand, x, (4, 1, 1, 1), beams=beams)
        full = stand(x[beams], Context.of(x[beams], causal=True))
    ensure_close(
        y[:, 4:], full[:, 4:], f"{subject}: after its cache's rows are reordered, decoding goes on with the old ones."
    )


@check("cache", "causal", slots=("mixer",))
def state_does_not_grow(subject: Subject) -> None:
    """A mixer with a state keeps as much after 32 tokens as after 8."""
    stand = subject.stand(causal=True)
    if subject.slot != "mixer" or stand.part.cache_kind != "state":
        return
    sizes = []
    for n in (8, 32):
        x, cache = tokens(n), stand.cache()
        stand(x, Context.of(x, causal=True, cache=cache))
        ensure(cache.state is not None, f"{subject} leaves the cache without a state.")
        ensure(cache.get_seq_length() == n, f"{subject} tells its cache of {cache.get_seq_length()} tokens after {n}.")
        sizes.append(sum(state.numel() for state in cache.state))
    declared = subject.time is None or subject.time <= 1
    ensure(
        sizes[0] == sizes[1] or not declared,
        f"{subject} keeps {sizes[0]} numbers after 8 tokens, but {sizes[1]} after 32.",
    )
