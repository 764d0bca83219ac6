"""Comparisons: what is trained, what is refused, what a kill costs. The models are small: only the frame is tested."""

import itertools
import json
import math
import shutil
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
pytestmark = pytest.mark.usefixtures("warm_workers")
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


def test_a_finished_run_does_nothing_twice_and_takes_more_seeds(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    before = (folder / records.RECORDS).read_bytes()
    compare(TASK, GRID, steps=3, out=folder, workers=1, settings=SMALL)
    assert (folder / records.RECORDS).read_bytes() == before
    again = compare(TASK, GRID, steps=3, seeds=3, out=folder, workers=2, settings=SMALL)
    after = (folder / records.RECORDS).read_bytes()
    assert after.startswith(before)
    assert [one.seed for one in list(Records(folder))[7:]] == [2, 2, 2]
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


# Killed as it writes its second record, while the worker is at the next one; it tells its number first.
PROGRAM = f"""
import os, signal, sys
from pathlib import Path
from formwright.bench.compare import compare
from formwright.bench.records import Records

append, grid = Records.append, {{"mixer": ["softmax", "aft-simple"]}}

def last(self, record):
    append(self, record)
    if len(self) == 2:
        threads = Path("/proc/self/task").glob("*/children")
        print(*(thread.read_text() for thread in threads), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

Records.append = last
compare({TASK!r}, grid, steps=3, seeds=3, out=sys.argv[1], workers=1, settings={SMALL!r})
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_with_nothing_lost_or_run_twice(tmp_path):
    path = tmp_path / records.RECORDS
    first = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path], capture_output=True, text=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr
    kept = path.read_bytes()
    assert kept.count(b"\n") == 2
    workers = first.stdout.split()
    assert len(workers) == 1
    until = time.monotonic() + 100
    while any(running(worker) for worker in workers):  # they end with it, though nobody tells them
        assert time.monotonic() < until
        time.sleep(0.05)
    path.write_bytes(kept + b'{"key":"torn","task":"dig')
    compare(TASK, {"mixer": ["softmax", "aft-simple"]}, steps=3, seeds=3, out=tmp_path, settings=SMALL)
    assert path.read_bytes().startswith(kept)
    keys = [one["key"] for one in lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 6
    assert all(one["status"] == "done" for one in lines(tmp_path))


def running(worker):
    """Whether the process runs; one that ended may wait for a parent that never asks."""
    try:
        return Path(f"/proc/{worker}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


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


ANSWERS = "import json, os, sys\nfor line in sys.stdin: print(json.dumps({'done': os.getpid()}), flush=True)"


def test_a_worker_that_is_killed_costs_its_job_alone(tmp_path, monkeypatch):
    team = LocalPool(1, tmp_path / "log")
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: start([sys.executable, "-c", ANSWERS], **rest))
    try:
        (first, again) = team.run([{"kind": "describe"}, {"kind": "describe"}])
        assert first[1] == again[1] == {"done": team._processes[0].pid}
        team._processes[0].kill()
        team._processes[0].wait()
        (other,) = team.run([{"kind": "describe"}])
        assert other[1]["done"] == team._processes[0].pid != first[1]["done"]
    finally:
        team.close()
    assert team._processes[0].poll() is not None


def test_a_size_that_could_not_be_measured_is_tried_again(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    before = records.read_run(tmp_path / "run")
    kept = [one if one["candidate"]["mixer"] == "softmax" else lost(one) for one in before["candidates"]]
    records.write_run(tmp_path / "run", {**before, "candidates": kept})
    compare(TASK, GRID, steps=3, out=tmp_path / "run", workers=1, settings=SMALL)
    again = records.read_run(tmp_path / "run")["candidates"]
    assert {one["status"] for one in again} == {"ready", "unsupported"}
    sizes = {records.canonical(one["candidate"]): one.get("params") for one in before["candidates"]}
    assert {records.canonical(one["candidate"]): one.get("params") for one in again} == sizes


def lost(known):
    """A candidate whose worker was killed while it was measured."""
    facts = {name: known[name] for name in ("candidate", "notes", "config")}
    return {**facts, "latency_ms": None, "latency_ratio": None, "status": "failed", "error": "It was killed."}


def test_a_file_in_the_users_folder_does_not_stand_in_for_a_module(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    worker = LocalPool(1, tmp_path / "log")._start()
    worker.stdin.close()  # with nothing to do it ends at once
    worker.stdout.close()
    assert worker.wait(60) == 0


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
        ({"mixer": ["softmax", "[softmax,aft-simple"]}, {}, r"'\[softmax,aft-simple' has no closing bracket"),
        ({"mixer": ["softmax", "softmax()"]}, {}, "twice"),
        ({}, {}, "nothing to compare"),
        ({"mixer": ["softmax", "aft-simple"]}, {"match": "size"}, "params, flops or none"),
        ({"mixer": ["softmax", "aft-simple"]}, {"seeds": 0}, "at least one is needed"),
        ({"mixer": ["softmax", "aft-simple"]}, {"steps": 0}, "at least one is needed"),
        ({"mixer": ["softmax", "aft-simple"]}, {"baseline": "mixer=mamba"}, "not among those varied"),
        ({"mixer": ["softmax", "aft-simple"]}, {"baseline": "norm=rmsnorm"}, "names none of what is varied"),
        ({"mixer": ["softmax", "aft-simple"]}, {"backend": "slurm"}, "use local or ray"),
        ({"mixer": ["softmax", "aft-simple"]}, {"workers": 0}, "at least one must do the work"),
        ({"mixer": ["softmax", "aft-simple"]}, {"baseline": ""}, "names none of what is varied"),
        ({"mixer": ["softmax", "aft-simple"]}, {"learning_rates": [0.0]}, "rates above 0"),
        ({"mixer": ["softmax", "aft-simple"]}, {"learning_rates": [1e-3, math.nan]}, "rates above 0"),
        ({"mixer": ["softmax", "aft-simple"]}, {"learning_rates": [math.inf]}, "rates above 0"),
        ({"mixer": ["softmax", "aft-simple"]}, {"settings": {"steps": "ten"}}, "steps is 'ten', .* a whole number"),
        ({"mixer": ["softmax", "aft-simple"]}, {"settings": {"steps": 0}}, "steps is 0"),
        ({"learning_rate": ["fast", 0.1]}, {}, "learning_rate is 'fast', .* a number"),
        ({"batch_size": [16, 2.5]}, {}, "batch_size is 2.5, .* a whole number"),
        ({"schedule": ["cosine", "stairs"]}, {}, "cosine, constant or linear"),
        ({"betas": [(0.9, 0.99), 0.9]}, {}, "betas is 0.9, .* a pair of numbers"),
        ({"mixer": ["softmax", "aft-simple"]}, {"settings": {"mixer": "aft"}}, "varied and set at once"),
        ({"seed": [0, 1]}, {}, "give seeds instead"),
        ({"save_every": [0, 10]}, {}, "no use here"),
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
        found = Records(folder)
        return {(records.canonical(one.candidate), one.seed): (one.status, one.metrics) for one in found}

    assert results(found.folder) == results(run.folder)
