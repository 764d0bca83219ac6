"""Names to cards, parts and code."""

import importlib
from functools import cache
from pathlib import Path
from typing import Any

from formwright.catalog.cards import Card, Provided, nearest, read_card
from formwright.errors import FormwrightError

SYSTEMS = Path(__file__).resolve().parent / "systems"


@cache
def cards() -> tuple[Card, ...]:
    """Every card: the numbered ones in order, then the baselines by slug.

    Raises:
        FormwrightError: a card is malformed, or two provide the same slot/name or carry the same number.
    """
    found = [read_card(path) for path in sorted(SYSTEMS.glob("*.toml"))]
    owners: dict[str, str] = {}
    for system in found:
        names = [part.key for part in system.provides]
        for name in names if system.number is None else [*names, f"number {system.number}"]:
            if name in owners:
                raise FormwrightError(f"Cards {owners[name]}.toml and {system.slug}.toml both have {name}.")
            owners[name] = system.slug
    return tuple(sorted(found, key=lambda system: (system.number is None, system.number or 0, system.slug)))


def card(name: str) -> Card:
    """A card by slug, number, slot/name or the name of a part it provides.

    Raises:
        FormwrightError: no card is called so, or several provide a part of that name.
    """
    wanted = name.strip().lower()
    for system in cards():
        if system.slug == wanted or (wanted.isdecimal() and system.number == int(wanted)):
            return system
    parts = [part for part in provided() if wanted in (part.name, part.key)]
    owners = sorted({part.slug for part in parts})
    if len(owners) == 1:
        return card(owners[0])
    if owners:
        choices = " and ".join(f"{part.key} ({part.slug})" for part in parts)
        raise FormwrightError(f"{name!r} names several parts: {choices}; write the whole name.")
    known = [*(system.slug for system in cards()), *(part.name for part in provided())]
    raise FormwrightError(
        f"No system is called {name!r}; did you mean {nearest(wanted, known)[0]!r}? All: formwright list."
    )


def provided(slot: str | None = None) -> tuple[Provided, ...]:
    """Every part on the cards, or those of one slot.

    Raises:
        FormwrightError: no card provides anything for that slot.
    """
    parts = tuple(part for system in cards() for part in system.provides)
    if slot is None:
        return parts
    chosen = tuple(part for part in parts if part.slot == slot)
    if not chosen:
        raise FormwrightError(f"No slot is called {slot!r}; the slots are {', '.join(nearest(slot, slots()))}.")
    return chosen


def slots() -> tuple[str, ...]:
    """The slots for which some card provides a part, in alphabetical order."""
    return tuple(sorted({part.slot for part in provided()}))


def find(slot: str, name: str) -> Provided:
    """The part that `--vary slot=name` means.

    Raises:
        FormwrightError: unknown slot or name; the message lists the valid ones, nearest first.
    """
    parts = {part.name: part for part in provided(slot)}
    if name not in parts:
        raise FormwrightError(f"No {slot} is called {name!r}; the {slot}s are {', '.join(nearest(name, parts))}.")
    return parts[name]


def resolve(target: str) -> Any:
    """Import what a card's `module:attribute` names.

    Raises:
        FormwrightError: the module or the attribute does not exist.
    """
    module, separator, attribute = target.partition(":")
    if not separator:
        raise FormwrightError(f"A target is written module:Attribute, got {target!r}.")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        raise FormwrightError(f"{target} is not built yet: there is no module {error.name}.") from error
    if not hasattr(found, attribute):
        raise FormwrightError(f"{target} is not built yet: {module} has no {attribute}.")
    return getattr(found, attribute)
