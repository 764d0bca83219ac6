"""A second process for the checks that trace: torch.compile cannot trace what jaxtyping's import hook has wrapped."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from formwright.conformance.suite import run_by_name


@pytest.fixture(scope="session")
def apart():
    """Run one check of a part there; the sentence of what is wrong comes back. Started by the first check that needs
    it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda slot, name, check: pool.submit(run_by_name, slot, name, check).result()
