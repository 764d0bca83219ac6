"""Nested training: which granularity learns when, joint gradients, and what is recorded."""

from dataclasses import replace

import pytest
import torch

from formwright import tasks
from formwright.errors import FormwrightError
from formwright.models.matformer import choose, nested_layers
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.training import Method, Settings, fit
from formwright.training.matformer import Nested

SETTINGS = Settings(steps=12, batch_size=4, learning_rate=1e-2, clip=0.0)


@pytest.fixture(scope="module")
def task():
    return tasks.load("char-lm(length=16, test=0.01)")


def built(task, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return TransformerForCausalLM(
        TransformerConfig(**task.model_config, **sizes, **{"feedforward": "matformer"} | options)
    )


class Keep(Method):
    """The gradients of the first step, and the granularities that each step ran at."""

    def __init__(self):
        self.gradients_, self.ran, self.batches = {}, [], []

    def forward(self, given):
        self.ran.append([layer.granularity for layer in nested_layers(given.model)[0]])
        self.batches.append(given.batch)
        return given.run(given.batch)

    def gradients(self, model, step):
        if step == 1:
            self.gradients_ = {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_step_draws_one_granularity_for_the_whole_model_and_trains_nothing_beyond_it(task):
    model, keep = built(task), Keep()
    history = fit(model, task, SETTINGS, methods=[Nested(), keep])
    drawn = [int(value) for value in history.extras["granularity"]]
    assert keep.ran == [[one] * 2 for one in drawn]
    assert set(drawn) == {1, 2, 3, 4}
    width = nested_layers(model)[0][0].widths[drawn[0] - 1]
    gradient = keep.gradients_["model.decoder.layers.0.block.feedforward.layer.up.weight"]
    assert gradient[:width].any()
    assert not gradient[width:].any()
    assert all(layer.granularity == 4 for layer in nested_layers(model)[0])


def test_probabilities_weigh_the_draw_and_the_seed_sets_it(task):
    only = fit(built(task), task, SETTINGS, methods=[Nested(probabilities=(0.0, 0.0, 3.0, 0.0))])
    assert set(only.extras["granularity"]) == {3.0}
    method = Nested(probabilities=(0.5, 0.25, 0.125, 0.125))
    drawn = [method.drawn(step, 4) for step in range(4000)]
    assert [drawn.count(i) / 4000 for i in (1, 2, 3, 4)] == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.03)
    again = Nested(probabilities=(0.5, 0.25, 0.125, 0.125))
    assert drawn == [again.drawn(step, 4) for step in range(4000)]
    again.seed = 1
    assert drawn != [again.drawn(step, 4) for step in range(4000)]


def test_batches_of_one_step_run_at_one_granularity(task):
    keep = Keep()
    fit(built(task), task, replace(SETTINGS, accumulate=2), methods=[Nested(), keep])
    assert len(keep.ran) == 24
    assert keep.ran[::2] == keep.ran[1::2]


def test_a_joint_step_adds_up_the_gradients_of_all_granularities(task):
    model, keep = built(task), Keep()
    history = fit(model, task, replace(SETTINGS, steps=1), methods=[Nested(variant="joint"), keep])
    assert keep.ran == [[1, 1], [2, 2], [3, 3], [4, 4]]
    twin = built(task).train()
    losses = []
    for granularity in (1, 2, 3, 4):  # gradients add up
        choose(twin, granularity)
        loss = twin(**keep.batches[0]).loss
        loss.backward()
        losses.append(loss.item())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(keep.gradients_[name], parameter.grad, rtol=1e-4, atol=1e-6)
    recorded = [history.extras[f"granularity {i}"][0] for i in (1, 2, 3, 4)]
    assert recorded == pytest.approx(losses, rel=1e-5)
    assert history.losses[0] == pytest.approx(losses[-1], rel=1e-5)


def test_it_is_named_in_settings_and_checkpointed_layers_run_again_at_their_granularity(task):
    def trained(checkpointing):
        model = built(task)
        if checkpointing:
            model.gradient_checkpointing_enable()
        return fit(model, task, replace(SETTINGS, steps=4, methods="matformer(variant=joint)")).losses

    assert trained(True) == pytest.approx(trained(False), rel=1e-5)


def test_a_models_own_extra_losses_stay(task):
    class Extra(Method):
        def forward(self, given):
            outputs = given.run(given.batch)
            outputs["extra_losses"] = {"own": outputs["loss"] * 0 + 5}
            return outputs

    history = fit(built(task), task, replace(SETTINGS, steps=2), methods=[Nested(), Extra()])
    assert history.extras["own"] == [5.0, 5.0]
    assert len(history.extras["granularity"]) == 2


def test_what_cannot_be_trained_nested_says_why(task):
    with pytest.raises(FormwrightError, match="nested feed-forward layer"):
        fit(built(task, feedforward="gelu"), task, SETTINGS, methods=[Nested()])
    with pytest.raises(FormwrightError, match="4 granularities"):
        fit(built(task), task, SETTINGS, methods=[Nested(probabilities=(1.0, 1.0))])
    with pytest.raises((FormwrightError, TypeError), match="variant"):
        Nested(variant="both")
    for wrong in (
        {"probabilities": (1.0, -1.0)},
        {"probabilities": (0.0,)},
        {"variant": "joint", "probabilities": (1.0,)},
    ):
        with pytest.raises(FormwrightError, match="Probabilities"):
            Nested(**wrong)
