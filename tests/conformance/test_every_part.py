"""Every part on a card meets every check that its slot and capabilities oblige it to."""

import pytest

from formwright import catalog
from formwright.catalog.evidence import defined
from formwright.conformance import CHECKS, Subject
from formwright.conformance.subject import SLOTS

from .known_failures import KNOWN_FAILURES

# These slots hold no part of a block; their own tests check them.
ELSEWHERE = {
    "model": "tests/models",
    "embedding": "tests/parts/embedding",
    "modifier": "tests/compress",
    "training": "tests/training",
    "sharing": "tests/parts/sharing",
    "objective": "tests/training",
    "module": "tests/compress",
    "cache": "tests/compress/quantize",
    "tokenizer": "tests/tasks",
    "search": "tests/training",
    "tuner": "tests/tuners",
}

PARTS = {p.key: p for p in catalog.provided() if p.slot in (*SLOTS, "init") and defined(p.module, p.attribute)}


def _cases():
    for key, provided in PARTS.items():
        for check in CHECKS:
            if provided.slot in check.slots and check.needs <= set(provided.capabilities):
                reason = KNOWN_FAILURES.get((key, check.name))
                marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True)]
                yield pytest.param(check, provided, id=f"{key}-{check.name}", marks=marks)


@pytest.mark.parametrize(("check", "provided"), list(_cases()))
def test_part(check, provided, apart):
    if check.traces:
        wrong = apart(provided.slot, provided.name, check.name)
        assert wrong is None, wrong
    else:
        check(Subject.of(provided))


def test_every_slot_is_checked_here_or_elsewhere():
    unchecked = set(catalog.slots()) - {*SLOTS, "init", *ELSEWHERE}
    assert not unchecked, f"No check knows the slots {unchecked}; write them, or name the tests that do in ELSEWHERE."


def test_every_known_failure_names_a_part_and_a_check():
    names = {check.name for check in CHECKS}
    for key, check in KNOWN_FAILURES:
        assert key in PARTS, f"{key} is on no card."
        assert check in names, f"No check is called {check}."
