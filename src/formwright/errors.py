"""The errors a user reads: one sentence that names the fault and the way out."""

import importlib
from types import ModuleType


class FormwrightError(ValueError):
    """Bad input. The command line prints the message alone and exits with status 2."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Raises:
        FormwrightError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.split(".")[0] != module.split(".")[0]:
            raise
        says = f'This needs {module}, which is not installed: pip install "formwright[{extra}]".'
        raise FormwrightError(says) from missing
