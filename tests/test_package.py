"""The package itself: light to import, verbs on demand, one version."""

import importlib.metadata
import subprocess
import sys

import pytest

import formwright


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys, formwright; print([name for name in ('torch', 'numpy', 'typer', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_verbs_are_there():
    for name in formwright.VERBS:
        assert name in dir(formwright)
        assert getattr(formwright, name).__name__ == name


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'formwright' has no attribute 'comprae'"):
        formwright.comprae  # noqa: B018


def test_the_version_is_the_one_of_the_distribution():
    assert importlib.metadata.version("formwright") == formwright.__version__
