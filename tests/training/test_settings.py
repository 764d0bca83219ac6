"""Settings: the schedules by their numbers, and impossible values as sentences."""

import subprocess
import sys
from itertools import pairwise

import pytest

from formwright.errors import FormwrightError
from formwright.training import Settings


def test_the_rate_rises_to_1_and_falls_to_2_percent():
    for schedule in ("cosine", "linear"):
        rates = [Settings(steps=100, warmup=0.05, schedule=schedule).rate(step) for step in range(100)]
        assert rates[:5] == [0.2, 0.4, 0.6000000000000001, 0.8, 1.0] or rates[:5] == pytest.approx(
            [0.2, 0.4, 0.6, 0.8, 1]
        )
        assert rates[5] == 1.0
        assert rates[-1] == pytest.approx(0.02)
        assert all(a >= b for a, b in pairwise(rates[5:]))


def test_half_way_down_cosine_and_linear_are_at_half():
    for schedule in ("cosine", "linear"):
        assert Settings(steps=101, warmup=0.0, schedule=schedule).rate(50) == pytest.approx(0.51)


def test_a_constant_rate_stays():
    settings = Settings(steps=10, warmup=0.2, schedule="constant")
    assert [settings.rate(step) for step in range(10)] == [0.5] + [1.0] * 9


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_one_step_has_a_rate(schedule):
    assert Settings(steps=1, schedule=schedule).rate(0) == 1.0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, "steps is 0, but it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, but it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup": 1.0}, "warmup is 1.0, but it is a share of the steps"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"batch_size": 10, "accumulate": 4}, "batch_size 10 does not split into accumulate=4 equal parts"),
        ({"save_every": -1}, "save_every is -1"),
    ],
)
def test_impossible_settings_are_sentences(wrong, says):
    with pytest.raises(FormwrightError, match=says):
        Settings(**wrong)


def test_settings_are_read_without_torch():
    code = "import sys, formwright.training; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
