"""The generators: every target is found again by brute force, one row at a time, from the definition."""

import pytest
import torch

from formwright import tasks
from formwright.tasks import dyck, listops

IGNORED = -100


def rows(spec, count=150):
    task = tasks.load(spec)
    columns = task.train.columns
    return task, zip(columns["input_ids"][:count].tolist(), columns["labels"][:count].tolist(), strict=True)


@pytest.mark.parametrize("length", [1, 7, 63])
def test_copy_gives_back_the_symbols(length):
    spec = (
        f"copy(length={length},examples=150,symbols=100000)" if length == 1 else f"copy(length={length},examples=150)"
    )
    for tokens, labels in rows(spec)[1]:
        assert tokens[length:] == [0] * length
        assert labels == [IGNORED] * length + [token - 1 for token in tokens[:length]]


@pytest.mark.parametrize(("length", "items"), [(32, 4), (7, 7), (63, 5)])
def test_selective_copy_gives_back_the_data_in_order(length, items):
    for tokens, labels in rows(f"selective-copy(length={length},items={items},examples=150)")[1]:
        held = [token for token in tokens[:length] if token != 0]
        assert len(held) == items
        assert min(held) >= 2
        assert tokens[length:] == [1] * items
        assert labels == [IGNORED] * length + [token - 2 for token in held]


def test_recall_of_one_token_pairs_answers_every_later_cell():
    task, found = rows("recall(length=32,pairs=8,symbols=16,examples=150)")
    assert task.model_config["vocab_size"] == 1 + 16 + 256
    for tokens, labels in found:
        facts = dict(divmod(token - 17, 16) for token in tokens[:8])
        assert len(facts) == 8
        assert labels == [IGNORED] * 8 + [facts[token - 1] for token in tokens[8:]]


@pytest.mark.parametrize("dense", [True, False])
def test_recall_of_two_token_pairs(dense):
    for tokens, labels in rows(f"recall(pair=2,length=33,pairs=5,symbols=9,dense={dense},examples=150)")[1]:
        facts = {key: value - 10 for key, value in zip(tokens[0:10:2], tokens[1:10:2], strict=True)}
        assert len(facts) == 5
        later = tokens[10:]
        assert labels == [IGNORED] * 10 + [facts.get(token, IGNORED) for token in later]
        if dense:
            assert 0 not in later
        else:
            assert sorted(token for token in later if token) == sorted(facts)


@pytest.mark.parametrize("length", [1, 8, 16, 63])
def test_parity_is_the_number_of_ones(length):
    task, found = rows(f"parity(length={length},examples=150)")
    assert task.model_config["architecture"] == "encoder"
    for tokens, labels in found:
        assert tokens[-1] == 2
        assert labels == [IGNORED] * length + [tokens.count(1) % 2]


def test_modular_addition_holds_every_pair_once():
    task = tasks.load("modular-addition(modulus=7)")
    pairs = []
    for split in (task.train, task.test):
        for tokens, labels in zip(split.columns["input_ids"].tolist(), split.columns["labels"].tolist(), strict=True):
            a, b, sign = tokens
            assert sign == 7
            assert labels == [IGNORED, IGNORED, (a + b) % 7]
            pairs.append((a, b))
    assert sorted(pairs) == [(a, b) for a in range(7) for b in range(7)]
    assert len(task.train) == 24


@pytest.mark.parametrize("length", [2, 16])
def test_sorting_tells_the_sorted_list(length):
    for tokens, labels in rows(f"sorting(length={length},symbols=200,examples=150)")[1]:
        ordered = sorted(tokens[:length])
        assert tokens[length:] == [200, *ordered[:-1]]
        assert labels == [IGNORED] * length + ordered


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_dyck_rows_nest_properly_and_no_deeper_than_told(depth):
    deepest = 0
    for tokens, labels in rows(f"dyck(length=63,depth={depth},examples=150)")[1]:
        assert tokens[1:] == labels[:-1]
        stack = []
        for bracket in [*tokens, labels[-1]]:
            if bracket < 2:
                stack.append(bracket)
            else:
                assert stack.pop() == bracket - 2
            deepest = max(deepest, len(stack))
    assert deepest == depth


def test_dyck_counts_closing_brackets_among_the_closing_ones():
    task = tasks.load("dyck(examples=100)")
    rows = {name: column[:50] for name, column in task.test.columns.items()}
    logits = torch.zeros(*rows["labels"].shape, 4)
    logits[..., 0] = 9  # an opening bracket is likeliest everywhere, "]" comes next
    logits[..., 3] = 1
    items = task.score(logits, rows)
    assert torch.equal(items.trials, (rows["labels"] >= 2).sum(1))
    assert torch.equal(items.hits, (rows["labels"] == 3).sum(1))


def test_copying_the_latest_opener_is_right_in_four_of_five():
    assert tasks.load("dyck(examples=100)").baselines()["copy latest opener"]["accuracy"] == pytest.approx(
        0.8, abs=0.01
    )


def test_the_distance_to_the_opener_by_a_stack():
    columns = tasks.load("dyck(length=30,examples=100)").train.columns
    found = dyck.distance(columns["input_ids"], columns["labels"]).tolist()
    for tokens, labels, told in zip(columns["input_ids"].tolist(), columns["labels"].tolist(), found, strict=True):
        stack, expected = [], []
        for place, bracket in enumerate([*tokens, labels[-1]]):
            if bracket < 2:
                stack.append(place)
                expected.append(0)
            else:
                expected.append(place - stack.pop())
        assert told == expected[1:]


def value(tokens):
    """An expression's value by a stack of lists, apart from how it was made."""
    stack = [[]]
    for token in tokens:
        if token in (listops.MAX, listops.MIN, listops.MED, listops.SM):
            stack.append([token])
        elif token == listops.END:
            operator, *below = stack.pop()
            assert 2 <= len(below) <= 4
            result = {
                listops.MAX: max(below),
                listops.MIN: min(below),
                listops.MED: sorted(below)[len(below) // 2],
                listops.SM: sum(below) % 10,
            }[operator]
            stack[-1].append(result)
        else:
            stack[-1].append(token - listops.DIGIT)
    ((result,),) = stack
    return result


@pytest.mark.parametrize(("length", "depth"), [(64, 3), (20, 2), (6, 1)])
def test_listops_values_by_a_stack_machine(length, depth):
    task = tasks.load(f"listops(length={length},depth={depth},examples=150)") if length > 6 else None
    if task is None:  # the space of lists of at most four digits is small enough to be used up
        source = listops.python.Random(0)
        for _ in range(200):
            expression, expected = listops.short(source, depth, length)
            assert len(expression) <= length
            assert value(expression) == expected
        return
    columns = task.train.columns
    for tokens, mask, labels in zip(
        *(columns[name].tolist() for name in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        real = sum(mask)
        assert mask == [0] * (length + 1 - real) + [1] * real
        assert tokens[:-real] == [listops.PAD] * (length + 1 - real)
        assert tokens[-1] == listops.CLS
        assert labels == [IGNORED] * length + [value(tokens[-real:-1])]


def test_baselines_of_a_balanced_task_are_at_chance():
    found = tasks.load("selective-copy(examples=500)").baselines()
    assert found["uniform"]["accuracy"] == 1 / 16
    assert found["majority"]["accuracy"] == pytest.approx(1 / 16, abs=0.01)
    assert found["uniform"]["whole"] == pytest.approx(16.0**-4)
