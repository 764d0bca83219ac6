"""Fine-tuning as a step, and the head an encoder is given."""

import copy

import pytest
import torch
from torch.nn.utils import prune
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from formwright.build import build
from formwright.compress.finetune import Budget, ensure_head, with_head, zeros_kept
from formwright.compress.modifier import Data
from formwright.compress.pipeline import run
from formwright.compress.structure import adopt, load
from formwright.compress.surgery import remove_layers
from formwright.errors import FormwrightError
from formwright.tasks.base import Columns, Defaults, Task
from formwright.training import Settings, evaluate

SETTINGS = Settings(steps=40, batch_size=16, learning_rate=3e-3)
NAMES = ["low", "middle", "high"]
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert(cls=BertModel, **options):
    torch.manual_seed(0)
    return cls(BertConfig(vocab_size=40, max_position_embeddings=16, **SIZE, **options)).eval()


def task(head="sequence-classification", rows=96, names=NAMES):
    """The class is the third of the vocabulary that the first token is from."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(39, (rows, 6), generator=generator)
    held = Columns(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids[:, 0] // 13)
    if head == "image-classification":
        held = Columns(pixel_values=torch.randn(rows, 3, 8, 8, generator=generator), labels=ids[:, 0] // 13)
    return Task(
        name="thirds", head=head, model_config={"id2label": dict(enumerate(names))}, train=held, validation=held,
        test=held, metrics=(), baselines=dict, defaults=Defaults(settings=SETTINGS, model={}),
    )  # fmt: skip


def data(settings=SETTINGS, kind="text-classification"):
    return Data(task=task(), kind=kind, settings=settings)


def test_a_step_learns_the_task_and_proves_that_it_changed_something():
    model = bert(BertForSequenceClassification, num_labels=3)
    before = evaluate(model, task()).metrics["loss"]
    model, [change] = run(model, "finetune(steps=40)", data())
    assert evaluate(model, task()).metrics["loss"] < 0.8 * before
    assert change.parameters[0] == change.parameters[1]
    assert not model.training


def test_the_budget_takes_steps_or_epochs_and_the_rest_from_the_data():
    assert Budget().settings(data()) == SETTINGS
    assert Budget(epochs=2.0, batch_size=8).settings(data()).steps == 24
    assert Budget(epochs=0.5).settings(data()).steps == 3
    chosen = Budget(steps=5, learning_rate=1e-4).settings(data())
    assert (chosen.steps, chosen.learning_rate, chosen.batch_size) == (5, 1e-4, 16)
    assert Budget().settings(data(Settings(batch_size=512))).batch_size == 96  # no more than there are rows
    watched = Settings(evaluate_every=5, save_every=5, accumulate=2)
    chosen = Budget().settings(data(watched))
    assert (chosen.evaluate_every, chosen.save_every, chosen.accumulate) == (0, 0, 2)
    assert Budget().settings(data(watched, "sentence-embedding")).accumulate == 1


def test_what_was_pruned_stays_zero_and_the_rest_is_trained():
    model = bert(BertForSequenceClassification, num_labels=3)
    layer = model.bert.encoder.layer[0]
    pruned, whole = layer.output.dense.weight, layer.intermediate.dense.weight
    with torch.no_grad():
        pruned[torch.rand_like(pruned) < 0.5] = 0
        model.bert.encoder.layer[1].output.dense.weight.zero_()  # not begun
    zero, before = pruned == 0, whole.detach().clone()
    kept = pruned.detach().clone()
    build("modifier", "finetune(steps=10)").finetune(model, data())
    assert torch.equal(pruned == 0, zero)
    assert (pruned[~zero] != kept[~zero]).any()
    assert (whole != before).all()
    assert model.bert.encoder.layer[1].output.dense.weight.any()


@pytest.mark.reference
def test_a_matrix_that_was_pruned_away_stays_zero_across_a_save_and_a_removed_layer(tmp_path):
    model = bert(BertForSequenceClassification, num_labels=3)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.mul_(1e-6)
    model, _ = run(model, "prune(amount=0.3, scope=global)", data())
    assert not model.bert.encoder.layer[1].output.dense.weight.any()
    remove_layers(model, [0])
    model.save_pretrained(tmp_path)
    model, _ = run(load(tmp_path), "finetune(steps=3)", data())
    (layer,) = model.bert.encoder.layer
    assert not layer.output.dense.weight.any()
    assert 0 < layer.intermediate.dense.weight.count_nonzero() < layer.intermediate.dense.weight.numel()


def test_zeros_are_kept_as_by_the_masks_of_torchs_pruning():
    model = bert(BertForSequenceClassification, num_labels=3)
    masked = copy.deepcopy(model)
    mask = (torch.rand(32, 16) < 0.5).float()
    ours, theirs = (one.bert.encoder.layer[0].intermediate.dense for one in (model, masked))
    with torch.no_grad():
        ours.weight *= mask
    prune.custom_from_mask(theirs, "weight", mask)
    for one in (model, masked):
        build("modifier", "finetune(steps=5)").finetune(one, data())
    prune.remove(theirs, "weight")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[name], value, msg=name)


def test_the_hooks_are_gone_afterwards():
    model = torch.nn.Linear(3, 3)
    with torch.no_grad():
        model.weight[0] = 0
    with zeros_kept(model):
        model(torch.ones(1, 3)).sum().backward()
        assert not model.weight.grad[0].any()
    model.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad[0].all()


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("finetune(steps=3, epochs=1)", "leave one"),
        ("finetune(steps=0)", "steps is 0"),
        ("finetune(batch_size=-2)", "batch_size is -2"),
    ],
)
def test_impossible_budgets_are_refused(spec, says):
    with pytest.raises(FormwrightError, match=says):
        build("modifier", spec)


def test_what_cannot_be_trained_is_refused():
    step = build("modifier", "finetune")
    with pytest.raises(FormwrightError, match="computes no loss"):
        step.check(bert())
    with pytest.raises(FormwrightError, match="before the step that froze"):
        step.check(bert(BertForSequenceClassification).requires_grad_(False))
    with pytest.raises(FormwrightError, match="float16"):
        step.check(bert(BertForSequenceClassification).half())
    with pytest.raises(FormwrightError, match="no labels to fine-tune on"):
        step.finetune(bert(), data(kind="sentence-embedding"))
    step.check(adopt(bert(BertForSequenceClassification)))


def test_a_head_stands_on_the_encoders_weights():
    encoder = bert()
    model = with_head(encoder, NAMES)
    assert isinstance(model, BertForSequenceClassification)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert encoder.config.num_labels == 2  # the one given is as it was
    ids = torch.randint(40, (2, 5))
    torch.testing.assert_close(model.bert(ids).last_hidden_state, encoder(ids).last_hidden_state)
    torch.testing.assert_close(model.bert(ids).pooler_output, encoder(ids).pooler_output)


def test_an_encoder_without_a_pooler_gets_one():
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(vocab_size=40, **SIZE), add_pooling_layer=False)
    model = with_head(encoder, NAMES)
    ids = torch.randint(40, (2, 5))
    torch.testing.assert_close(model.eval().bert(ids).last_hidden_state, encoder.eval()(ids).last_hidden_state)


def test_a_head_is_fitted_saved_and_then_left_alone(tmp_path):
    bert().save_pretrained(tmp_path / "encoder")
    model = ensure_head(tmp_path / "encoder", task(), SETTINGS)
    assert evaluate(model, task()).metrics["accuracy"] > 0.6
    model.save_pretrained(tmp_path / "classifier")
    again = load(tmp_path / "classifier")
    assert again.config.id2label == dict(enumerate(NAMES))
    assert ensure_head(again, task()) is again
    assert ensure_head(adopt(again), task()) is again
    with pytest.raises(FormwrightError, match="tells 3 classes apart and thirds has 2"):
        ensure_head(again, task(names=["a", "b"]))


def test_images_get_a_head_too():
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(image_size=8, patch_size=4, **SIZE))
    model = ensure_head(encoder, task("image-classification", rows=16), Settings(steps=2, batch_size=8))
    assert isinstance(model, ViTForImageClassification)
    assert model.config.num_labels == 3


def test_what_can_have_no_head_is_refused():
    with pytest.raises(FormwrightError, match="at least 2 classes"):
        with_head(bert(), ["one"])
    with pytest.raises(FormwrightError, match="give it a head first"):
        with_head(adopt(bert()), NAMES)
    with pytest.raises(FormwrightError, match="no image-classification head"):
        with_head(bert(), NAMES, "image-classification")
