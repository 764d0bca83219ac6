"""`formwright report`: the report of a run folder, written anew."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that was --out of formwright compare.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Write report.html of a run and print its table; a run that is still going on may be looked at, too.

    Example: formwright report runs/digits
    """
    from formwright.bench.report import report as write
    from formwright.bench.summary import summarize
    from formwright.cli.compare import show

    path = write(folder)
    show(summarize(folder), path, as_json=as_json)
