"""The two tasks of where a token stands: every target from the definition."""

import pytest

from formwright import tasks
from formwright.errors import FormwrightError


def rows(spec):
    task = tasks.load(spec)
    assert task.model_config["architecture"] == "encoder"
    columns = task.train.columns
    return zip(columns["input_ids"].tolist(), columns["labels"].tolist(), strict=True)


@pytest.mark.parametrize("length", [2, 7, 32])
def test_every_token_says_where_it_stands(length):
    for tokens, labels in rows(f"position-identification(length={length}, examples=50)"):
        assert len(tokens) == length
        assert labels == list(range(length))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_that_share_of_the_rows_is_one_symbol(share):
    found = list(rows(f"position-identification(constant={share}, examples=2000)"))
    same = sum(len(set(tokens)) == 1 for tokens, _ in found) / len(found)
    assert same == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("length", [2, 7, 16])
def test_every_second_token_comes_first(length):
    for tokens, labels in rows(f"even-tokens(length={length}, symbols=500, examples=50)"):
        half = length // 2
        assert labels == [tokens[2 * i + 1] for i in range(half)] + [500] * (length - half)


def test_the_filler_alone_is_right_in_half_of_the_cells():
    assert tasks.load("even-tokens(examples=100)").baselines()["majority"]["accuracy"] == 0.5


def test_a_share_is_from_0_to_1():
    with pytest.raises(FormwrightError, match=r"constant is 1\.5, but it is a share"):
        tasks.load("position-identification(constant=1.5)")
