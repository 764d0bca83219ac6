"""Training: settings, the loop (the Hugging Face Trainer's), evaluation item by item."""

import importlib
from typing import TYPE_CHECKING, Any

from formwright.training.settings import Precision, Schedule, Settings

if TYPE_CHECKING:
    from formwright.training.evaluation import Evaluation, Trainable, evaluate
    from formwright.training.items import Items
    from formwright.training.loop import History, Progress, fit, seeded
    from formwright.training.method import Method, Pass

# What needs torch is imported when it is asked for: reading settings must stay cheap.
_LATER = {
    "Evaluation": "evaluation",
    "Trainable": "evaluation",
    "evaluate": "evaluation",
    "Items": "items",
    "History": "loop",
    "Progress": "loop",
    "fit": "loop",
    "seeded": "loop",
    "Method": "method",
    "Pass": "method",
}

__all__ = [
    "Evaluation",
    "History",
    "Items",
    "Method",
    "Pass",
    "Precision",
    "Progress",
    "Schedule",
    "Settings",
    "Trainable",
    "evaluate",
    "fit",
    "seeded",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
