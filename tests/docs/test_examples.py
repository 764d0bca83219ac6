"""The pages of the systems that exist, and the Python of the documentation."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from formwright import catalog

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ROOT / "docs" / "systems"
SECTIONS = ("What it is", "When to use it", "When not", "Cost", "Example")

_specification = importlib.util.spec_from_file_location("docs_runner", HERE / "runner.py")
runner = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(runner)


def runnable(path):
    return [found for found in runner.BLOCK.finditer(path.read_text(encoding="utf-8")) if found["skip"] is None]


EXISTING = [card.slug for card in catalog.cards() if card.status != "planned"]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(PAGES.glob("*.md")))
WITH_PYTHON = [path for path in DOCUMENTS if runnable(path)]


@pytest.mark.parametrize("slug", EXISTING)
def test_a_system_with_code_has_a_page_with_an_example(slug):
    page = PAGES / f"{slug}.md"
    assert page.is_file(), f"{slug} has code: write {page.relative_to(ROOT)}."
    text = page.read_text(encoding="utf-8")
    assert tuple(re.findall(r"^## (.*)$", text, re.MULTILINE)) == SECTIONS
    assert len(runnable(page)) == 1


def test_every_page_is_a_systems():
    slugs = {card.slug for card in catalog.cards()}
    assert {path.stem for path in PAGES.glob("*.md")} - {"index"} <= slugs


@pytest.fixture(scope="module")
def outcome():
    """What went wrong, by page. In a process of its own: a reader's Python checks no shapes at every call."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "runner.py"), *map(str, WITH_PYTHON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.stem)
def test_the_python_of_a_page_runs(path, outcome):
    assert not outcome[str(path)], outcome[str(path)]


def test_a_page_whose_python_fails_is_found_with_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: it would fail -->\n```python\n1 / 0\n```\n\n```python\nn = 3\n```\n\n```python\nn / 0\n```\n"
    )
    assert "line 11" in runner.run(page)
    assert "ZeroDivisionError" in runner.run(page)
