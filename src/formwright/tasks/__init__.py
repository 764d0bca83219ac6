"""Tasks: a dataset, a metric and baselines under one name. `load("digits(patch_size=1)")`."""

import difflib
import importlib
import inspect
import os
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from formwright.build import construct, format_spec, parse_spec
from formwright.errors import FormwrightError
from formwright.tasks.base import Defaults, Metric, Task

__all__ = ["Defaults", "Metric", "Task", "load", "names"]


def names() -> list[str]:
    """Every task there is: the modules of this package."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(name.replace("_", "-") for name in found if name != "base")


def load(spec: str | dict[str, Any], data: str | Path | None = None) -> Task:
    """The task that a name, with options in brackets, stands for.

    Args:
        spec: `digits`, `digits(patch_size=1)`, `text-classification(file=mails.csv, text=body, label=spam)`, or a
            table with "name".
        data: the data folder; without it, the one that $FORMWRIGHT_DATA names. Synthetic tasks, digits and your own
            files need none.

    Raises:
        FormwrightError: no such task, no such option, or data that cannot be read.
    """
    options = parse_spec(spec)
    name = options.pop("name").replace("_", "-")
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=len(known), cutoff=0.0)
        raise FormwrightError(f"There is no task {name!r}. Tasks: {', '.join(near)}.")
    make = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").task
    if data is None and os.environ.get("FORMWRIGHT_DATA"):
        data = os.environ["FORMWRIGHT_DATA"]
    where = {"data": None if data is None else Path(data)} if "data" in inspect.signature(make).parameters else {}
    if "data" in options:
        raise FormwrightError("data is no option of a task: give the folder as --data DIR or in $FORMWRIGHT_DATA.")
    made = construct(f"task {name}", make, options, where)
    usual = inspect.signature(make).parameters
    told = {key: value for key, value in options.items() if value != usual[key].default}
    return replace(made, name=format_spec({"name": name, **told}))
