"""What exists beside a card: its code, its reference tests, its evidence.

In a checkout, tests/ and evidence/ lie beside src/. A wheel has neither, so its build writes the names of the systems
with reference tests to catalog/status.json and copies evidence/ into catalog/evidence/ (see setup.py).
"""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
BAKED = PACKAGE / "catalog" / "status.json"
BAKED_EVIDENCE = PACKAGE / "catalog" / "evidence"

REFERENCE_MARK = re.compile(r"^\s*@pytest\.mark\.reference\b|^pytestmark\s*=.*\bmark\.reference\b", re.MULTILINE)


def checkout() -> Path | None:
    """The root of the checkout the package is read from, None for an installed wheel."""
    root = PACKAGE.parent.parent
    return root if PACKAGE.parent.name == "src" and (root / "pyproject.toml").is_file() else None


def defined(module: str, attribute: str) -> bool:
    """Does the module's source define the attribute? Read as text: importing would bring torch."""
    path = source(module)
    if path is None:
        return False
    text = path.read_text(encoding="utf-8")
    name = re.escape(attribute)
    if re.search(rf"^(?:class|def|async def) {name}\b|^{name}\s*(?::[^=\n]*)?=(?!=)", text, re.MULTILINE):
        return True
    if not re.search(rf"\b{name}\b", text):
        return False
    return any(
        isinstance(node, ast.ImportFrom) and any((item.asname or item.name) == attribute for item in node.names)
        for node in ast.parse(text).body
    )


def options(module: str, attribute: str) -> tuple[str, ...]:
    """The keyword-only arguments with a default, of a function or of a class's __init__ (its own or its base's)."""
    path = source(module)
    if path is None:
        return ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    node = found.get(attribute)
    while isinstance(node, ast.ClassDef):
        methods = {method.name: method for method in node.body if isinstance(method, ast.FunctionDef)}
        bases = [found[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in found]
        node = methods.get("__init__") or (bases[0] if bases else None)
    if node is None:
        return ()
    keywords = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    return tuple(
        f"{ast.unparse(argument)} = {ast.unparse(default)}" for argument, default in keywords if default is not None
    )


def source(module: str) -> Path | None:
    relative = PACKAGE.joinpath(*module.split(".")[1:])
    for path in (relative.with_suffix(".py"), relative / "__init__.py"):
        if path.is_file():
            return path
    return None


def reference_tested(slug: str) -> bool:
    """Is there a test of this system marked `@pytest.mark.reference`?"""
    return slug in _reference_tested()


@cache
def _reference_tested() -> frozenset[str]:
    root = checkout()
    if root is not None:
        return scan(root / "tests")
    if BAKED.is_file():
        return frozenset(json.loads(BAKED.read_text(encoding="utf-8"))["reference_tested"])
    return frozenset()


def scan(tests: Path) -> frozenset[str]:
    """Slugs with a reference test: tests/**/test_<slug with underscores>.py with the mark in it."""
    return frozenset(
        path.stem.removeprefix("test_").replace("_", "-")
        for path in tests.rglob("test_*.py")
        if REFERENCE_MARK.search(path.read_text(encoding="utf-8"))
    )


def claims(slug: str) -> list[dict[str, Any]]:
    """The claims in evidence/<slug>.json, as `formwright reproduce` wrote them; none when there is no file."""
    root = checkout()
    path = (root / "evidence" if root is not None else BAKED_EVIDENCE) / f"{slug}.json"
    if not path.is_file():
        return []
    return list(json.loads(path.read_text(encoding="utf-8")).get("claims", []))
