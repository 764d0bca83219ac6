"""LTP: exact properties, then the masked model, written out with the modules of transformers."""

import itertools

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from formwright.build import build
from formwright.compress import load
from formwright.compress.classifier import classifier
from formwright.compress.pipeline import apply
from formwright.compress.runtime.packed import _PackedLayer
from formwright.compress.structure import adopt
from formwright.compress.tokens.ltp import LTP, compact, hard_mask, received, soft_mask
from formwright.errors import FormwrightError

from ..classifiers import CLASSES, LAYERS, WIDTH, data, rows, tiny

FAMILIES = ["Bert", "Roberta", "Electra", "DistilBert"]


def pruning(model=None, final=0.0, delta=None, **options):
    model = adopt(tiny() if model is None else model)
    LTP(final_threshold=final, **options).apply(model)
    if delta is not None:
        model.executor.delta.data.copy_(torch.tensor(delta))
    return model


DELTA = [0.03, 0.05, 0.07, 0.08]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_of_zero_leave_the_plain_model(family):
    batch = rows()
    output = pruning(tiny(family))(**batch)
    torch.testing.assert_close(output.logits, tiny(family)(**batch).logits, atol=1e-5, rtol=1e-5)
    assert (output.lengths == batch["attention_mask"].sum(1, keepdim=True)).all()


@torch.no_grad()
def test_thresholds_of_zero_leave_the_plain_model_to_rounding_in_double():
    batch = rows()
    output = pruning(tiny().double())(**batch)
    torch.testing.assert_close(output.logits, tiny().double()(**batch).logits, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_scores_of_live_tokens_sum_to_one_and_padding_scores_nothing():
    probabilities = torch.rand(3, 2, 6, 6).softmax(-1)
    live = torch.arange(6) < torch.tensor([[6], [4], [1]])
    probabilities = probabilities.masked_fill(~live[:, None, None, :], 0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    scores = received(probabilities, live)
    torch.testing.assert_close(scores.sum(1), torch.ones(3))
    assert (scores[~live] == 0).all()
    torch.testing.assert_close(received(probabilities, live, 6), scores * live.sum(1, keepdim=True) / 6)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_answers_as_its_texts_one_by_one(family):
    model = pruning(tiny(family), delta=DELTA)
    batch = rows()
    together = model(**batch)
    assert (together.lengths[:, -1] < together.lengths[:, 0]).any()
    for i, count in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = model(input_ids=batch["input_ids"][i : i + 1, :count])
        assert torch.equal(alone.lengths[0], together.lengths[i])
        torch.testing.assert_close(alone.logits[0], together.logits[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_release_counts_the_padding_and_so_prunes_more():
    model = pruning(delta=DELTA, variant="release")
    short = {name: value[:1, :8] for name, value in rows(1).items()} | {"attention_mask": torch.ones(1, 8).long()}
    long = {name: nn.functional.pad(value, (0, 20)) for name, value in short.items()}
    assert (model(**long).lengths[:, 1:] <= model(**short).lengths[:, 1:]).all()
    assert model(**long).lengths[0, -1] < model(**short).lengths[0, -1]
    plain = pruning(delta=DELTA)
    assert torch.equal(plain(**long).lengths, plain(**short).lengths)


@torch.no_grad()
def test_the_first_token_stays_whatever_the_threshold():
    output = pruning(delta=[1.0] * LAYERS)(**rows())
    assert output.lengths[:, 1:].tolist() == [[1] * LAYERS] * 12
    assert output.logits.isfinite().all()


@torch.no_grad()
def test_removed_tokens_cost_nothing():
    model = pruning(delta=DELTA)
    seen = []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    lengths = model(**embedded(model, rows())).lengths
    assert seen == lengths[:, 1:].max(0).values.tolist()
    assert seen[-1] < 14
    feed, tokens = _PackedLayer.feed, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_PackedLayer, "feed", lambda self, x: tokens.append(len(x)) or feed(self, x))
        lengths = model(**rows()).lengths
    assert tokens == lengths[:, 1:].sum(0).tolist()


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_packed_and_padded_runs_answer_alike(variant):
    model = pruning(delta=DELTA, variant=variant)
    packed, padded = model(**rows()), model(**embedded(model, rows()))
    assert torch.equal(packed.lengths, padded.lengths)
    assert (packed.lengths[:, -1] < packed.lengths[:, 0]).any()
    torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-5)


def embedded(model, batch):
    """The same call with the words' vectors, which is run on the padded batch."""
    words = model.bert.embeddings.word_embeddings(batch["input_ids"])
    return {"inputs_embeds": words, "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def test_measure_counts_the_operations_of_the_layers():
    text = {"input_ids": rows(1)["input_ids"].clamp(min=1), "attention_mask": torch.ones(1, 14, dtype=torch.long)}

    def counted(model):
        with FlopCounterMode(display=False) as counter:
            lengths = model(**embedded(model, text)).lengths[0].tolist()
        votes = sum(2 * n**2 for n in lengths[:-1])  # the sums over queries, which the paper leaves out
        return counter.get_total_flops() - votes - 2 * WIDTH**2 - 2 * WIDTH * CLASSES  # and the head

    model, whole = pruning(delta=DELTA), pruning()
    spent, full = counted(model), counted(whole)
    found = model.executor.measure(model, [text])
    assert found.flops == pytest.approx(spent / full)
    assert found.length == 14
    assert found.kept == model(**text).lengths[0, 1:].tolist()


@torch.no_grad()
def test_the_soft_mask_becomes_the_hard_one_as_the_temperature_falls():
    scores = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    live, threshold = torch.ones(5, 9, dtype=torch.bool), torch.tensor(0.4)
    assert torch.equal(soft_mask(scores, threshold, 1e-7).bool(), hard_mask(scores, threshold, live))


def test_thresholds_learn_in_the_soft_stage_alone():
    model = pruning(tiny(), final=0.05, temperature=1e-2)
    labels = torch.arange(12) % CLASSES
    model.train()
    model.executor.penalty = 0.1
    model(**rows(), labels=labels).loss.backward()
    assert (model.executor.delta.grad != 0).all()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    model.executor.penalty = None
    model(**rows(), labels=labels).loss.backward()
    assert model.executor.delta.grad is None
    assert model.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


def test_the_penalty_is_the_sum_of_the_mean_masks():
    model = pruning(tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), final=0.05, temperature=1e-2)
    labels = torch.arange(12) % CLASSES
    model.train()
    losses = []
    for penalty in (0.0, 1.0):
        model.executor.penalty = penalty
        losses.append(model(**rows(), labels=labels).loss)
    regular = model.executor.soften(*view(model, rows()))[2]
    torch.testing.assert_close(losses[1] - losses[0], regular)
    assert 0 < regular < LAYERS


def view(model, batch):
    whole = classifier(model, "LTP")
    return whole, whole.embed(**batch), batch["attention_mask"].bool()


def test_training_adds_one_number_a_layer_and_freezes_it():
    model = adopt(tiny())
    change = apply(model, LTP(final_threshold=0.05, temperature=1e-2), data())
    assert change.parameters[1] - change.parameters[0] == LAYERS
    assert (model.executor.delta != 0).all()
    assert not model.executor.delta.requires_grad
    assert model.executor.penalty is None


@torch.no_grad()
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_it_saves_and_loads(family, tmp_path):
    model = pruning(tiny(family), final=0.03, delta=DELTA, variant="release")
    model.save_pretrained(tmp_path)
    again = load(tmp_path).eval()
    mine, theirs = model(**rows()), again(**rows())
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.lengths, theirs.lengths)
    assert again.executor.variant == "release"


@torch.no_grad()
def test_compact_keeps_the_order():
    hidden = torch.arange(12.0).view(2, 6, 1)
    keep = torch.tensor([[1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 1, 0]]).bool()
    packed, live = compact(hidden, keep)
    assert packed[..., 0].tolist()[0] == [0, 2, 5]
    assert packed[1, :2, 0].tolist() == [6, 10]
    assert live.tolist() == [[True] * 3, [True, True, False]]


@torch.no_grad()
def test_bfloat16_and_autocast_answer_and_hidden_states_are_the_whole_models():
    assert pruning(delta=DELTA).bfloat16()(**rows()).logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert pruning(delta=DELTA)(**rows()).logits.isfinite().all()
    assert pruning(delta=DELTA)(**rows(), output_hidden_states=True).hidden_states[-1].shape[1] == 14


def test_what_it_cannot_do_raises():
    with pytest.raises(FormwrightError, match="classifier of whole texts"):
        LTP().check(transformers.BertModel(tiny().config))
    with pytest.raises(FormwrightError, match="above 0"):
        LTP(temperature=0.0)
    with pytest.raises(FormwrightError, match="must be"):
        build("modifier", "ltp(variant=fast)")
    with pytest.raises(FormwrightError, match="pad on the right"):
        pruning()(input_ids=torch.ones(1, 4).long(), attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(FormwrightError, match="token-pruning already"):
        LTP().check(pruning())


def test_the_catalogue_builds_it():
    modifier = build("modifier", "ltp(penalty=0.05, soft_steps=20)")
    assert isinstance(modifier, LTP)
    assert (modifier.penalty, modifier.steps["soft"]) == (0.05, 20)


@torch.no_grad()
def masked(model, batch, thresholds):
    """The published inference, nothing removed: a pruned token is a key that is hidden, and its row does not vote."""
    live = batch["attention_mask"].bool()
    hidden, lengths, sets = model.bert.embeddings(batch["input_ids"]), [live.sum(1)], [live]
    for layer, threshold in zip(model.bert.encoder.layer, thresholds, strict=True):
        own = layer.attention.self
        q, k, v = (
            one(hidden).view(*hidden.shape[:2], 2, -1).transpose(1, 2) for one in (own.query, own.key, own.value)
        )
        a = (q @ k.transpose(2, 3) / (WIDTH // 2) ** 0.5 + (~live)[:, None, None, :] * -1e9).softmax(-1)
        a = a * live[:, None, :, None]
        scores = a.mean(1).sum(1) / live.sum(1, keepdim=True)
        hidden = layer.attention.output((a @ v).transpose(1, 2).reshape(hidden.shape), hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
        live = scores >= max(1e-5, threshold)
        live[:, 0] = True
        lengths.append(live.sum(1))
        sets.append(live)
    return model.classifier(model.bert.pooler(hidden)), torch.stack(lengths, 1), sets


@pytest.mark.reference
@torch.no_grad()
@pytest.mark.parametrize("final", [0.0, 0.06, 0.1])
def test_removing_tokens_equals_masking_them(final):
    model, batch = pruning(final=final, delta=DELTA), rows()
    output = model(**batch)
    logits, lengths, sets = masked(tiny(), batch, [final * i / LAYERS + DELTA[i] for i in range(LAYERS)])
    assert torch.equal(output.lengths, lengths)
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-5)
    assert all((after <= before).all() for before, after in itertools.pairwise(sets))


def test_layers_removed_afterwards_are_an_error_and_no_wrong_threshold():
    model = pruning()
    del model.bert.encoder.layer[1]
    with pytest.raises(FormwrightError, match="before ltp"):
        model(**rows())
