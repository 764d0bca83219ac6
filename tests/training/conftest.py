import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def worker():
    """The module that tests import and subprocesses run."""
    spec = importlib.util.spec_from_file_location("worker", Path(__file__).with_name("worker.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
