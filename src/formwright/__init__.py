"""Formwright: a workshop for Transformers.

The verbs of the command line, imported when they are first used: `formwright.compare(...)`, `formwright.report(...)`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from formwright.bench.compare import compare as compare
    from formwright.bench.report import report as report
    from formwright.compress.runtime.bytetransformer import padding_free as padding_free
    from formwright.compress.structure import load as load
    from formwright.socket import register as register
    from formwright.socket import register_attention as register_attention

__version__ = "0.1.0"

VERBS = {
    "compare": "formwright.bench.compare:compare",
    "load": "formwright.compress.structure:load",
    "padding_free": "formwright.compress.runtime.bytetransformer:padding_free",
    "report": "formwright.bench.report:report",
    "register": "formwright.socket:register",
    "register_attention": "formwright.socket:register_attention",
}


def __getattr__(name: str) -> Any:
    if name not in VERBS:
        raise AttributeError(f"module 'formwright' has no attribute {name!r}")
    from formwright.catalog import resolve

    return resolve(VERBS[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *VERBS])
