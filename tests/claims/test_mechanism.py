"""The claims mechanism, on made-up claims: judged by rule, run in processes, resumed after a kill."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from formwright import claims
from formwright.claims.base import Claim, Outcome, SeedFailed, recorded, study
from formwright.cli import app
from formwright.errors import FormwrightError

MADE_UP = '''
"""Claim: ours is lower.

Rule  holds                ours <= 0.5 for every seed
      holds in direction   ours < theirs for every seed
"""

import os
import time
from pathlib import Path

from formwright.claims import Outcome
from formwright.errors import FormwrightError

STATEMENT = "Ours is lower."
PAPER = {"ours": 1.0, "theirs": 2.0}
RULE = "holds: ours <= 0.5 for every seed; holds in direction: ours < theirs for every seed"
SEEDS = (0, 1, 2)


def run(scale, seed):
    marks = Path(os.environ["MARKS"])
    with (marks / f"{seed}.started").open("a") as file:
        file.write("x")
    if seed == 1 and (marks / "slow").exists():
        time.sleep(600)
    if seed == 1 and (marks / "broken").exists():
        raise ZeroDivisionError("seed one broke")
    if seed == 1 and (marks / "no-data").exists():
        raise FormwrightError("There is no data.")
    import torch

    threads = torch.get_num_threads()
    return Outcome(scale=scale, seed=seed, measured={"ours": 0.1 * seed, "threads": threads}, baseline={"theirs": 1.0})


def verdict(outcomes):
    ours = [outcome.measured["ours"] for outcome in outcomes]
    if max(ours) <= 0.5:
        return "holds"
    lower = all(outcome.measured["ours"] < outcome.baseline["theirs"] for outcome in outcomes)
    return "holds in direction" if lower else "does not hold here"
'''


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A claim module in a folder of its own, where worker processes find it too."""
    (tmp_path / "made_up_claim.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MARKS", str(tmp_path))
    monkeypatch.delitem(sys.modules, "made_up_claim", raising=False)
    return study("made-up", __import__("made_up_claim"))


def outcomes(ours, theirs, scale="full"):
    pairs = enumerate(zip(ours, theirs, strict=True))
    return [Outcome(scale=scale, seed=s, measured={"ours": a}, baseline={"theirs": b}) for s, (a, b) in pairs]


def starts(folder, seed):
    path = folder / f"{seed}.started"
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((0.1, 0.2, 0.5), (1.0, 1.0, 1.0), "holds"),
        ((0.1, 0.2, 0.6), (1.0, 1.0, 1.0), "holds in direction"),
        ((0.1, 0.2, 1.1), (1.0, 1.0, 1.0), "does not hold here"),
    ],
)
def test_the_verdict_follows_from_the_outcomes(made_up, ours, theirs, verdict):
    found = claims.evidence(made_up, outcomes(ours, theirs))
    assert [claim["verdict"] for claim in found["claims"]] == [verdict]


def test_evidence_keeps_the_values_in_the_order_of_the_seeds_and_is_json(made_up):
    found = claims.evidence(made_up, outcomes((0.3, 0.1, 0.2), (1.0, 2.0, 3.0))[::-1])
    claim = json.loads(json.dumps(found, allow_nan=False))["claims"][0]
    assert claim["measured"]["ours"]["values"] == [0.3, 0.1, 0.2]
    assert claim["measured"]["ours"]["mean"] == pytest.approx(0.2)
    assert claim["measured"]["ours"]["std"] == pytest.approx(0.1)
    assert claim["baseline"]["theirs"]["values"] == [1.0, 2.0, 3.0]
    assert set(claim) == {"statement", "paper", "measured", "baseline", "rule", "verdict", "seeds", "scale"}
    assert set(found) == {"slug", "claims", "seconds", "environment", "version", "date"}


def test_a_missing_seed_or_two_scales_give_no_verdict(made_up):
    three = outcomes((0.1, 0.1, 0.1), (1.0, 1.0, 1.0))
    with pytest.raises(FormwrightError, match="judged from the seeds"):
        claims.evidence(made_up, three[:2])
    with pytest.raises(FormwrightError, match="one scale"):
        claims.evidence(made_up, [*three[:2], *outcomes((0.1,) * 3, (1.0,) * 3, scale="smoke")[2:]])


def test_a_word_that_is_no_verdict_is_refused():
    claim = Claim(statement="s", paper={"x": 1}, rule="r", verdict=lambda _: "proven")
    with pytest.raises(FormwrightError, match="'proven'"):
        claim.judge([])


def test_a_number_that_is_not_finite_is_refused():
    with pytest.raises(FormwrightError, match="loss = nan"):
        Outcome(scale="full", seed=0, measured={"loss": float("nan")})


def module(**names):
    made = ModuleType("made")
    made.__dict__.update(names)
    return made


WHOLE = {
    "STATEMENT": "s",
    "PAPER": {"x": 1},
    "RULE": "r",
    "SEEDS": (0, 1, 2),
    "run": print,  # never called
    "verdict": lambda _: "holds",
}


@pytest.mark.parametrize("gone", WHOLE)
def test_a_claim_file_that_lacks_a_name_is_told_which(gone):
    with pytest.raises(FormwrightError, match=rf"does not define {gone}\b"):
        study("made", module(**{name: value for name, value in WHOLE.items() if name != gone}))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"SEEDS": (0, 1)}, "three"), ({"SEEDS": (0, 0, 1)}, "three"), ({"RULE": " "}, "empty"), ({"PAPER": {}}, "empty")],
)
def test_an_empty_field_or_too_few_seeds_are_refused(change, says):
    with pytest.raises(FormwrightError, match=says):
        study("made", module(**{**WHOLE, **change}))


def test_several_claims_share_one_run_and_show_their_own_numbers():
    two = [
        Claim(statement="low", paper={"x": 1}, rule="r", verdict=lambda _: "holds", shows=("ours",)),
        Claim(statement="high", paper={"x": 1}, rule="r", verdict=lambda _: "does not hold here", shows=("theirs",)),
    ]
    found = claims.evidence(
        study("made", module(CLAIMS=two, SEEDS=(0, 1, 2), run=WHOLE["run"])), outcomes((1, 1, 1), (2, 2, 2))
    )
    low, high = found["claims"]
    assert (low["verdict"], high["verdict"]) == ("holds", "does not hold here")
    assert (set(low["measured"]), set(low["baseline"])) == ({"ours"}, set())
    assert (set(high["measured"]), set(high["baseline"])) == (set(), {"theirs"})


def test_every_seed_runs_once_in_a_one_thread_process_and_is_kept(made_up, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    first = list(claims.reproduce(made_up, "smoke", runs=tmp_path / "runs", workers=2))
    assert {(outcome.seed, how) for outcome, how in first} == {(0, "ran"), (1, "ran"), (2, "ran")}
    assert all(outcome.measured["threads"] == 1 and outcome.seconds > 0 for outcome, _ in first)
    second = list(claims.reproduce(made_up, "smoke", runs=tmp_path / "runs"))
    assert sorted((outcome for outcome, _ in first), key=lambda o: o.seed) == [outcome for outcome, _ in second]
    assert {how for _, how in second} == {"kept"}
    assert [starts(tmp_path, seed) for seed in (0, 1, 2)] == [1, 1, 1]


def test_what_other_code_or_another_scale_measured_does_not_count(made_up, tmp_path):
    path = tmp_path / "made-up.jsonl"
    lines = [
        {"slug": "made-up", "code": code, "outcome": {"scale": scale, "seed": seed, "measured": {}, "baseline": {}}}
        for seed, code, scale in [(0, made_up.code, "full"), (1, "older", "full"), (2, made_up.code, "smoke")]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"slug": "made-up", "co')
    assert list(recorded(path, made_up, "full")) == [0]
    assert list(recorded(path, made_up, "smoke")) == [2]


def test_the_code_of_a_claim_changes_with_its_file(made_up, tmp_path):
    (tmp_path / "made_up_claim.py").write_text(MADE_UP + "\n# changed\n")
    assert study("made-up", sys.modules["made_up_claim"]).code != made_up.code


def test_a_seed_that_breaks_leaves_the_others_kept(made_up, tmp_path):
    (tmp_path / "broken").touch()
    with pytest.raises(SeedFailed, match="seed 1: ZeroDivisionError: seed one broke"):
        list(claims.reproduce(made_up, "smoke", runs=tmp_path / "runs", workers=1))
    (tmp_path / "broken").unlink()
    again = list(claims.reproduce(made_up, "smoke", runs=tmp_path / "runs", workers=1))
    assert [(outcome.seed, how) for outcome, how in again] == [(0, "kept"), (2, "kept"), (1, "ran")]


def test_bad_input_in_a_seed_stays_bad_input(made_up, tmp_path):
    (tmp_path / "no-data").touch()
    with pytest.raises(FormwrightError, match=r"There is no data\."):
        list(claims.reproduce(made_up, "smoke", runs=tmp_path / "runs", workers=1))


def test_no_process_is_no_way_to_run(made_up, tmp_path):
    with pytest.raises(FormwrightError, match="workers is 0"):
        list(claims.reproduce(made_up, "smoke", runs=tmp_path / "runs", workers=0))


def test_kill_minus_nine_loses_no_finished_seed_and_leaves_no_process(made_up, tmp_path):
    (tmp_path / "slow").touch()
    runs = tmp_path / "runs"
    script = tmp_path / "go.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from formwright import claims\n"
        "from formwright.claims.base import study\n"
        "import made_up_claim\n"
        "if __name__ == '__main__':\n"
        f"    list(claims.reproduce(study('made-up', made_up_claim), 'smoke', runs=Path({str(runs)!r}), workers=2))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "MARKS": str(tmp_path)})
    until = time.monotonic() + 120
    while len(recorded(runs / "made-up.jsonl", made_up, "smoke")) < 2:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    workers = children(process.pid)
    assert workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(running(pid) for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.1)
    (tmp_path / "slow").unlink()
    again = list(claims.reproduce(made_up, "smoke", runs=runs, workers=1))
    assert [(outcome.seed, how) for outcome, how in again] == [(0, "kept"), (2, "kept"), (1, "ran")]
    assert [starts(tmp_path, seed) for seed in (0, 1, 2)] == [1, 2, 1]


def test_a_run_that_is_left_waits_for_no_seed_and_keeps_the_finished_ones(made_up, tmp_path):
    (tmp_path / "slow").touch()
    going = claims.reproduce(made_up, "smoke", runs=tmp_path / "runs", workers=1)
    assert next(going)[0].seed == 0
    until = time.monotonic() + 120
    while not starts(tmp_path, 1):
        assert time.monotonic() < until
        time.sleep(0.05)
    before = {process.pid for process in multiprocessing.active_children()}
    going.close()
    assert time.monotonic() < until, "It waited for a seed that takes ten minutes."
    assert len(before - {process.pid for process in multiprocessing.active_children()}) == 1
    assert list(recorded(tmp_path / "runs" / "made-up.jsonl", made_up, "smoke")) == [0]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid):
    """Whether the process runs; one that ended and waits for its parent does not."""
    try:
        return re.search(r"^State:\s+[^ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_command_writes_at_full_scale_what_it_prints(made_up, tmp_path, monkeypatch):
    def at_once(of, scale, *, runs, workers):
        assert (of, runs, workers) == (made_up, tmp_path / "runs" / "claims", 1)
        return ((outcome, "ran") for outcome in outcomes((0.1, 0.2, 0.3), (1.0, 1.0, 1.0), scale=scale))

    monkeypatch.setattr(claims, "load", lambda _: made_up)
    monkeypatch.setattr(claims, "reproduce", at_once)
    called = ["reproduce", "made-up", "--out", str(tmp_path), "--json", "--workers", "1"]
    smoke = CliRunner().invoke(app, called)
    assert (smoke.exit_code, json.loads(smoke.stdout)["claims"][0]["scale"]) == (0, "smoke")
    assert not (tmp_path / "evidence").exists()
    full = CliRunner().invoke(app, [*called, "--scale", "full"])
    assert full.exit_code == 0
    assert json.loads((tmp_path / "evidence" / "made-up.json").read_text()) == json.loads(full.stdout)


def test_the_command_ends_with_one_when_a_seed_broke(made_up, tmp_path, monkeypatch):
    (tmp_path / "broken").touch()
    monkeypatch.setattr(claims, "load", lambda _: made_up)
    broken = CliRunner().invoke(app, ["reproduce", "made-up", "--out", str(tmp_path), "--workers", "1"])
    assert broken.exit_code == 1
    assert "seed one broke" in " ".join(broken.output.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["nosuchthing"], "nosuchthing"), (["pfm-survey"], "status"), (["polycom", "--data", "x"], "x")],
)
def test_the_command_ends_with_two_on_bad_input(arguments, says):
    bad = CliRunner().invoke(app, ["reproduce", *arguments])
    assert bad.exit_code == 2
    assert says in bad.output


def test_the_command_tries_its_folder_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "load", lambda _: study("made", module(**WHOLE)))
    monkeypatch.setattr(claims, "reproduce", lambda *_, **__: pytest.fail("it began to work"))
    (tmp_path / "file").touch()
    bad = CliRunner().invoke(app, ["reproduce", "made", "--out", str(tmp_path / "file")])
    assert bad.exit_code == 2
    assert "Not a directory" in bad.output


def test_an_unknown_system_is_a_sentence():
    with pytest.raises(FormwrightError, match="No system is called 'nosuchthing'"):
        claims.load("nosuchthing")


def test_a_system_without_a_claim_file_is_told_its_status():
    with pytest.raises(FormwrightError, match=r"pfm-survey has no claim to reproduce: its status is \w+"):
        claims.load("pfm-survey")


@pytest.mark.parametrize("slug", claims.available())
def test_a_claim_file_says_what_it_does_before_it_does_it(slug):
    of = claims.load(slug)
    docstring = sys.modules[of.run.__module__].__doc__ or ""
    assert docstring.startswith("Claim")
    for heading in ("Paper", "Here", "Fair", "Rule"):
        assert re.search(rf"^{heading}\b", docstring, re.MULTILINE), f"{slug} has no paragraph {heading}."
    for claim in of.claims:
        assert "holds" in claim.rule
        assert "holds in direction" in claim.rule
