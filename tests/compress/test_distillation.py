"""Distillation: the paper's loss by hand, twins that have nothing to learn, depths and widths that differ."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from formwright.build import build
from formwright.compress.distill import Distill, Pair, matched, soft_loss, state_loss
from formwright.compress.fidelity import fidelity
from formwright.compress.modifier import Data
from formwright.compress.pipeline import run
from formwright.errors import FormwrightError
from formwright.tasks.base import Columns, Defaults, Task, score_next, score_rows
from formwright.training import Settings

SETTINGS = Settings(steps=30, batch_size=16, learning_rate=3e-3)


def bert(cls=BertForSequenceClassification, *, layers=2, width=16, labels=3, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=labels, initializer_range=0.5, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return cls(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def vit(seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def columns(kind, rows=64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (rows,), generator=generator)
    if kind == "image-classification":
        return Columns(pixel_values=torch.randn(rows, 3, 8, 8, generator=generator), labels=labels)
    ids = torch.randint(40, (rows, 10), generator=generator)
    if kind == "causal-lm":
        return Columns(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    mask = (torch.arange(10) < torch.randint(3, 11, (rows, 1), generator=generator)).long()
    told = {"input_ids": ids, "attention_mask": mask}
    return Columns(**told) if kind == "sentence-embedding" else Columns(**told, labels=labels)


def data(kind, teacher=None, settings=SETTINGS):
    rows = columns(kind)
    task = Task(
        name="sample",
        head={"text-classification": "sequence-classification"}.get(kind, kind),
        model_config={},
        train=rows,
        validation=rows,
        test=rows,
        metrics=(),
        score=score_next if kind == "causal-lm" else score_rows,
        baselines=dict,
        defaults=Defaults(settings=settings, model={}),
    )
    return Data(task=task, kind=kind, teacher=teacher, settings=settings)


def pair(student, teacher, kind="text-classification", **options):
    options = {"temperature": 2.0, "alpha": 0.5, "hidden": 1.0, **options}
    batch = columns(kind).__getitems__(range(8))
    example = {name: value for name, value in batch.items() if name != "labels"}
    return Pair(student, teacher, kind=kind, example=example, **options), batch


def test_the_soft_loss_is_the_sum_written_out():
    ours, theirs = torch.randn(5, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    p, q = (theirs / 3).softmax(-1), (ours / 3).softmax(-1)
    by_hand = 9 * (p * (p.log() - q.log())).sum() / 5
    torch.testing.assert_close(soft_loss(ours, theirs, 3.0).double(), by_hand, rtol=1e-5, atol=1e-6)
    assert soft_loss(ours, ours, 3.0) == pytest.approx(0, abs=1e-6)


def test_at_high_temperature_the_gradient_is_that_of_centred_logits():
    """The paper's section 2.1: T^2 dKL/dz -> (z - v) / N for logits of mean zero."""
    ours, theirs = torch.randn(1, 6), torch.randn(1, 6)
    ours, theirs = (ours - ours.mean()).requires_grad_(), theirs - theirs.mean()
    soft_loss(ours, theirs, 500.0).backward()
    torch.testing.assert_close(ours.grad, (ours - theirs).detach() / 6, rtol=0.02, atol=2e-3)


@pytest.mark.reference
def test_the_answers_loss_is_torchs_divergence_and_cross_entropy():
    module, batch = pair(bert(), bert(seed=1), hidden=0.0, alpha=0.3, temperature=4.0)
    plain = {name: value for name, value in batch.items() if name != "labels"}
    ours, theirs = module.student(**plain).logits, module.others[0](**plain).logits
    soft = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=theirs / 4), torch.distributions.Categorical(logits=ours / 4)
    ).mean()
    expected = 0.3 * 16 * soft + 0.7 * F.cross_entropy(ours, batch["labels"])
    torch.testing.assert_close(module(**batch)["loss"], expected)


def test_padding_changes_no_loss():
    module, batch = pair(bert(), bert(layers=4, width=24, seed=1))
    batch = {name: value for name, value in batch.items() if name != "labels"}
    wide = {name: F.pad(value, (0, 5)) for name, value in batch.items()}
    torch.testing.assert_close(module(**wide)["loss"], module(**batch)["loss"])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (bert, "text-classification"),
        (vit, "image-classification"),
        (gpt2, "causal-lm"),
        (lambda: bert(BertModel), "sentence-embedding"),
    ],
)
def test_twins_have_nothing_to_learn_and_others_learn(make, kind):
    module, batch = pair(make(), make(), kind, alpha=1.0)
    assert module(**batch)["loss"].item() == pytest.approx(0, abs=1e-5)
    teacher = make()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    before, batch = pair(copy.deepcopy(student), teacher, kind, alpha=1.0)
    student, [change] = run(student, "distill(alpha=1)", data(kind, teacher))
    after, _ = pair(student, teacher, kind, alpha=1.0)
    assert after(**batch)["loss"] < 0.7 * before(**batch)["loss"]
    assert change.parameters[0] == change.parameters[1]  # nothing of the training is left behind


def test_layers_meet_at_the_same_share_of_the_depth():
    ours, theirs = (tuple(torch.full((1, 1, 1), float(i)) for i in range(n)) for n in (4, 7))
    assert [(int(a), int(b)) for a, b in matched(ours, theirs)] == [(0, 0), (1, 2), (2, 4), (3, 6)]
    assert [int(b) for _, b in matched(theirs, theirs)] == list(range(7))


def test_other_widths_are_met_through_a_matrix_that_is_thrown_away():
    student, teacher = bert(layers=2, width=16), bert(layers=4, width=24, seed=1)
    module, batch = pair(student, teacher)
    assert [tuple(one.weight.shape) for one in module.projections] == [(24, 16)] * 3
    module(**batch)["loss"].backward()
    assert all(one.weight.grad is not None for one in module.projections)
    assert all(weight.grad is None for weight in teacher.parameters())
    names = set(student.state_dict())
    Distill(steps=2).finetune(student, data("text-classification", teacher))
    assert set(student.state_dict()) == names


def test_the_teacher_reads_without_dropout_and_stays_as_it_is():
    teacher = bert(seed=1, dropout=0.5)
    weights = copy.deepcopy(teacher.state_dict())
    module, batch = pair(bert(), teacher, hidden=0.0, alpha=1.0)
    module.train()
    assert module(**batch)["loss"] == module(**batch)["loss"]
    Distill(steps=3).finetune(module.student, data("text-classification", teacher))
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, weights[name])


def test_pruned_weights_stay_zero():
    student, teacher = bert(), bert()
    weight = student.bert.encoder.layer[0].intermediate.dense.weight
    with torch.no_grad():
        weight[:, ::2] = 0
    Distill(steps=5).finetune(student, data("text-classification", teacher))
    assert (weight[:, ::2] == 0).all()
    assert (weight[:, 1::2] != teacher.bert.encoder.layer[0].intermediate.dense.weight[:, 1::2]).any()


def test_an_embedding_comes_nearer_to_the_originals():
    teacher, student = bert(BertModel), bert(BertModel)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(0.2 * torch.randn_like(weight, generator=None))
    rows = data("sentence-embedding", teacher)
    before = fidelity(student, teacher, rows.task)["fidelity"]
    Distill(steps=60).finetune(student, rows)
    assert fidelity(student, teacher, rows.task)["fidelity"] > before


def test_states_are_compared_relative_to_their_size():
    ours, theirs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(state_loss(1000 * ours, 1000 * theirs, mask), state_loss(ours, theirs, mask))
    assert state_loss(2 * theirs, theirs, None) == pytest.approx(1)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("distill(temperature=0)", "temperature is 0"),
        ("distill(alpha=2)", "from 0 to 1"),
        ("distill(hidden=-1)", "0 or more"),
        ("distill(alpha=0, hidden=0)", "nothing to learn"),
        ("distill(steps=3, epochs=1)", "leave one"),
        ("distill(learning_rate=-1)", "above 0"),
    ],
)
def test_impossible_options_are_refused(spec, says):
    with pytest.raises(FormwrightError, match=says):
        build("modifier", spec)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(FormwrightError, match="holds none as its teacher"):
        Distill().finetune(bert(), data("text-classification"))
    with pytest.raises(FormwrightError, match="same classes"):
        Distill().finetune(bert(labels=2), data("text-classification", bert()))
    with pytest.raises(FormwrightError, match="put it before the step that lowers"):
        Distill().check(bert().bfloat16())
    regression = bert()
    regression.config.problem_type = "regression"
    with pytest.raises(FormwrightError, match="regression"):
        Distill().check(regression)
