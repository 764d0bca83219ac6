"""A step proves that it changed something; a killed run goes on where it stopped."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from formwright.compress import pipeline
from formwright.compress.modifier import Data, Modifier
from formwright.compress.recipe import Recipe
from formwright.errors import FormwrightError


class Halve(Modifier):
    """Sets the first half of a weight to zero."""

    def apply(self, model) -> None:
        weight = model.classifier.weight
        weight.data[:, : weight.shape[1] // 2] = 0


class Nothing(Modifier):
    pass


class Breaks(Modifier):
    broken = True

    def apply(self, model) -> None:
        if Breaks.broken:
            raise KeyboardInterrupt
        model.classifier.bias.data += 1


class Refuses(Modifier):
    def check(self, model) -> None:
        raise FormwrightError(f"{type(model).__name__} is not for me.")


@pytest.fixture
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def data() -> Data:
    rows = TensorDataset(torch.arange(10).repeat(7, 1) + torch.arange(7)[:, None])
    task = SimpleNamespace(
        name="rows",
        head="sequence-classification",
        train=rows,
        validation=None,
        test=rows,
        collate=lambda items: {"input_ids": torch.stack([one[0] for one in items]), "labels": torch.zeros(len(items))},
        score=None,
        summary=None,
    )
    return Data(task=task, kind="text-classification")


def test_a_step_says_what_it_changed(model, data) -> None:
    change = pipeline.apply(model, Halve(), data, step="halve")
    assert change.zeros[1] - change.zeros[0] == 8
    assert change.parameters[0] == change.parameters[1]
    assert "zero" in change.says


def test_a_step_without_effect_is_an_error(model, data) -> None:
    with pytest.raises(FormwrightError, match="changed nothing"):
        pipeline.apply(model, Nothing(), data)


def test_what_cannot_be_applied_says_why(model, data) -> None:
    with pytest.raises(FormwrightError, match="is not for me"):
        pipeline.apply(model, Refuses(), data)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, model, data) -> None:
    steps = {"halve": Halve(), "breaks": Breaks()}
    monkeypatch.setattr(Recipe, "modifiers", lambda self: [steps[one["name"]] for one in self.steps])
    recipe = Recipe.read(["halve", "breaks"])
    straight = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(copy.deepcopy(model), recipe, data, folder=tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["step-1"]
    monkeypatch.setattr(Breaks, "broken", False)
    monkeypatch.setattr(Halve, "apply", lambda *_: pytest.fail("the finished step ran again"))
    resumed, changes = pipeline.run(model, recipe, data, folder=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(Breaks, "broken", False)
    monkeypatch.setattr(Recipe, "modifiers", lambda self: [steps[one["name"]] for one in self.steps])
    whole, _ = pipeline.run(straight, recipe, data)
    assert len(changes) == 2
    assert resumed.config.compression["recipe"] == recipe.steps
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_recipe_in_the_folder_is_refused(tmp_path, monkeypatch, model, data) -> None:
    monkeypatch.setattr(Recipe, "modifiers", lambda self: [Halve() for _ in self.steps])
    pipeline.run(model, "halve", data, folder=tmp_path)
    with pytest.raises(FormwrightError, match="another recipe"):
        pipeline.run(model, "other", data, folder=tmp_path)


def test_batches_are_the_same_every_time_and_without_labels(data) -> None:
    first = [batch["input_ids"] for batch in data.batches(2, batch_size=3)]
    again = [batch["input_ids"] for batch in data.batches(2, batch_size=3)]
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert "labels" in next(iter(data.batches(1, labels=True)))
    assert "labels" not in next(iter(data.batches(1)))
