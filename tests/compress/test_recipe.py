"""Recipes: every way of writing one, and every mistake a sentence."""

import pytest

from formwright.compress.recipe import Recipe
from formwright.errors import FormwrightError

STEPS = [{"name": "prune", "amount": 0.3}, {"name": "finetune"}]


@pytest.mark.parametrize(
    "source",
    [
        ["prune(amount=0.3)", "finetune"],
        [{"prune": {"amount": 0.3}}, {"finetune": None}],
        [{"name": "prune", "amount": 0.3}, "finetune"],
        {"steps": [{"prune": {"amount": 0.3}}, "finetune"]},
    ],
)
def test_every_form_is_the_same_recipe(source) -> None:
    assert Recipe.read(source).steps == STEPS


def test_it_survives_its_own_yaml(tmp_path) -> None:
    recipe = Recipe(steps=STEPS, seed=3)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / "recipe.yaml") == recipe
    assert Recipe.read(str(tmp_path / "recipe.yaml")) == recipe
    assert recipe.label() == "prune(amount=0.3) + finetune"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: [", "line 1 is no YAML"),
        ("steps: prune", "must be a list"),
        ("steps: []", "steps cannot be read"),
        ("", "holds no recipe"),
        ("steps: [prune]\nstep: 2", "step cannot be read"),
        ("steps: [{prune: 0.3}]", "must be a table"),
        ("steps: [{prune: {}, finetune: {}}]", "is no step"),
        ("steps: ['prune(']", "is no part"),
        ("steps: [!!python/object/apply:os.system ['true']]", "is no YAML"),
    ],
)
def test_a_corrupt_recipe_is_one_sentence(tmp_path, text: str, says: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(FormwrightError, match=says):
        Recipe.read(tmp_path / "r.yaml")


def test_a_missing_file_and_an_unknown_method(tmp_path) -> None:
    with pytest.raises(FormwrightError, match="no recipe"):
        Recipe.read(tmp_path / "absent.yaml")
    with pytest.raises(FormwrightError):
        Recipe.read("no-such-method").modifiers()
