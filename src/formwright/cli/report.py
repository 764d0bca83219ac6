"""`formwright report`: the report of a run folder, of a comparison or a compression, written anew."""

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A folder that was --out of formwright compare or compress.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Write report.html of a run and print its table; a run that is still going on may be looked at, too.

    Example: formwright report runs/digits
    """
    from formwright.bench.compress_report import report as write_compression
    from formwright.bench.records import read_run
    from formwright.bench.report import report as write
    from formwright.bench.summary import summarize
    from formwright.cli.compare import show

    run = read_run(folder)
    if run is not None and "original" in run:
        path = write_compression(folder)
        typer.echo(json.dumps({**run, "report": str(path)}, indent=2) if as_json else f"Report: {path}")
        return
    path = write(folder)
    show(summarize(folder), path, as_json=as_json)
