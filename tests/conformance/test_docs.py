"""The example of the conformance page runs, and the page names every family of checks."""

import re

from formwright.catalog.evidence import checkout
from formwright.conformance import CHECKS

PAGE = (checkout() / "docs" / "conformance.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1].replace('"compile", "export"', "")
    path = tmp_path / "example.py"
    path.write_text(code, encoding="utf-8")
    exec(compile(code, str(path), "exec"), {"__name__": "example"})


def test_the_page_describes_every_family():
    described = set(re.findall(r"^\| (\w+) \|", PAGE, re.MULTILINE))
    assert {check.family for check in CHECKS} <= described
