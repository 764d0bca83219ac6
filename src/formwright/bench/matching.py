"""Widths at which two models cost the same.

The feed-forward width is turned first: it changes a model's size in small steps and leaves the token's width alone.
Where that does not reach the target within a half to twice its own scale, the token's width is turned in steps of the
head count, with the feed-forward width in proportion, and the feed-forward width fills in what is left.
"""

from collections.abc import Callable, Collection
from typing import Any

from formwright.errors import FormwrightError

TOLERANCE = {"params": 0.01, "flops": 0.02}
Config = dict[str, Any]
Number = int | float


def match(
    config: Config, target: Number, budget: Callable[[Config], Number], tolerance: float, *, held: Collection[str] = ()
) -> tuple[Config, float]:
    """The configuration with the widths whose budget is nearest to the target, and its ratio to it.

    Args:
        config: with hidden_size and num_attention_heads.
        target: the baseline's budget.
        budget: parameters or FLOPs of a configuration; grows with either width.
        tolerance: the ratio may differ from 1 by this much.
        held: widths that must not change: the user compares them.

    Raises:
        FormwrightError: no width comes within the tolerance; the message names the nearest.
    """
    seen: dict[tuple, float] = {}

    def ratio(**widths: int) -> float:
        name = tuple(sorted(widths.items()))
        if name not in seen:
            seen[name] = budget({**config, **widths}) / target
        return seen[name]

    best: tuple[float, dict[str, int]] = (ratio(), {})

    def consider(widths: dict[str, int]) -> None:
        nonlocal best
        found = ratio(**widths)
        if abs(found - 1) < abs(best[0] - 1):
            best = (found, widths)

    def turn_feedforward(hidden: int, **widths: int) -> None:
        for width in _crossing(lambda w: ratio(**widths, intermediate_size=w), hidden, 8 * hidden):
            consider({**widths, "intermediate_size": width})

    hidden, heads = config["hidden_size"], config.get("num_attention_heads") or 1
    if abs(best[0] - 1) > tolerance and "intermediate_size" not in held:
        turn_feedforward(hidden)
    if abs(best[0] - 1) > tolerance and "hidden_size" not in held and config.get("head_dim") is None:
        own = config.get("intermediate_size")

        def scaled(width: int) -> dict[str, int]:
            own_width = {} if own is None else {"intermediate_size": max(1, round(own * width / hidden))}
            return {"hidden_size": width, **own_width}

        step = 2 * heads  # rotary positions need an even head width
        for places in _crossing(lambda n: ratio(**scaled(n * step)), max(1, hidden // 4 // step), 4 * hidden // step):
            consider(scaled(places * step))
            if abs(best[0] - 1) > tolerance and "intermediate_size" not in held:
                turn_feedforward(places * step, hidden_size=places * step)
    if abs(best[0] - 1) > tolerance:
        widths = ", ".join(f"{name} {value}" for name, value in best[1].items()) or "its own widths"
        raise FormwrightError(
            f"It cannot be matched: the nearest, with {widths}, costs {best[0]:.4f} times the baseline, and at most "
            f"{tolerance:.0%} apart is allowed. Compare it as it is with match=none (--match none)."
        )
    return {**config, **best[1]}, best[0]


def _crossing(ratio: Callable[[int], float], low: int, high: int) -> tuple[int, ...]:
    """The two neighbours between which a growing function crosses 1, or the end that is nearest."""
    if ratio(low) >= 1:
        return (low,)
    if ratio(high) <= 1:
        return (high,)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ratio(middle) < 1 else (low, middle)
    return (low, high)
