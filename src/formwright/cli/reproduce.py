"""`formwright reproduce`: re-check a paper's claim."""

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from formwright.catalog.evidence import checkout
from formwright.errors import FormwrightError


def reproduce(
    name: Annotated[str, typer.Argument(help="A system: slug, number or the name of one of its parts.")],
    scale: Annotated[
        Literal["smoke", "full"],
        typer.Option(help="smoke: seconds, shows that it runs; full: minutes, writes evidence."),
    ] = "smoke",
    data: Annotated[Path | None, typer.Option(help="Data folder; the default is $FORMWRIGHT_DATA.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evidence as JSON.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes at a time; the default is one a core.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder that gets evidence/ and runs/claims/; the default is the checkout, or here."),
    ] = None,
) -> None:
    """Run a system's claim over its seeds and compute the verdict.

    Example: formwright reproduce polycom --scale full

    Finished seeds are kept in runs/claims/, so that a run cut short goes on where it was.
    """
    from formwright import claims
    from formwright.claims.base import SeedFailed

    if data is not None:
        if not data.is_dir():
            raise FormwrightError(f"--data is {data}, but there is no such folder.")
        os.environ["FORMWRIGHT_DATA"] = str(data.resolve())
    study = claims.load(name)
    root = out or checkout() or Path.cwd()
    for folder in (root / "runs" / "claims", *([root / "evidence"] if scale == "full" else [])):
        folder.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after them
    log = Console(stderr=as_json, highlight=False)
    for claim in study.claims:
        log.print(f"[bold]{study.slug}[/]: {claim.statement}")
    outcomes: list[claims.Outcome] = []
    seeds = claims.reproduce(study, scale, runs=root / "runs" / "claims", workers=workers)
    try:
        with closing(seeds), log.status(f"0 of {len(study.seeds)} seeds done ({scale})") as status:
            for outcome, how in seeds:
                outcomes.append(outcome)
                note = "kept from an earlier run" if how == "kept" else f"{outcome.seconds:.1f} s"
                log.print(f"seed {outcome.seed}: {_numbers(outcome)} ({note})")
                status.update(f"{len(outcomes)} of {len(study.seeds)} seeds done ({scale})")
    except SeedFailed as failure:
        log.print(f"[red]{failure}[/]\nThe seeds that finished are kept; run the command again for the rest.")
        raise typer.Exit(1) from failure
    found = claims.evidence(study, outcomes)
    if scale == "full":
        path = root / "evidence" / f"{study.slug}.json"
        unfinished = path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        log.print(f"Written to {path}.")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(log, found)


def _numbers(outcome: Any) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in (*outcome.measured.items(), *outcome.baseline.items()))


def _show(log: Console, found: dict[str, Any]) -> None:
    for claim in found["claims"]:
        table = Table("", "mean", "std", title=claim["statement"], title_justify="left", title_style="bold")
        for kind in ("measured", "baseline"):
            for name, row in claim[kind].items():
                label = name if kind == "measured" else f"{name} (baseline)"
                table.add_row(label, f"{row['mean']:.4g}", f"{row['std']:.2g}")
        log.print(table)
        log.print("paper: " + ", ".join(f"{name} {value}" for name, value in claim["paper"].items()))
        log.print(claim["rule"])
        caution = " (smoke scale: says only that the claim runs)" if claim["scale"] == "smoke" else ""
        log.print(f"[bold]{claim['verdict']}[/]{caution}, seeds {', '.join(map(str, claim['seeds']))}")
