"""Set before torch is imported: no network, one thread (the suite runs in several processes)."""

import os
import types

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def warm_workers(tmp_path_factory):
    """One worker process for all comparisons that a module makes in this process: to start it takes longer than its
    trials."""
    from formwright.bench.pool import LocalPool, pool

    team = LocalPool(1, tmp_path_factory.mktemp("workers") / "log")
    shared = types.SimpleNamespace(run=team.run, close=lambda: None)

    def choose(backend, workers, log):
        asked = pool(backend, workers, log)
        return shared if isinstance(asked, LocalPool) else asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("formwright.bench.compare.pool", choose)
        yield
    team.close()
