"""CEHPO: toys with a known optimum, and a search over trainings."""

import math
import random
from collections import Counter

import pytest

from formwright import tasks
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.training import Settings
from formwright.training.generative_ai_math import Choice, Logarithmic, cross_entropy_search, score_by_training

SPACE = {"rate": Logarithmic(1e-4, 1.0), "width": Logarithmic(1.0, 1000.0), "kind": Choice(("a", "b", "c"))}


def bowl(setting, _seed):
    far = math.log(setting["rate"] / 0.01) ** 2 + math.log(setting["width"] / 20) ** 2
    return far + {"a": 3.0, "b": 0.0, "c": 1.0}[setting["kind"]]


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_bottom_of_a_bowl(seed):
    found = cross_entropy_search(space=SPACE, score=bowl, samples=40, rounds=10, seed=seed)
    assert found.setting["kind"] == "b"
    assert found.setting["rate"] == pytest.approx(0.01, rel=0.4)
    assert found.setting["width"] == pytest.approx(20, rel=0.4)
    assert found.score == min(trial.score for trial in found.trials)


def test_it_beats_as_many_draws_by_chance():
    ours, chance = [], []
    for seed in range(10):
        found = cross_entropy_search(space=SPACE, score=bowl, seed=seed)
        luck = random.Random(seed)
        ours.append(found.score)
        chance.append(
            min(bowl({name: one.draw(luck) for name, one in SPACE.items()}, 0) for _ in range(len(found.trials)))
        )
    assert sum(ours) < sum(chance)


def test_distributions_move_by_the_smoothing_towards_the_elite():
    moved = Choice(("a", "b")).moved(["a", "a"], 0.7)
    assert moved.shares == pytest.approx((0.85, 0.15))
    moved = Logarithmic(math.exp(-2), math.exp(2)).moved([math.e, math.exp(2)], 0.5)
    assert moved.mean == pytest.approx(0.75)
    assert moved.deviation == pytest.approx(0.75)


def test_the_search_ends_when_nothing_is_left_to_choose():
    found = cross_entropy_search(
        space={"kind": Choice(("a", "b", "c"))}, score=lambda s, _: {"a": 3, "b": 0, "c": 1}[s["kind"]], rounds=50
    )
    assert len(found.trials) < 50 * 20
    assert found.space["kind"].left < 0.05


def test_a_lucky_seed_does_not_win():
    """A setting that is bad on average, but rarely looks best."""

    def score(setting, seed):
        return -5.0 if setting["kind"] == "lucky" and seed % 7 == 0 else {"lucky": 1.0, "sound": 0.0}[setting["kind"]]

    space = {"kind": Choice(("lucky", "sound"))}
    found = cross_entropy_search(space=space, score=score, rounds=1, leaders=2, again=20, seed=1)
    assert min(found.trials, key=lambda trial: trial.score).setting["kind"] == "lucky"
    means = [sum(one.score for one in group) / len(group) for group in found.again]
    assert found.score == min(means)
    fresh = {one.seed for group in found.again for one in group}
    assert not fresh & {trial.seed for trial in found.trials}


def test_one_seed_one_search():
    first, second = (cross_entropy_search(space=SPACE, score=bowl, seed=3) for _ in range(2))
    assert first == second
    assert first.trials != cross_entropy_search(space=SPACE, score=bowl, seed=4).trials


def test_trainings_that_fail_are_passed_over():
    found = cross_entropy_search(
        space={"kind": Choice(("a", "b"))}, score=lambda s, _: math.nan if s["kind"] == "a" else 1.0
    )
    assert found.setting == {"kind": "b"}
    with pytest.raises(FormwrightError, match="No setting"):
        cross_entropy_search(space=SPACE, score=lambda *_: math.inf, rounds=1)


def test_it_searches_settings_and_sizes_of_a_training():
    task = tasks.load("char-lm(length=16, test=0.01, validation=0.002)")
    made = Counter()

    def model(hidden_size):
        made[hidden_size] += 1
        return TransformerForCausalLM(
            TransformerConfig(**task.model_config, hidden_size=hidden_size, num_hidden_layers=1)
        )

    score = score_by_training(model=model, task=task, settings=Settings(steps=3, batch_size=4))
    space = {"learning_rate": Logarithmic(1e-4, 1e-1), "hidden_size": Choice((8, 16))}
    found = cross_entropy_search(space=space, score=score, samples=3, rounds=2, leaders=1, again=1)
    assert sum(made.values()) == 7
    assert set(made) <= {8, 16}
    assert 0 < found.score < 10
    with pytest.raises(FormwrightError, match="validation rows"):
        score_by_training(model=model, task=tasks.load("char-lm(length=16)"), settings=Settings())


@pytest.mark.parametrize("wrong", [{"space": {}}, {"samples": 1}, {"elite": 0.0}, {"smoothing": 1.5}, {"rounds": 0}])
def test_impossible_searches_are_refused(wrong):
    with pytest.raises(FormwrightError):
        cross_entropy_search(**({"space": SPACE, "score": bowl} | wrong))


def test_impossible_distributions_are_refused():
    with pytest.raises(FormwrightError):
        Choice(("a",))
    with pytest.raises(FormwrightError):
        Logarithmic(0.0, 1.0)
