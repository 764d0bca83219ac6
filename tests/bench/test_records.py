"""Records survive a kill at any byte, are found by their key, and keep what was put in."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from formwright.bench import records
from formwright.bench.records import Record, Records
from formwright.errors import FormwrightError


def record(seed=0, **facts):
    config = {"mixer": "softmax"}
    return Record(
        key=records.key("digits", config, seed, {}),
        task="digits",
        candidate=config,
        config=config,
        seed=seed,
        **{"status": "done", "metrics": {"accuracy": 0.5}, **facts},
    )


def write(folder, *seeds):
    with Records(folder, write=True) as log:
        for seed in seeds:
            log.append(record(seed))


def test_a_key_ignores_the_order_of_fields_and_nothing_else():
    one = records.key("t", {"a": 1, "b": 2}, 0, {"steps": 5})
    assert one == records.key("t", {"b": 2, "a": 1}, 0, {"steps": 5})
    others = [
        records.key("u", {"a": 1, "b": 2}, 0, {"steps": 5}),
        records.key("t", {"a": 1, "b": 3}, 0, {"steps": 5}),
        records.key("t", {"a": 1, "b": 2}, 1, {"steps": 5}),
        records.key("t", {"a": 1, "b": 2}, 0, {"steps": 6}),
    ]
    assert len({one, *others}) == 5


def test_what_is_appended_is_read_back(tmp_path):
    write(tmp_path, 0, 1)
    assert list(Records(tmp_path)) == [record(0), record(1)]


def test_a_file_cut_at_any_byte_loses_only_the_cut_line(tmp_path):
    write(tmp_path, 0, 1, 2)
    path = tmp_path / records.RECORDS
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(ends[0] - 2, ends[0] + 3), *range(ends[1] + 1, len(whole), 37), len(whole) - 1}:
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        assert len(Records(tmp_path)) == kept
        with Records(tmp_path, write=True) as log:
            assert len(log) == kept
            log.append(record(9))
        assert [one.seed for one in Records(tmp_path)] == [*range(kept), 9]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    write(tmp_path, 0, 1)
    path = tmp_path / records.RECORDS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[1]]) + "\n")
    with pytest.raises(FormwrightError, match=r"line 2 is no record"):
        Records(tmp_path)


def test_a_later_record_of_a_trial_counts(tmp_path):
    with Records(tmp_path, write=True) as log:
        log.append(record(0, status="failed", error="it broke"))
        log.append(record(0))
    assert [one.status for one in Records(tmp_path)] == ["done"]


def test_two_runs_cannot_write_at_once(tmp_path):
    with Records(tmp_path, write=True):
        program = f"from formwright.bench.records import Records; Records({str(tmp_path)!r}, write=True)"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode
    assert "Another run is writing" in found.stderr


def test_numbers_json_has_not_become_null(tmp_path):
    with Records(tmp_path, write=True) as log:
        log.append(record(0, metrics={"loss": math.nan, "accuracy": np.float32(0.5)}))
    line = json.loads((tmp_path / records.RECORDS).read_text())
    assert line["metrics"] == {"loss": None, "accuracy": 0.5}


def test_a_folder_of_another_run_is_refused_by_the_setting_that_differs(tmp_path):
    records.write_run(tmp_path, {"settings": {"steps": 10, "match": "params"}})
    records.check_same_run(tmp_path, {"match": "params", "steps": 10})
    with pytest.raises(FormwrightError, match="steps = 10, and this one has 20: choose another folder"):
        records.check_same_run(tmp_path, {"match": "params", "steps": 20})


@pytest.mark.parametrize("count", [1, 7, 8, 63])
def test_items_are_packed_exactly(count):
    rng = np.random.default_rng(count)
    hits, losses = rng.random(count) < 0.5, rng.random(count).astype(np.float16)
    assert records.pack(hits)["kind"] == "bits"
    assert np.array_equal(records.unpack(records.pack(hits)), hits.astype(float))
    assert np.array_equal(records.unpack(records.pack(losses)), losses.astype(float))


def test_a_loss_too_large_for_its_sixteen_bits_stays_a_number():
    packed = records.unpack(records.pack([1e6, 0.5, -1e6]))
    assert packed.tolist() == [65504.0, 0.5, -65504.0]


def test_the_environment_names_what_a_result_depends_on():
    facts = records.environment()
    assert {"torch", "transformers", "formwright", "python", "cpu", "instructions", "threads"} <= set(facts)
    assert facts["speed_gflops"] > 0
