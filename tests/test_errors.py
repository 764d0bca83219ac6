"""An optional dependency that is missing is a sentence; a broken one is its own error."""

import json

import pytest

from formwright.errors import FormwrightError, require


def test_what_is_there_is_imported():
    assert require("json", extra="report") is json


def test_what_is_missing_names_the_extra():
    with pytest.raises(FormwrightError, match=r'^This needs absent_module, .*: pip install "formwright\[report\]"\.$'):
        require("absent_module", extra="report")


def test_a_dependency_that_itself_misses_something_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import another_absent_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_absent_module"):
        require("half_installed", extra="report")
