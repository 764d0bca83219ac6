"""I-BERT: no float inside, both carriers alike, four families, training, saving; then transformers' own I-BERT."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

import formwright
from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.modifier import Data
from formwright.compress.quantize.i_bert import IBert, IntegerEncoder, Simulation, loss_of
from formwright.errors import FormwrightError
from formwright.training import Settings

TEXT = {"vocab_size": 40, "pad_token_id": 0, "max_position_embeddings": 32, "num_labels": 3}
SIZE = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
DISTIL = {"dim": 16, "hidden_dim": 24, "n_heads": 4, "n_layers": 2}
MODELS = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **SIZE)),
    "bert bare": lambda: hf.BertModel(hf.BertConfig(**TEXT, **SIZE)),
    "bert unpooled": lambda: hf.BertModel(hf.BertConfig(**TEXT, **SIZE), add_pooling_layer=False),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT | {"pad_token_id": 1}, **SIZE)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**TEXT, **DISTIL)),
    "distilbert bare": lambda: hf.DistilBertModel(hf.DistilBertConfig(**TEXT, **DISTIL)),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**TEXT, **SIZE, embedding_size=8)),
    "relu": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **SIZE, hidden_act="relu")),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def collate(items: list) -> dict[str, torch.Tensor]:
    ids = torch.stack([one[0] for one in items])
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.sum(1) % 3}


def data(**settings: Any) -> Data:
    rows = TensorDataset(torch.randint(3, 40, (64, 9), generator=torch.Generator().manual_seed(0)))
    task: Any = SimpleNamespace(name="rows", head="", train=rows, validation=None, test=rows, score=None, summary=None)
    task.collate = collate
    return Data(task=task, kind="text-classification", settings=Settings(batch_size=8, **settings))


def batch() -> dict[str, torch.Tensor]:
    [one] = data().batches(1, batch_size=6)
    return one


def integer(name: str, **options: Any) -> Any:
    model = made(name)
    pipeline.apply(model, IBert(**({"qat_steps": 0, "samples": 64} | options)), data())
    return model


class WholeNumbers(TorchDispatchMode):
    """Fails where a tensor of floats goes in or comes out."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            assert not (isinstance(one, torch.Tensor) and one.is_floating_point()), function
        return result


@pytest.mark.parametrize("name", MODELS)
def test_no_float_between_the_tables_and_the_answer(name):
    model = integer(name)
    with WholeNumbers():
        states, answer = model.executor.encoded(batch())
    assert states.dtype == torch.int8
    assert (answer is None) == (name in ("bert unpooled", "distilbert bare"))


@pytest.mark.parametrize("name", MODELS)
def test_the_simulation_gives_the_same_numbers(name):
    model = made(name)
    method = IBert(qat_steps=0, samples=64)
    method.calibrate(model, data())
    simulation = method.simulation.eval()
    with torch.no_grad():
        states, answer = simulation.encoded(batch())
    pipeline.adopt(model)
    method.finalize(model)
    ours_states, ours = model.executor.encoded(batch())
    assert torch.equal(ours_states.double(), states.q)
    assert ours is None if answer is None else torch.equal(ours.double(), answer.q)


@pytest.mark.parametrize("name", MODELS)
def test_the_answer_is_near_the_float_models(name):
    before, after = made(name), integer(name)
    with torch.no_grad():
        theirs, ours = before(**batch()), after(**batch())
    real = batch()["attention_mask"].bool()
    if "logits" in theirs:
        spread = theirs.logits.std()
        assert (ours.logits - theirs.logits).abs().mean() < 0.15 * spread
        return
    a, b = ours.last_hidden_state[real], theirs.last_hidden_state[real]
    assert (a - b).abs().mean() < 0.1 * b.std()
    if getattr(theirs, "pooler_output", None) is not None:
        assert (ours.pooler_output - theirs.pooler_output).abs().mean() < 0.1


def test_padding_changes_nothing():
    model, one = integer("bert"), batch()
    ids = one["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    torch.manual_seed(2)
    other = torch.where(mask.bool(), ids, torch.randint_like(ids, 3, 40))
    expected = model(input_ids=ids[:, :5]).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(model(input_ids=other, attention_mask=mask).logits, expected)


def test_roberta_counts_positions_of_real_tokens_as_the_model_does():
    model, ids = integer("roberta"), batch()["input_ids"]
    expected = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids, position_ids=torch.arange(2, 11)[None]).logits, expected)
    padded = torch.nn.functional.pad(ids, (0, 2), value=1)
    assert torch.equal(model(input_ids=padded, attention_mask=(padded != 1).long()).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_saved_as_integers_and_comes_back(name, tmp_path):
    model = integer(name)
    model.save_pretrained(tmp_path)
    again = formwright.load(tmp_path)
    assert isinstance(again.executor, IntegerEncoder)
    for one, two in zip(model(**batch()).to_tuple(), again(**batch()).to_tuple(), strict=True):
        assert torch.equal(one, two)
    floats = [value.numel() for value in again.state_dict().values() if value.is_floating_point()]
    assert sum(floats) <= 16 + 3


def test_a_model_of_some_width_takes_a_quarter_of_the_bytes():
    wide = {**SIZE, "hidden_size": 128, "intermediate_size": 512}
    model = hf.BertForSequenceClassification(hf.BertConfig(**TEXT | {"vocab_size": 2000}, **wide))
    change = pipeline.apply(model, IBert(qat_steps=0, samples=8), data())
    assert 3.6 < change.bytes[0] / change.bytes[1] <= 4


def test_training_moves_every_weight_that_is_read_and_lowers_the_loss():
    model = made("bert")
    simulation = Simulation(model, weight_bits=8, activation_bits=8).train()
    one = next(data().batches(1, batch_size=16, labels=True))
    simulation(**one)["loss"].backward()
    unused = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert all(name.endswith("key.bias") for name in unused)
    trained = copy.deepcopy(made("bert"))
    method = IBert(qat_steps=30, learning_rate=3e-3, samples=64)
    before = integer("bert")
    pipeline.apply(trained, method, data())
    rows = next(data().batches(1, batch_size=64, labels=True))
    assert trained(**rows).loss < before(**rows).loss - 0.05


def test_ranges_follow_slowly_in_training_and_stay_otherwise():
    simulation = Simulation(made("bert"), weight_bits=8, activation_bits=8)
    first, second = torch.tensor([-1.0, 3.0]), torch.tensor([-5.0, 2.0])
    simulation.train()
    simulation.scale("x", first, 8)
    assert simulation.scale("x", second, 8) * 127 == pytest.approx(0.95 * 3 + 0.05 * 2)
    simulation.eval()
    simulation.scale("x", 9 * second, 8)
    assert simulation.ranges["x"].tolist() == pytest.approx([-0.95 - 0.25, 2.95])


def test_gradients_are_near_those_of_the_float_model():
    model = made("bert").double()
    one = next(data().batches(1, batch_size=16, labels=True))
    simulation = Simulation(model, weight_bits=8, activation_bits=8).train()
    simulation(**one)["loss"].backward()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    model.eval()(**one).loss.backward()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embeddings" not in name:
            assert torch.cosine_similarity(ours[name].flatten(), weight.grad.flatten(), dim=0) > 0.9, name


def test_a_weight_of_zero_or_below_in_a_norm_is_no_exception():
    model = made("bert")
    norm = model.bert.encoder.layer[0].output.LayerNorm
    with torch.no_grad():
        norm.weight[:3] = 0
        norm.weight[3:6] = -1
    expected = copy.deepcopy(model)(**batch()).logits
    pipeline.apply(model, IBert(qat_steps=0, samples=64), data())
    assert (model(**batch()).logits - expected).abs().mean() < 0.15 * expected.std()


def test_fewer_bits_are_fewer_values():
    model = integer("bert", weight_bits=3, activation_bits=4)
    assert model.executor.constant("0.query", "weight").abs().max() <= 3
    assert model.executor.encoded(batch())[0].abs().max() <= 8


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_the_loss_is_transformers_own(problem):
    model = made("bert")
    model.config.problem_type = problem
    one = batch()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    if problem != "single_label_classification":
        labels = torch.nn.functional.one_hot(labels).float()
    out = model(**one, labels=labels)
    torch.testing.assert_close(loss_of(model, out.logits, labels), out.loss)


def test_labels_give_a_loss_and_return_dict_a_tuple():
    model, one = integer("bert"), batch()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    out = model(**one, labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    assert torch.equal(model(**one, return_dict=False)[0], out.logits)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "inputs_embeds"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "output_attentions": True}, "output_attentions"),
        ({"input_ids": torch.ones(1, 33, dtype=torch.long)}, "truncate"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)}, "axes"),
        ({}, "input_ids"),
    ],
)
def test_what_it_cannot_take_raises(call, says):
    with pytest.raises(FormwrightError, match=says):
        integer("bert")(**call)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"qat_steps": -1}, "qat_steps"), ({"samples": 0}, "samples"), ({"weight_bits": 9}, "weight_bits")],
)
def test_options_are_checked(options, says):
    with pytest.raises(FormwrightError, match=says):
        IBert(**options)


def test_models_it_cannot_run_are_refused():
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    tanh = hf.BertModel(hf.BertConfig(**TEXT, **SIZE, hidden_act="gelu_new"))
    masked = hf.BertForMaskedLM(hf.BertConfig(**TEXT, **SIZE))
    for model, says in ((gpt2, "gpt2"), (tanh, "gelu_new"), (masked, "BertForMaskedLM"), (made("bert bare"), "loss")):
        with pytest.raises(FormwrightError, match=says):
            IBert().check(model)
    with pytest.raises(FormwrightError):
        IBert(qat_steps=0).check(integer("bert"))
    with pytest.raises(FormwrightError, match="calibrate"):
        IBert(qat_steps=0).finalize(made("bert"))


def test_the_catalogue_knows_it():
    method = build("modifier", "i-bert(qat_steps=0, activation_bits=6)")
    assert isinstance(method, IBert)
    assert method.activation_bits == 6


@pytest.mark.reference
def test_states_are_as_near_to_float_as_transformers_own_integer_model():
    config = hf.IBertConfig(**{**TEXT, **SIZE, "pad_token_id": 1}, quant_mode=True)
    plain = made("roberta")
    theirs = hf.IBertModel(config, add_pooling_layer=False)
    theirs.load_state_dict(plain.roberta.state_dict(), strict=False)
    one = batch()
    theirs.train()  # ranges follow in training; the config has dropout
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for rows in data().batches(4, batch_size=16):
            theirs(**rows)
        theirs.eval()
        found = theirs(**one).last_hidden_state
        expected = plain.roberta(**one).last_hidden_state
    bare = copy.deepcopy(plain.roberta)
    pipeline.apply(bare, IBert(qat_steps=0, samples=64), data())
    real = one["attention_mask"].bool()
    ours = (bare(**one).last_hidden_state - expected)[real].abs().mean()
    assert ours < 1.2 * (found - expected)[real].abs().mean()
