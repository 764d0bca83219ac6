"""Tasks made of other tasks: fewer labels, wrong labels. Texts and the test stay as they are."""

import pandas as pd
import pytest
import torch

from formwright import tasks
from formwright.errors import FormwrightError
from formwright.tasks.noisy_labels import wrong
from formwright.tasks.support.relabelled import labels_of


@pytest.fixture
def file(tmp_path):
    kinds = ("awful", "fine", "odd")
    rows = [{"text": f"a {kinds[i % 3]} day {'x ' * (i % 7)}{i}.", "label": kinds[i % 3]} for i in range(150)]
    path = tmp_path / "mails.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return f"text-classification(file={path})"


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["symmetric", "pair-flip"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.45])
def test_a_share_of_the_labels_is_wrong_and_no_more(kind, share):
    labels = torch.arange(1000) % 4
    found = wrong(labels, share, kind, 4, torch.Generator().manual_seed(0))
    at = found != labels
    assert int(at.sum()) == round(share * 1000)
    if kind == "pair-flip":
        assert torch.equal(found[at], (labels[at] + 1) % 4)
    elif share:
        assert (found - labels)[at].remainder(4).bincount(minlength=4)[1:].min() > 0.2 * share * 1000


def test_noise_is_in_training_and_validation_and_not_in_the_test(file):
    clean = tasks.load(file[:-1] + ", validation=0.2)")
    noisy = tasks.load(f"noisy-labels(of={file}, share=0.3, validation=0.2)")
    for split, rows in (("train", noisy.train), ("validation", noisy.validation)):
        given = getattr(clean, split)
        assert torch.equal(rows.lengths, given.lengths)
        changed = labels_of(rows) != labels_of(given)
        assert int(changed.sum()) == round(0.3 * len(given))
        at = [0, 3, 1]
        batch, whole = noisy.collate(rows.__getitems__(at)), clean.collate(given.__getitems__(at))
        assert torch.equal(batch["input_ids"], whole["input_ids"])
        assert torch.equal(batch["labels"], labels_of(rows)[at])
        assert same(batch, noisy.collate([rows[i] for i in at]))
    assert noisy.test.tokens is not None
    assert torch.equal(labels_of(noisy.test), labels_of(clean.test))
    assert {"uniform", "majority", "naive Bayes"} <= set(noisy.baselines())
    again = tasks.load(f"noisy-labels(of={file}, share=0.3, validation=0.2)")
    assert torch.equal(labels_of(noisy.train), labels_of(again.train))
    other = tasks.load(f"noisy-labels(of={file}, share=0.3, validation=0.2, seed=1)")
    assert not torch.equal(labels_of(noisy.train), labels_of(other.train))


def test_few_labels_keep_every_class_and_all_texts(file):
    whole = tasks.load(file)
    few = tasks.load(f"few-labels(of={file}, rows=4)")
    assert len(few.train) == 4
    assert set(labels_of(few.train).tolist()) == {0, 1, 2}
    assert len(few.unlabelled) == len(whole.train)
    places = few.train.places.tolist()
    assert same(few.train[2], {**whole.train[places[2]]})
    assert few.baselines()["naive Bayes"]["accuracy"] <= 1
    both = tasks.load(f"noisy-labels(of=few-labels(of={file}, rows=10), share=0.5)")
    assert (len(both.train), len(both.unlabelled)) == (10, len(whole.train))
    assert int((labels_of(both.train) != labels_of(both.train.dataset)).sum()) == 5


def test_images_and_rows_that_come_one_by_one_work_too():
    clean, noisy = tasks.load("digits"), tasks.load("noisy-labels(of=digits, share=0.4)")
    assert torch.equal(noisy.train[5]["pixel_values"], clean.train[5]["pixel_values"])
    assert int((labels_of(noisy.train) != labels_of(clean.train)).sum()) == round(0.4 * len(clean.train))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("noisy-labels(share=1)", "below 1"),
        ("noisy-labels(of=copy)", "no row a class"),
        ("few-labels(of=char-lm)", "no row a class"),
        ("few-labels(rows=3)", "10 classes"),
        ("few-labels(rows=100000)", "choose a number between"),
        ("noisy-labels(kind=odd)", "symmetric"),
    ],
)
def test_what_makes_no_task_is_refused(spec, says):
    with pytest.raises(FormwrightError, match=says):
        tasks.load(spec)
