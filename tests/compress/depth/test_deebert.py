"""DeeBERT: exact properties, then plain loops over the modules of transformers."""

import functools
import itertools
import math

import pytest
import torch
import transformers
from torch import nn

from formwright.build import build
from formwright.compress import load
from formwright.compress.depth.deebert import DeeBERT, EarlyExit, entropy
from formwright.compress.pipeline import apply
from formwright.compress.runtime.packed import _PackedLayer
from formwright.compress.structure import adopt
from formwright.errors import FormwrightError

from .. import classifiers
from ..classifiers import CLASSES, LAYERS, WIDTH, data, tiny

rows = functools.partial(classifiers.rows, length=9, shortest=3)


def ramped(model=None, threshold=0.0):
    """A model with ramps that tell something apart, untrained."""
    model = adopt(tiny() if model is None else model)
    DeeBERT(threshold=threshold).apply(model)
    for ramp in model.executor.ramps:
        nn.init.normal_(ramp.classifier.weight, std=1.0)
    return model


@torch.no_grad()
def test_entropy_is_that_of_the_categorical_distribution_even_where_a_probability_underflows():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 5
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits), expected, atol=1e-6, rtol=1e-5)
    assert entropy(torch.tensor([[500.0, -500.0]])).item() == 0.0
    assert entropy(torch.zeros(1, 2)).item() == pytest.approx(math.log(2))


@torch.no_grad()
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_without_a_threshold_the_answer_is_the_plain_models(family, threshold):
    plain, model = tiny(family), ramped(tiny(family), threshold)
    batch = rows()
    output = model(**batch)
    torch.testing.assert_close(output.logits, plain(**batch).logits, atol=1e-5, rtol=1e-5)
    assert output.exit_layers.tolist() == [LAYERS] * 12


@torch.no_grad()
def test_above_the_largest_entropy_everyone_leaves_after_the_first_layer_and_no_other_runs():
    model = ramped(threshold=math.log(CLASSES) + 1e-4)
    calls = counted(model)
    assert model(**embedded(model, rows())).exit_layers.tolist() == [1] * 12
    assert calls == [12, 0, 0, 0]
    assert packed_tokens(model, rows(), calls) == [int(rows()["attention_mask"].sum())]


@torch.no_grad()
def test_layers_run_only_for_the_samples_still_there():
    model = ramped(threshold=0.6)
    calls, batch = counted(model), rows(40)
    exits = model(**embedded(model, batch)).exit_layers
    assert len(exits.unique()) > 1, "the threshold should tell the samples apart"
    assert calls == [int((exits > number).sum()) for number in range(LAYERS)]
    lengths = batch["attention_mask"].sum(1)
    assert packed_tokens(model, batch, calls) == [int(lengths[exits > number].sum()) for number in range(LAYERS)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 2.0])
def test_packed_and_padded_runs_answer_alike(family, threshold):
    model, batch = ramped(tiny(family), threshold), rows(30)
    packed, padded = model(**batch), model(**embedded(model, batch))
    assert torch.equal(packed.exit_layers, padded.exit_layers)
    torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-5)


def embedded(model, batch):
    """The same call with the words' vectors, which is run on the padded batch."""
    words = model.base_model.embeddings.word_embeddings(batch["input_ids"])
    more = {"position_ids": places(model, batch["input_ids"])} if model.config.model_type.endswith("roberta") else {}
    return {"inputs_embeds": words, "attention_mask": batch["attention_mask"], **more}


def places(model, ids):
    pad = model.base_model.embeddings.padding_idx
    return (ids != pad).cumsum(1) * (ids != pad) + pad


def packed_tokens(model, batch, calls):
    """How many tokens each layer reads in a packed run, in which the model's own layers are not called."""
    before, tokens = list(calls), []
    feed = _PackedLayer.feed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_PackedLayer, "feed", lambda self, x: tokens.append(len(x)) or feed(self, x))
        model(**batch)
    assert calls == before
    return tokens


def counted(model):
    """How many samples each layer is run for."""
    calls = [0] * LAYERS
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.register_forward_pre_hook(
            lambda _, args, number=number: calls.__setitem__(number, calls[number] + len(args[0]))
        )
    return calls


@torch.no_grad()
def test_a_sample_leaves_no_later_when_the_threshold_rises():
    model = ramped()
    depths = []
    for threshold in (0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 1.2):
        model.executor.threshold = threshold
        depths.append(model(**rows(30)).exit_layers)
    assert all((after <= before).all() for before, after in itertools.pairwise(depths))


@torch.no_grad()
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_a_batch_answers_as_its_samples_one_by_one(family):
    model = ramped(tiny(family), threshold=0.5)
    batch = rows(20)
    together = model(**batch)
    for i in range(20):
        alone = model(**{name: value[i : i + 1] for name, value in batch.items()})
        assert alone.exit_layers.item() == together.exit_layers[i]
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_entropy_zero_does_not_leave_at_threshold_zero():
    model = ramped(threshold=0.0)
    for ramp in model.executor.ramps:
        ramp.classifier.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    assert model(**rows()).exit_layers.min() == LAYERS
    model.executor.threshold = [0.0, 1e-6, 0.0]
    assert model(**rows()).exit_layers.tolist() == [2] * 12


def test_training_leaves_all_but_the_ramps_unchanged_and_their_count_is_the_papers():
    plain, model = tiny(), adopt(tiny())
    change = apply(model, DeeBERT(threshold=0.5), data())
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    ramps = sum(parameter.numel() for parameter in model.executor.parameters())
    assert ramps == (LAYERS - 1) * (WIDTH**2 + WIDTH + CLASSES * WIDTH + CLASSES)
    assert change.parameters[1] - change.parameters[0] == ramps
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(not torch.equal(ramp.pooler.weight, plain.bert.pooler.dense.weight) for ramp in model.executor.ramps)


def test_only_ramps_have_gradients_while_they_learn_and_the_loss_is_their_plain_sum():
    model = ramped(tiny(hidden_dropout_prob=0.0))
    model.requires_grad_(False)
    model.executor.requires_grad_(True)
    model.executor.learning = "eval"
    batch, labels = rows(), torch.arange(12) % CLASSES
    model.train()
    output = model(**batch, labels=labels)
    output.loss.backward()
    assert model.training
    assert all(p.grad is not None for p in model.executor.parameters())
    model.eval()
    with torch.no_grad():
        answers = model.executor.answers(*view(model, batch))
    expected = sum(nn.functional.cross_entropy(one, labels) for one in answers[:-1])
    torch.testing.assert_close(output.loss, expected)


def view(model, batch):
    from formwright.compress.classifier import classifier

    return classifier(model, "DeeBERT"), batch


@pytest.mark.parametrize(("backbone", "same"), [("eval", True), ("train", False)])
def test_the_frozen_layers_keep_their_dropout_only_when_asked(backbone, same):
    model = ramped(tiny(hidden_dropout_prob=0.5))
    model.executor.learning = backbone
    model.train()
    first, second = (model(**rows()).logits for _ in range(2))  # the last layer's, without a ramp's dropout
    assert torch.equal(first, second) == same


def test_training_as_a_whole_runs_the_models_own_forward():
    plain, model = tiny(hidden_dropout_prob=0.0), ramped(tiny(hidden_dropout_prob=0.0), threshold=9.0)
    model.train()
    labels = torch.zeros(12, dtype=torch.long)
    plain.config.attention_probs_dropout_prob = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    torch.testing.assert_close(model(**rows(), labels=labels).loss, plain(**rows(), labels=labels).loss)


@torch.no_grad()
def test_hidden_states_come_from_the_models_own_forward_and_a_tuple_when_asked():
    model = ramped(threshold=9.0)
    assert len(model(**rows(), output_hidden_states=True).hidden_states) == LAYERS + 1
    logits, exits = model(**rows(), return_dict=False)
    assert logits.shape == (12, CLASSES)
    assert exits.tolist() == [1] * 12


@torch.no_grad()
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_it_saves_and_loads_with_its_thresholds_which_can_be_changed(family, tmp_path):
    model = ramped(tiny(family), threshold=[0.2, 0.5, 0.9])
    model.save_pretrained(tmp_path)
    again = load(tmp_path).eval()
    assert again.executor.threshold == [0.2, 0.5, 0.9]
    mine, theirs = model(**rows()), again(**rows())
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.exit_layers, theirs.exit_layers)
    again.executor.threshold = 0
    assert again(**rows()).exit_layers.min() == LAYERS


def test_ramps_start_from_the_pooler_of_the_folder_named(tmp_path):
    before = tiny(classes=2)
    nn.init.constant_(before.bert.pooler.dense.weight, 0.25)
    before.save_pretrained(tmp_path)
    model = adopt(tiny())
    DeeBERT(pooler=str(tmp_path)).apply(model)
    assert all((ramp.pooler.weight == 0.25).all() for ramp in model.executor.ramps)
    narrow = adopt(tiny("DistilBert"))
    tiny("DistilBert").save_pretrained(tmp_path / "other")
    with pytest.raises(FormwrightError, match="no pooler"):
        DeeBERT(pooler=str(tmp_path / "other")).apply(narrow)


@torch.no_grad()
def test_half_precision_and_autocast_answer():
    model = ramped(threshold=0.5).bfloat16()
    assert model(**rows()).logits.dtype == torch.bfloat16
    model = ramped(threshold=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**rows()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: tiny(classes=1), "two or more classes"),
        (lambda: tiny(layers=1), "two layers"),
        (lambda: transformers.BertModel(tiny().config), "classifier of whole texts"),
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)), "gpt2"),
    ],
)
def test_what_it_cannot_be_applied_to_raises(model, says):
    with pytest.raises(FormwrightError, match=says):
        DeeBERT().check(model())


@pytest.mark.parametrize(
    "step", ["deebert(threshold=low)", "deebert(backbone=half)", {"name": "deebert", "steps": 0.5}]
)
def test_impossible_options_raise(step):
    with pytest.raises(FormwrightError, match="must be"):
        build("modifier", step)


def test_a_threshold_that_is_no_number_raises():
    with pytest.raises(FormwrightError, match="entropy in nats"):
        DeeBERT(threshold=math.nan)


def test_a_list_of_thresholds_must_have_one_for_each_ramp():
    with pytest.raises(FormwrightError, match="a list of 3"):
        DeeBERT(threshold=[0.1, 0.2]).check(tiny())


def test_the_catalogue_builds_it():
    modifier = build("modifier", "deebert(threshold=0.3, steps=20)")
    assert isinstance(modifier, DeeBERT)
    assert modifier.threshold == 0.3
    assert modifier.settings == {"steps": 20}


@pytest.mark.reference
@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
def test_it_is_the_papers_loop_over_the_layers_of_transformers(threshold):
    plain, model = tiny(), ramped(threshold=threshold)
    batch = rows(20)
    output = model(**batch)
    for i in range(20):
        ids, mask = batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1]
        states = plain.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1:]
        logits, depth = plain(ids, attention_mask=mask).logits[0], LAYERS
        for number, (state, ramp) in enumerate(zip(states[:-1], model.executor.ramps, strict=True), 1):
            z = ramp.classifier(torch.tanh(ramp.pooler(state[0, 0])))
            p = z.softmax(-1)
            if -(p * p.log()).sum() < threshold:
                logits, depth = z, number
                break
        assert output.exit_layers[i] == depth
        torch.testing.assert_close(output.logits[i], logits, atol=1e-5, rtol=1e-5)


def test_the_executor_holds_what_it_says():
    model = ramped(threshold=0.4)
    again = EarlyExit.rebuild(None, **model.executor.structure())
    again.load_state_dict(model.executor.state_dict())
    assert again.structure() == model.executor.structure()


def test_layers_removed_afterwards_are_an_error_and_no_wrong_ramp():
    model = ramped()
    del model.bert.encoder.layer[1]
    with pytest.raises(FormwrightError, match="before deebert"):
        model(**rows())


@torch.no_grad()
def test_a_hook_on_a_projection_is_called():
    model, seen = ramped(), []
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *call: seen.append(call))
    model(**rows())
    assert len(seen) == 1
