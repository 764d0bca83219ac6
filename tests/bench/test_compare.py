"""Comparisons: what is trained, what is refused, what a kill costs. The models are small: only the frame is tested."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jaxtyping
import pytest

from formwright.bench import records
from formwright.bench.compare import compare
from formwright.bench.pool import LocalPool, pool
from formwright.bench.records import Records
from formwright.errors import FormwrightError

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("plotly")

TASK = "digits(examples=128)"
GRID = {"mixer": ["softmax", "aft-simple"], "position": ["learned", "rope"]}
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """softmax and aft with added and rotary positions: aft and rope do not combine."""
    folder = tmp_path_factory.mktemp("run")
    return compare(TASK, GRID, steps=3, out=folder, workers=2, settings=SMALL)


def plainly(function):
    """The function without the type checks of the test run, which would come first."""
    return getattr(function, "__wrapped__", function)


def lines(folder):
    return [json.loads(line) for line in (folder / records.RECORDS).read_text().splitlines()]


def test_every_combination_and_seed_is_there_once(run):
    found = {(one["candidate"]["mixer"], one["candidate"]["position"], one["seed"]) for one in lines(run.folder)}
    combined = itertools.product((("softmax", "learned"), ("softmax", "rope"), ("aft-simple", "learned")), (0, 1))
    assert found == {*((*parts, seed) for parts, seed in combined), ("aft-simple", "rope", 0)}
    assert len(lines(run.folder)) == 7


def test_parts_that_do_not_combine_are_a_record_with_the_reason(run):
    refused = [one for one in Records(run.folder) if one.status == "unsupported"]
    assert [one.candidate for one in refused] == [{"mixer": "aft-simple", "position": "rope"}]
    assert "rope" in refused[0].error
    assert run.failed == 0


def test_budgets_are_equal(run):
    done = [one for one in Records(run.folder) if one.status == "done"]
    base = next(one.params for one in done if one.candidate == {"mixer": "softmax", "position": "learned"})
    assert all(abs(one.params / base - 1) <= 0.01 for one in done)
    assert len({one.config.get("intermediate_size") for one in done}) > 1


def test_a_record_has_all_that_was_measured(run):
    for one in Records(run.folder):
        if one.status == "done":
            assert one.flops > 0
            assert one.latency_ms > 0
            assert one.peak_memory_mb > 0
            assert one.seconds > 0
            assert set(one.metrics) == {"accuracy", "loss"}
            assert [step for step, _ in one.curve] == [1, 2, 3]
            assert one.environment["torch"]
            assert len(records.unpack(one.items)) == 500
            assert records.unpack(one.items).mean() == pytest.approx(one.metrics["accuracy"])
            assert one.settings["steps"] == 3


def test_a_finished_run_does_nothing_twice_and_takes_more_seeds(run):
    before = (run.folder / records.RECORDS).read_bytes()
    compare(TASK, GRID, steps=3, out=run.folder, workers=1, settings=SMALL)
    assert (run.folder / records.RECORDS).read_bytes() == before
    again = compare(TASK, GRID, steps=3, seeds=3, out=run.folder, workers=2, settings=SMALL)
    after = (run.folder / records.RECORDS).read_bytes()
    assert after.startswith(before)
    assert [one.seed for one in list(Records(run.folder))[7:]] == [2, 2, 2]
    assert {len(row.seeds) for row in again.summary.rows} == {3}


def test_other_settings_need_another_folder(run):
    with pytest.raises(FormwrightError, match="steps = 3, and this one has 4"):
        compare(TASK, GRID, steps=4, out=run.folder, settings=SMALL)


def test_the_same_seed_gives_the_same_result(run, tmp_path):
    learned = {**SMALL, "position": "learned"}
    twin = compare(
        TASK, {"mixer": ["softmax", "aft-simple"]}, steps=3, seeds=1, out=tmp_path, workers=1, settings=learned
    )
    ours = {one.candidate["mixer"]: one.metrics for one in Records(twin.folder)}
    theirs = [one for one in Records(run.folder) if one.candidate["position"] == "learned" and one.seed == 0]
    assert ours == {one.candidate["mixer"]: one.metrics for one in theirs}


PROGRAM = f"""
from formwright.bench.compare import compare
import sys
grid = {{"mixer": ["softmax", "aft-simple"]}}
compare({TASK!r}, grid, steps=30, seeds=3, out=sys.argv[1], workers=2, settings={SMALL!r})
"""


def count(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_with_nothing_lost_or_run_twice(tmp_path):
    path = tmp_path / records.RECORDS
    first = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while count(path) < 2 and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    workers = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert 2 <= count(path) < 6, "the run was over, or had not begun, before it could be killed"
    kept = path.read_bytes()
    for worker in workers:  # they end with the parent, though nobody told them
        while os.path.exists(f"/proc/{worker}") and time.monotonic() < until:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{worker}")
    path.write_bytes(kept + b'{"key":"torn","task":"dig')
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], check=True, capture_output=True)
    assert path.read_bytes().startswith(kept)
    keys = [one["key"] for one in lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 6
    assert all(one["status"] == "done" for one in lines(tmp_path))


def children(parent):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry))
    return found


def test_every_candidate_gets_its_own_learning_rate(tmp_path):
    rates = [1e-5, 3e-3]
    compare(
        TASK, {"mixer": ["softmax", "aft-simple"]}, steps=8, seeds=1, learning_rates=rates, out=tmp_path, settings=SMALL
    )
    found = list(Records(tmp_path))
    tried = [one for one in found if one.purpose == "rate"]
    assert sorted(one.settings["learning_rate"] for one in tried) == [1e-5, 1e-5, 3e-3, 3e-3]
    assert {one.settings["steps"] for one in tried} == {2}
    assert all(one.items is None for one in tried)
    for one in found:
        if one.purpose == "compare":
            own = [other for other in tried if other.candidate == one.candidate]
            best = min(own, key=lambda other: other.metrics["loss"])
            assert one.settings["learning_rate"] == best.settings["learning_rate"]
            assert one.settings["steps"] == 8


def test_a_worker_that_is_killed_costs_its_job_alone(tmp_path):
    team = LocalPool(1, tmp_path / "log")
    try:
        job = {"kind": "describe", "task": TASK, "data": None}
        (first,) = team.run([job])
        assert "done" in first[1]
        team._processes[0].kill()
        team._processes[0].wait()
        (second,) = team.run([job])
        assert "done" in second[1]
        doomed = team.run([{"kind": "describe", "task": "no-such-task", "data": None}])
        assert "There is no task" in next(doomed)[1]["refused"]
    finally:
        team.close()


def test_a_worker_that_dies_is_reported_by_its_signal(tmp_path, monkeypatch):
    team = LocalPool(1, tmp_path / "log")
    program = "import os, signal, sys; sys.stdin.readline(); os.kill(os.getpid(), signal.SIGKILL)"
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: start([sys.executable, "-c", program], **rest))
    (answer,) = team.run([{"kind": "describe"}])
    assert "SIGKILL" in answer[1]["failed"]
    team.close()


@pytest.mark.parametrize(
    ("grid", "more", "says"),
    [
        ({"mixer": ["sofmax", "aft"]}, {}, "No mixer is called 'sofmax'"),
        ({"mixr": ["softmax", "aft-simple"]}, {}, "Did you mean mixer"),
        ({"mixer": []}, {}, "no value to try"),
        ({"mixer": ["softmax", "softmax()"]}, {}, "twice"),
        ({}, {}, "nothing to compare"),
        ({"mixer": ["softmax", "aft-simple"]}, {"match": "size"}, "params, flops or none"),
        ({"mixer": ["softmax", "aft-simple"]}, {"seeds": 0}, "at least one is needed"),
        ({"mixer": ["softmax", "aft-simple"]}, {"steps": 0}, "at least one is needed"),
        ({"mixer": ["softmax", "aft-simple"]}, {"baseline": "mixer=mamba"}, "not among those varied"),
        ({"mixer": ["softmax", "aft-simple"]}, {"baseline": "norm=rmsnorm"}, "names none of what is varied"),
        ({"mixer": ["softmax", "aft-simple"]}, {"backend": "slurm"}, "use local or ray"),
        ({"mixer": ["softmax", "aft-simple"]}, {"workers": 0}, "at least one must do the work"),
        ({"mixer": ["softmax", "aft-simple"]}, {"learning_rates": [0.0]}, "rates above 0"),
        ({"mixer": ["softmax", "aft-simple"]}, {"settings": {"mixer": "aft"}}, "varied and set at once"),
        ({"seed": [0, 1]}, {}, "give seeds instead"),
    ],
)
def test_bad_input_is_a_sentence_before_any_work(tmp_path, grid, more, says, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its check of the Literals would come first
    with pytest.raises(FormwrightError, match=says):
        plainly(compare)(TASK, grid, out=tmp_path / "run", **more)


@pytest.mark.parametrize("asked", ["mixer=aft-simple", "aft-simple", {"mixer": "aft-simple"}])
def test_the_baseline_is_the_one_that_was_named(asked):
    from formwright.bench.compare import _Choice

    grid = {"mixer": ["softmax", "aft-simple"], "position": ["learned(std=1.0)", "rope"]}
    chosen = _Choice(TASK, grid, "params", 2, None, None, asked, None, None)
    assert chosen.baseline == {"mixer": "aft-simple", "position": "learned(std=1.0)"}
    assert len(chosen.candidates) == 4


def test_an_unknown_task_ends_before_anything_is_written(tmp_path):
    with pytest.raises(FormwrightError, match="There is no task 'digts'"):
        compare("digts", {"mixer": ["softmax", "aft-simple"]}, out=tmp_path)
    assert not list(Records(tmp_path))


@pytest.mark.slow
def test_ray_gives_what_local_processes_give(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        assert pool("ray", None, tmp_path / "log").workers == 2
        found = compare(TASK, GRID, steps=3, out=tmp_path / "run", backend="ray", settings=SMALL)
    finally:
        ray.shutdown()
        cluster.shutdown()

    def results(folder):
        first = [one for one in Records(folder) if one.seed < 2]
        return {(records.canonical(one.candidate), one.seed): (one.status, one.metrics) for one in first}

    assert results(found.folder) == results(run.folder)
