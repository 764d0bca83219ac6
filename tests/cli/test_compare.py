"""`formwright compare` and `formwright report`: what they print, and with which status they end."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from formwright.cli import app

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("plotly")

SMALL = ["--task", "digits(examples=128)", "--vary", "hidden_size=16", "--vary", "num_hidden_layers=1", "--steps", "3"]


def formwright(*arguments):
    program = [sys.executable, "-c", "from formwright.cli import main; main()", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new" / "digits"
    grid = ["--vary", "mixer=softmax,aft-simple", "--vary", "position=learned(std=1.0),rope"]
    done = formwright("compare", *SMALL, *grid, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_compare_prints_the_table_and_writes_the_report(run):
    folder, done = run
    for said in ("softmax", "aft-simple", "learned(std=1.0)", "baseline", "majority", "report.html", "unsupported"):
        assert said in done.stdout
    assert (folder / "report.html").stat().st_size > 1e6
    assert "seed 0" in done.stderr


def test_compare_and_report_print_the_same_json(run):
    folder, _ = run
    found = json.loads(formwright("report", folder, "--json").stdout)
    labels = {row["label"] for row in found["rows"]}
    assert labels == {"softmax · learned(std=1.0)", "softmax · rope", "aft-simple · learned(std=1.0)"}
    assert found["missing"][0]["status"] == "unsupported"


def here(*arguments):
    """The same in this process, whose modules are imported already."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.mark.usefixtures("warm_workers")
def test_a_failed_trial_is_status_one(tmp_path):
    done = here("compare", *SMALL, "--vary", "learning_rate=0.001,1e30", "--seeds", 1, "--out", tmp_path)
    assert done.exit_code == 1
    assert "failed" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [one["status"] for one in records] == ["done", "failed"]
    assert "learning_rate below" in records[1]["error"]


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--vary", "mixer"], "write SLOT=first,second"),
        (["--vary", "mixer=softmax", "--vary", "mixer=aft"], "given twice"),
        (["--vary", "mixer=softmax,nothing"], "No mixer is called 'nothing'"),
        (["--vary", "mixer=softmax,aft-simple", "--learning-rates", "fast"], "write 0.001,0.002,0.004"),
        (["--vary", "mixer=softmax,aft-simple", "--data", "/nowhere", "--task", "mnist"], "mnist|MNIST|nowhere"),
    ],
)
def test_bad_input_is_status_two_and_one_sentence(tmp_path, arguments, says):
    task = [] if "--task" in arguments else ["--task", "digits"]
    done = here("compare", *task, *arguments, "--out", tmp_path / "run")
    assert done.exit_code == 2
    assert re.search(says, done.stderr)


def test_report_of_no_run_is_status_two(tmp_path):
    done = formwright("report", tmp_path)
    assert done.returncode == 2
    assert "holds no comparison" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_finished_and_says_how_to_go_on(tmp_path):
    arguments = [
        "compare",
        *SMALL[:-1],
        "60",
        "--vary",
        "mixer=softmax,aft-simple",
        "--seeds",
        "4",
        "--out",
        str(tmp_path),
    ]
    # a shell that runs the tests in the background lets its children ignore interrupts: this one must not
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = [sys.executable, "-c", f"{start}; from formwright.cli import main; main()", *arguments]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 200
    path = tmp_path / "records.jsonl"
    while (not path.exists() or not path.read_bytes().count(b"\n")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    count = path.read_bytes().count(b"\n")
    assert 1 <= count < 8
    assert f"saved in {tmp_path}: {count}." in errors
    assert "--vary mixer=softmax,aft-simple" in errors
