"""The checks every part must pass, for our parts and for yours.

    from formwright.conformance import check_part
    check_part(MyAttention, slot="attention", capabilities=["causal", "padding"], time=2.0, memory=1.0)

A check is a function from a part under test to nothing; it raises AssertionError with a sentence saying what is
wrong. Which checks a part meets follows from its slot and its capabilities, never from its name.
"""

from formwright.conformance.check import Check
from formwright.conformance.subject import Subject
from formwright.conformance.suite import CHECKS, check_part, checks_for

__all__ = ["CHECKS", "Check", "Subject", "check_part", "checks_for"]
