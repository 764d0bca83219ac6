"""Each check catches the part made wrong for it and passes the right ones."""

import subprocess
import sys
from pathlib import Path

import pytest

import formwright.conformance.options
from formwright.catalog import find
from formwright.conformance import CHECKS, Subject, check_part, checks_for
from formwright.errors import FormwrightError

from .wrong_parts import RIGHT, WRONG, Mean, TwoFaults

BY_NAME = {check.name: check for check in CHECKS}

UNKNOWN_OPTIONS = "unknown_and_ill_typed_options_are_refused"

# Caught in the process without jaxtyping's hook, like every check that traces.
TRACING = [name for name, check in BY_NAME.items() if check.traces]


@pytest.mark.parametrize(
    "wrong", [wrong for wrong in WRONG if wrong.check not in TRACING], ids=lambda w: f"{w.part.__name__}-{w.check}"
)
def test_the_check_catches_its_wrong_part(wrong):
    with pytest.raises(AssertionError, match=wrong.part.__name__):
        BY_NAME[wrong.check](wrong.subject)


@pytest.mark.parametrize("right", RIGHT, ids=lambda right: right.part.__name__)
def test_every_check_passes_the_right_part(right):
    checks = [check for check in checks_for(right.subject) if not check.traces]
    assert checks
    for check in checks:
        check(right.subject)


def test_tracing_checks_catch_their_wrong_parts_and_pass_the_right_ones():
    script = """
import sys
sys.path.insert(0, sys.argv[1])
from formwright.conformance import CHECKS
from wrong_parts import RIGHT, WRONG
for check in (check for check in CHECKS if check.traces):
    for right in (right for right in RIGHT if check.applies(right.subject)):
        check(right.subject)
        print("passed", check.name)
    for wrong in (wrong for wrong in WRONG if wrong.check == check.name):
        try:
            check(wrong.subject)
        except AssertionError as error:
            assert wrong.part.__name__ in str(error)
            print("caught", check.name)
"""
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    said = run.stdout.split("\n")
    for name in TRACING:
        assert f"caught {name}" in said
        assert f"passed {name}" in said


def test_options_that_vanish_on_the_command_line_are_caught(monkeypatch):
    """Only a card gives a part a name to type, so here the builder is the wrong one."""
    right = Subject.of(find("norm", "layernorm"))
    check = BY_NAME[UNKNOWN_OPTIONS]
    check(right)
    monkeypatch.setattr(formwright.conformance.options, "build", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="takes an option that does not exist"):
        check(right)


def test_every_check_has_a_wrong_part():
    assert {wrong.check for wrong in WRONG} | {UNKNOWN_OPTIONS} == set(BY_NAME)


def test_check_part_reports_all_failures_at_once_and_a_known_one_that_passes():
    facts = {"slot": "mixer", "capabilities": ["causal", "padding", "cache"], "time": 1.0, "memory": 1.0}
    check_part(Mean, **facts)
    with pytest.raises(AssertionError, match=r"fails 2 checks:\n  training_follows_the_seed.*\n  every_parameter_gets"):
        check_part(TwoFaults, **facts)
    expected = ["training_follows_the_seed", "every_parameter_gets_a_gradient"]
    check_part(TwoFaults, **facts, expected_failures=expected)
    with pytest.raises(AssertionError, match=r"shape_is_kept: passes, though it is listed as failing"):
        check_part(Mean, **facts, expected_failures=["shape_is_kept"])


def test_an_unknown_slot_is_refused_with_the_known_ones_named():
    with pytest.raises(FormwrightError, match="mixer, attention, position"):
        check_part(Mean, slot="mixture")
