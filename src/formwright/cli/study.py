"""`formwright study`: run a comparison that is written down, such as how positions read long texts."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer


def study(
    name: Annotated[
        str, typer.Argument(help="A study of Formwright's: extrapolation, costs, approximation; or a YAML file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command goes on where a stopped one was.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trials at once, or threads; without it one a core.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data folder; default $FORMWRIGHT_DATA.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Run a study: a written comparison with the papers' statements, what mixers cost as sequences grow, or how near
    attention functions come to softmax attention.

    Example: formwright study extrapolation --out runs/extrapolation

    Exit status: 0 done, 1 a trial failed, 2 bad input, 130 interrupted.
    """
    from rich.console import Console

    from formwright.bench.study import study as run

    command = shlex.join(["formwright", *sys.argv[1:]])
    try:
        studied = run(name, out=out, workers=workers, data=data, command=command)
    except KeyboardInterrupt as stopped:
        typer.echo(f"Stopped. Finished trials are saved in {out}; the same command goes on from there:", err=True)
        typer.echo(f"  {command}", err=True)
        raise typer.Exit(130) from stopped
    if as_json:
        typer.echo(json.dumps(studied.found, indent=2, ensure_ascii=False))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
        for shown in studied.tables:
            console.print(shown)
            console.print()
        console.print(f"Report: {studied.report}", soft_wrap=True)
    if studied.failed:
        raise typer.Exit(1)
