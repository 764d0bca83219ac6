"""`formwright show`: one card, and what its parts accept."""

import json
import shutil
import sys
import textwrap
from typing import Annotated

import typer

from formwright import catalog


def show(
    name: Annotated[str, typer.Argument(help="A slug, a number, or the name of a part.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show one system: paper, status, parts with their options, claim and evidence.

    Example: formwright show rope
    """
    system = catalog.card(name)
    if as_json:
        typer.echo(json.dumps(system.details(), indent=2, ensure_ascii=False))
        return
    facts = {
        "paper": f"{system.title}{f' ({system.year})' if system.year else ''}",
        "arXiv": f"https://arxiv.org/abs/{system.arxiv}" if system.arxiv else None,
        "code": f"https://github.com/{system.code}" if system.code else None,
        "kinds": ", ".join(system.kinds),
        "tags": ", ".join(system.tags),
        "status": system.status,
        "claim": system.claim.text if system.claim else None,
        "where": system.claim.paper if system.claim else None,
        "verdict": ", ".join(system.verdicts),
    }
    number = "" if system.number is None else f" ({system.number:03})"
    _print(f"{system.slug}{number}")
    for label, value in facts.items():
        if value:
            _print(f"{label:8} {value}", indent=9)
    for part in system.provides:
        _print(f"\n{part.key}")
        _print(f"  import    {part.target}", indent=12)
        if part.capabilities:
            _print(f"  can       {', '.join(part.capabilities)}", indent=12)
        if part.time is not None or part.memory is not None:
            _print(f"  grows as  time N^{part.time:g}, memory N^{part.memory:g}", indent=12)
        if part.kernel is not None:
            _print(f"  extends   {extension(part.kernel)}", indent=12)
        for option in part.options():
            _print(f"  option    {option}", indent=12)


def extension(kernel: str) -> str:
    """Whether a bias lets a model read longer texts than those of training, by its series; see the card of 042."""
    from formwright.ops.relative_kernels import KERNELS, described

    trained = "" if kernel in KERNELS else "; of a trained model: python -m formwright.theory.receptive_field FOLDER"
    return f"beyond the training length, by the criterion of exploring-extrapolation: {described(kernel)}{trained}"


def _print(text: str, *, indent: int = 0) -> None:
    """Wrapped to the terminal; whole lines in a pipe."""
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, 30)
        lead = "\n" if text.startswith("\n") else ""
        body = text.removeprefix("\n")
        text = lead + textwrap.fill(body, width, subsequent_indent=" " * indent, break_on_hyphens=False)
    typer.echo(text)
