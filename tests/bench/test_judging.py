"""Judging on fewer rows: how many, which, and how sure."""

import math

import pytest
import torch
from torch.utils.data import Dataset

from formwright.bench.judging import drawn, judging_on, labels_of, needed, standard_error, subset
from formwright.tasks.base import Columns
from formwright.tasks.digits import task
from formwright.training.items import Items


@pytest.mark.parametrize(
    ("kind", "allowed", "count"),
    [
        ("text-classification", 0.01, 1800),
        ("image-classification", 0.02, 900),
        ("text-classification", 0.1, 500),  # the floor
        ("text-classification", 0.0, math.inf),
        ("causal-lm", 0.01, 225),
        ("causal-lm", 0.5, 100),
        ("sentence-embedding", 0.01, 500),
        ("sentence-embedding", 0.0, 2000),  # all that are ever compared
    ],
)
def test_the_rows_that_are_needed(kind, allowed, count):
    assert needed(kind, allowed) == count


def test_every_class_is_there_by_its_share_and_the_draw_hangs_on_the_seed():
    labels = torch.tensor([0] * 700 + [1] * 290 + [2] * 10)[torch.randperm(1000, generator=torch.manual_seed(1))]
    places = drawn(1000, 100, 3, labels)
    assert places == sorted(set(places))
    assert len(places) == 100
    assert torch.bincount(labels[places]).tolist() == [70, 29, 1]
    assert places == drawn(1000, 100, 3, labels) != drawn(1000, 100, 4, labels)
    assert drawn(7, 7, 0, None) == list(range(7))


def test_a_task_keeps_its_test_rows_and_is_left_alone_where_its_rows_are_few():
    whole = task(validation=0.5)
    rows = len(whole.validation)
    few = judging_on(whole, "image-classification", 0.05, seed=0)
    assert rows > len(few.validation) == 500
    assert few.test is whole.test
    assert few.train is whole.train
    assert judging_on(whole, "image-classification", 0.001, seed=0) is whole


def test_a_subset_reads_as_its_rows_do():
    class Texts(Dataset):
        lengths = torch.tensor([3, 1, 2, 5])

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return index

    assert subset(Texts(), [1, 3]).lengths.tolist() == [1, 5]
    columns = Columns(x=torch.arange(4), labels=torch.tensor([0, 1, 0, 1]))
    assert subset(columns, [3, 0]).__getitems__([0, 1])["x"].tolist() == [3, 0]
    assert labels_of(columns).tolist() == [0, 1, 0, 1]
    assert labels_of(Columns(labels=torch.zeros(3, 5))) is None  # a label a cell is no class
    assert labels_of(Texts()) is None


def items(hits, loss) -> Items:
    ones = torch.ones(len(hits), dtype=torch.long)
    return Items(loss=torch.tensor(loss), cells=ones * 2, hits=torch.tensor(hits), trials=ones)


def test_the_standard_error_is_that_of_the_differences_row_by_row():
    ours, theirs = items([1, 0, 0, 1], [2.0, 4.0, 6.0, 8.0]), items([1, 1, 1, 0], [2.0, 3.0, 8.0, 4.0])
    assert standard_error(ours, theirs, shares=True) == pytest.approx((11 / 12) ** 0.5 / 2)
    assert standard_error(ours, theirs, shares=False) == pytest.approx(torch.tensor([0, 0.5, -1, 2]).std().item() / 2)
    assert standard_error(ours, ours, shares=True) == 0
    assert standard_error(items([1], [1.0]), items([0], [1.0]), shares=True) is None
