"""Each paper's main claim, re-checked by a command: `formwright reproduce NAME`.

One file a system. Its docstring says Claim, Paper, Here, Fair and Rule; the names it defines are read by `load`:

    STATEMENT   the claim in our words, one sentence
    PAPER       the paper's figure and its baseline, {"polynorm": 2.17, "swiglu": 2.19, ...}
    RULE        the lines of the docstring's Rule: when it holds, when only in direction
    SEEDS       three or more
    run         (scale, seed) -> Outcome; "smoke" in seconds, "full" in minutes
    verdict     (outcomes) -> Verdict; a function of what was measured, never a typed word

A system with several claims defines CLAIMS, a list of `Claim`, in place of STATEMENT, PAPER, RULE and verdict; one
`run` feeds them all.
"""

from formwright.claims.base import (
    VERDICTS,
    Claim,
    Outcome,
    Scale,
    Study,
    Verdict,
    available,
    evidence,
    load,
    reproduce,
)

__all__ = [
    "VERDICTS",
    "Claim",
    "Outcome",
    "Scale",
    "Study",
    "Verdict",
    "available",
    "evidence",
    "load",
    "reproduce",
]
