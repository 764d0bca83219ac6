"""Change a model you already have: prune, quantize, drop tokens or layers, and run it faster.

The package is also the verb: `formwright.compress(model, recipe, data=...)`. Importing it tells the Auto classes of
transformers how to rebuild the models it saved.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from formwright.compress.modifier import Data, Modifier
from formwright.compress.pipeline import run
from formwright.compress.recipe import Recipe
from formwright.compress.structure import Rebuilt, adopt, attach, load, register_families, replace

__all__ = ["Data", "Modifier", "Rebuilt", "Recipe", "adopt", "attach", "load", "replace", "run"]


class _Verb(ModuleType):
    """A package that can be called: `formwright.compress` is both."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("formwright.bench.compress").compress(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
register_families()
