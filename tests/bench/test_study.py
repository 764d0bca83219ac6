"""Studies: read from YAML, run, and answered from the records; readings with other options of a task."""

import json

import pytest
import yaml
from typer.testing import CliRunner

import formwright
from formwright.bench import study as studies
from formwright.bench.records import Records
from formwright.cli import app
from formwright.errors import FormwrightError

TEXT = "char-lm(length=16, test=0.002, validation=0.002)"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "batch_size": 2}


@pytest.fixture
def plan(tmp_path):
    def write(**changes):
        given = {
            "title": "Small",
            "question": "Which one?",
            "task": TEXT,
            "vary": [
                {"position": "alibi"},
                {"position": "learned"},
                {"position": "t5"},
                {"mixer": "mamba", "position": "none"},
            ],
            "seeds": [0, 1],
            "steps": 1,
            "settings": SIZES,
            "match": "none",
            "read": {"length": [32]},
            "says": {"alibi": "Reads on."},
            "finding": "extrapolation",
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**given, **changes}.items() if v is not None}))
        return path

    return write


def test_a_study_reads_every_model_at_other_lengths_and_answers(plan, tmp_path):
    found = studies.study(plan(), out=tmp_path / "run", workers=1).found
    assert found == json.loads((tmp_path / "run" / "study.json").read_text())
    rows = {row["candidate"]: row for row in found["rows"]}
    assert rows["alibi"]["says"] == "Reads on."
    assert rows["alibi"]["converges"] == [True, True]
    assert rows["t5"]["converges"] == [False, False]
    assert rows["learned"]["converges"] == rows["mamba · none"]["converges"] == [None, None]
    far, near = rows["alibi"]["read"]["length=32"], rows["alibi"]["loss"]
    assert len(far) == len(near) == 2
    assert rows["alibi"]["rises"] == pytest.approx([b - a for a, b in zip(near, far, strict=True)])
    assert rows["learned"]["read"]["length=32"] == [None, None]
    assert "16" in rows["learned"]["unread"]["length=32"]
    assert rows["learned"]["rises"] == []
    assert "2 trained models whose series converges" in found["answer"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Read at other values of length" in page
    assert "plot-length" in page


def test_the_records_of_a_reading_are_losses_of_the_same_model_at_that_length(tmp_path):
    formwright.compare(
        TEXT, {"position": ["none"]}, steps=1, seeds=1, settings=SIZES, read={"length": [8]}, out=tmp_path, workers=1
    )
    (record,) = (one for one in Records(tmp_path) if one.purpose == "compare")
    assert record.metrics["loss at length=8"] == pytest.approx(record.metrics["loss"], abs=0.05)
    assert record.metrics["loss at length=8"] != record.metrics["loss"]


def row(name, rise, converges):
    far = [1.0 + rise, 1.1 + rise]
    return {"candidate": name, "loss": [1.0, 1.1], "seeds": [0, 1], "read": {"length=2": far}, "converges": converges}


@pytest.mark.parametrize(
    ("rises", "separates", "said"),
    [
        ({"a": (0.0, [True] * 2), "b": (0.5, [False] * 2), "c": (0.0, [None] * 2)}, True, "read on (c)"),
        ({"a": (0.3, [True] * 2), "b": (0.5, [False] * 2)}, False, "does not separate"),  # promised, and not kept
        ({"a": (0.015, [True] * 2), "b": (0.01, [True, False])}, False, "no necessary one"),  # kept without a promise
        ({"a": (0.0, [True] * 2)}, None, "could not be tried"),
    ],
)
def test_the_criterion_separates_only_when_no_model_is_on_the_wrong_side(rises, separates, said):
    plan = studies.Comparison(title="", question="", task="t", vary=[], seeds=[0, 1], read={"length": [2]})
    found = studies.extrapolation(plan, "loss", [row(name, *one) for name, one in rises.items()])
    assert found.get("separates") is separates
    assert said in found["answer"]


def test_the_studies_that_come_with_formwright_are_readable_and_speak_of_their_candidates():
    assert "extrapolation" in studies.names()
    for plan in map(studies.read_study, studies.names()):
        if not isinstance(plan, studies.Comparison) or plan.finding is None:
            continue
        assert set(plan.says) == {" · ".join(one.values()) for one in plan.vary}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 3}, "seed"),
        ({"seeds": "many"}, "seeds"),
        ({"title": None}, "title"),
        ({"says": {"rope": "?"}}, "says something of rope"),
        ({"vary": [{"position": "alibi"}, {"position": "alibi"}]}, "alibi twice"),
        ({"vary": [{}], "says": None}, "must say what is tried"),
        ({"read": {"length": [16]}}, "its own length anyway"),
        ({"read": {"length": []}}, "no value for length"),
        ({"read": {"depth": [3]}}, "depth"),
        ({"baseline": "position=rope"}, "position=alibi,learned"),
    ],
)
def test_a_bad_study_is_one_sentence_and_status_2(plan, tmp_path, changes, said):
    answer = CliRunner().invoke(app, ["study", str(plan(**changes)), "--out", str(tmp_path / "run"), "--workers", "1"])
    assert answer.exit_code == 2
    assert said in answer.output
    assert "Traceback" not in answer.output


@pytest.mark.parametrize("text", ["{", "- 1", ""])
def test_a_file_that_is_no_study_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(FormwrightError, match=r"x\.yaml is no"):
        studies.read_study(path)


def test_an_unknown_name_lists_the_studies():
    with pytest.raises(FormwrightError, match="extrapolation"):
        studies.read_study("extrapolate")


def test_the_call_of_candidates_named_one_by_one_is_recorded_as_it_was(tmp_path):
    given = [{"position": "none"}, {"mixer": "aft-simple", "position": "none"}]
    formwright.compare(TEXT, given, steps=1, seeds=1, settings=SIZES, match="none", out=tmp_path, workers=1)
    command = json.loads((tmp_path / "run.json").read_text())["command"]
    assert json.dumps(given) in command
