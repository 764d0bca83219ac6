"""`formwright doctor`: what this installation has and lacks."""

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from formwright import __version__

INSIDE_EXTRA = re.compile(r"""extra == ["']([\w-]+)["']""")
FOR_WORK_ON_FORMWRIGHT = {"test", "docs", "all"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which versions, native kernels, extras and data are in use.

    Example: formwright doctor
    """
    import torch

    from formwright.ops import native

    found: dict[str, Any] = {
        "formwright": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "native kernels": native.describe(),
        "data": _data(),
        "extras": {extra: missing(packages) for extra, packages in extras().items()},
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        if name != "extras":
            typer.echo(f"{name:15} {value}")
    for extra, absent in found["extras"].items():
        has = "yes" if not absent else f'no: pip install "formwright[{extra}]" brings {", ".join(absent)}'
        typer.echo(f"{f'extra {extra}':15} {has}")


def _data() -> str:
    folder = os.environ.get("FORMWRIGHT_DATA")
    if not folder:
        return "FORMWRIGHT_DATA is not set"
    return folder if Path(folder).is_dir() else f"FORMWRIGHT_DATA is {folder}, where there is no folder"


def extras() -> dict[str, list[str]]:
    """The packages each extra brings, from the package's own metadata."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("formwright") or []:
        extra = INSIDE_EXTRA.search(requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name and extra[1] not in FOR_WORK_ON_FORMWRIGHT and name[0] != "formwright":
            found.setdefault(extra[1], []).append(name[0])
    return found


def missing(packages: list[str]) -> list[str]:
    """Those that are not installed."""

    def absent(name: str) -> bool:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return True
        return False

    return [name for name in packages if absent(name)]
