"""Who sees whom: causality, sight of the future, padding, positions. By perturbation, so that no path escapes."""

import torch
from torch import Tensor

from formwright.conformance.check import TOLERANCE, check, distance, ensure, ensure_close
from formwright.conformance.subject import MIXING, Stand, Subject, lengths_to_padding, padding_to_positions, tokens
from formwright.contracts import Context

SEEN = 1e-4  # a change above this share of the largest output is a change


def _changed(stand: Stand, x: Tensor, t: int, context: Context) -> tuple[float, float]:
    """How far token t's change moves the outputs before t, and those from t on."""
    other = x.clone()
    other[:, t] = tokens(1, seed=99, batch=x.shape[0])[:, 0] * 3
    with torch.no_grad():
        before, after = stand(x, context), stand(other, context)
    return distance(after[:, :t], before[:, :t]), distance(after[:, t:], before[:, t:])


@check("causal", slots=MIXING)
def causal_never_sees_the_future(subject: Subject) -> None:
    """Changing token t changes nothing before t, and something from t on."""
    stand = subject.stand(causal=True)
    for n in (7, 63):
        x = tokens(n)
        for t in {0, 1, n // 2, n // 2 + 1, n - 2, n - 1}:
            early, late = _changed(stand, x, t, Context.of(x, causal=True))
            ensure(
                early <= TOLERANCE,
                f"{subject} leaks the future: changing token {t} of {n} moves earlier outputs by {early:.1e}.",
            )
            ensure(late > SEEN, f"{subject} does not see token {t} of {n}: changing it changes nothing from there on.")


@check("bidirectional", slots=MIXING)
def bidirectional_sees_the_future(subject: Subject) -> None:
    """Without the causal flag, changing token t changes outputs before and after it."""
    stand = subject.stand(causal=False)
    for n in (7, 63):
        x = tokens(n)
        for t in {1, n // 2, n - 1}:
            early, late = _changed(stand, x, t, Context.of(x, causal=False))
            ensure(early > SEEN, f"{subject} declares bidirectional, but no token before {t} of {n} sees that one.")
            ensure(late > SEEN, f"{subject} does not see token {t} of {n}: changing it changes nothing from there on.")


@check("padding", slots=MIXING)
def content_of_pads_is_never_read(subject: Subject) -> None:
    """Other pads, same outputs of the real tokens; left and right padding; the pads' own outputs are finite."""
    for causal in subject.causals:
        stand = subject.stand(causal=causal)
        for side in ("left", "right"):
            padding = lengths_to_padding((3, 11, 6), 11, side)
            x = tokens(11)
            other = torch.where(padding[..., None], x, 10 * tokens(11, seed=7))
            context = Context.of(x, causal=causal, padding=padding, positions=padding_to_positions(padding))
            with torch.no_grad():
                first, second = stand(x, context), stand(other, context)
            where = f"under {side} padding (causal={causal})"
            ensure(
                bool(torch.isfinite(first).all() and torch.isfinite(second).all()),
                f"{subject} gives NaN or infinity {where}.",
            )
            ensure_close(
                second[padding],
                first[padding],
                f"{subject} ignores the padding: the content of pads moves real tokens {where}.",
            )


@check("padding", slots=MIXING)
def padded_row_equals_the_row_alone(subject: Subject) -> None:
    """A row among pads gives what the row alone gives; left and right padding."""
    lengths = (3, 11, 6)
    for causal in subject.causals:
        stand = subject.stand(causal=causal)
        for side in ("left", "right"):
            padding = lengths_to_padding(lengths, 11, side)
            x = tokens(11)
            with torch.no_grad():
                y = stand(x, Context.of(x, causal=causal, padding=padding, positions=padding_to_positions(padding)))
                for i, real in enumerate(padding):
                    row = x[i : i + 1, real]
                    alone = stand(row, Context.of(row, causal=causal))
                    ensure_close(
                        y[i : i + 1, real],
                        alone,
                        f"{subject}: {side} padding changes a row's real tokens (causal={causal}).",
                    )


@check("padding", slots=MIXING)
def padding_that_hides_nothing_changes_nothing(subject: Subject) -> None:
    """A padding mask of ones is no padding mask."""
    for causal in subject.causals:
        stand, x = subject.stand(causal=causal), tokens(9)
        ones = torch.ones(3, 9, dtype=torch.bool)
        plain, masked = (stand(x, Context.of(x, causal=causal, padding=mask)) for mask in (None, ones))
        ensure_close(masked, plain, f"{subject}: a padding mask that hides nothing changes the output.")


@check("padding", slots=MIXING)
def row_of_pads_alone_is_finite(subject: Subject) -> None:
    """A row without any real token gives numbers, not NaN, and does not disturb the others."""
    for causal in subject.causals:
        stand, x = subject.stand(causal=causal), tokens(5)
        padding = torch.ones(3, 5, dtype=torch.bool)
        padding[1] = False
        with torch.no_grad():
            y = stand(x, Context.of(x, causal=causal, padding=padding, positions=padding_to_positions(padding)))
            plain = stand(x, Context.of(x, causal=causal))
        ensure(bool(torch.isfinite(y).all()), f"{subject} gives NaN for a row of pads alone (causal={causal}).")
        ensure_close(y[[0, 2]], plain[[0, 2]], f"{subject}: a row of pads alone disturbs other rows (causal={causal}).")


@check(slots=MIXING)
def positions_counted_from_zero_are_the_default(subject: Subject) -> None:
    """Positions 0, 1, 2, ... handed in give what no positions give."""
    for causal in subject.causals:
        stand, x = subject.stand(causal=causal), tokens(9)
        for rows in (1, 3):
            counted = torch.arange(9).expand(rows, 9)
            plain, handed = (stand(x, Context.of(x, causal=causal, positions=p)) for p in (None, counted))
            ensure_close(
                handed, plain, f"{subject}: positions 0, 1, 2, ... handed in change the output (causal={causal})."
            )


@check(slots=("position",))
def positions_are_read(subject: Subject) -> None:
    """Order matters, and so do the positions in the context: stretching them changes the output."""
    for causal in subject.causals:
        stand, x = subject.stand(causal=causal), tokens(9)
        stretched = 3 * torch.arange(9)[None]
        plain, handed = (stand(x, Context.of(x, causal=causal, positions=p)) for p in (None, stretched))
        ensure(
            distance(handed, plain) > SEEN,
            f"{subject} does not read context.positions: three times as far changes nothing.",
        )
    if False in subject.causals:
        order = torch.tensor([4, 0, 7, 2, 8, 5, 1, 6, 3])  # not reversed: a bias by distance alone is symmetric
        context = Context.of(x, causal=False)
        ensure(
            distance(stand(x[:, order], context), stand(x, context)[:, order]) > SEEN,
            f"{subject} tells nothing about the order: tokens shuffled give outputs shuffled.",
        )
