"""`formwright list`: the catalogue as a table."""

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from formwright import catalog
from formwright.catalog.cards import suggest
from formwright.errors import FormwrightError

COLUMNS = ("number", "slug", "status", "kinds", "provides", "title")
ROOM_FOR_TABLE, ROOM_FOR_MORE = 60, (70, 100, 130)  # terminal columns; for kinds, parts and title


def list(
    kind: Annotated[str | None, typer.Option(help="attention, position, feedforward, pruning, ...")] = None,
    status: Annotated[str | None, typer.Option(help="planned, built, matched or proven.")] = None,
    capability: Annotated[str | None, typer.Option(help="causal, cross, padding, cache, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the systems and what they provide.

    Example: formwright list --kind position --capability cache

    In a pipe the columns are separated by tabs: number, slug, status, kinds, provides, title.
    """
    for option, value, choices in (
        ("kind", kind, catalog.KINDS),
        ("status", status, catalog.STATUSES),
        ("capability", capability, catalog.CAPABILITIES),
    ):
        if value is not None and value not in choices:
            raise FormwrightError(f"--{option} is {value!r}; {suggest(value, choices)}.")
    chosen = [
        system
        for system in catalog.cards()
        if (kind is None or kind in system.kinds)
        and (status is None or status == system.status)
        and (capability is None or capability in system.capabilities)
    ]
    if as_json:
        typer.echo(json.dumps([system.summary() for system in chosen], indent=2, ensure_ascii=False))
    elif not sys.stdout.isatty():
        for row in map(_row, chosen):
            typer.echo("\t".join(row))
    else:
        _table(chosen)


def _row(system: catalog.Card) -> tuple[str, ...]:
    number = "" if system.number is None else f"{system.number:03}"
    names = " ".join(part.key for part in system.provides)
    return number, system.slug, system.status, " ".join(system.kinds), names, system.title


def _table(chosen: Sequence[catalog.Card]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if console.width < ROOM_FOR_TABLE:
        for system in chosen:
            typer.echo(f"{system.slug} ({system.status})")
        return
    columns = COLUMNS[: 3 + sum(console.width >= room for room in ROOM_FOR_MORE)]
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column("" if column == "number" else column, no_wrap=column in COLUMNS[:3], overflow="fold")
    for system in chosen:
        table.add_row(*_row(system)[: len(columns)])
    console.print(table, markup=False, highlight=False)
    console.print(f"{len(chosen)} systems. Details: formwright show NAME.", highlight=False)
