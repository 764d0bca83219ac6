"""Fidelity of embeddings: 1 for the same geometry, however it was turned; ranks as SciPy's."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from formwright.compress.fidelity import agreement, embeddings, fidelity, mean_pooled, ranks, spearman
from formwright.errors import FormwrightError
from formwright.tasks.base import Columns, Defaults, Task
from formwright.training import Settings


def task(rows=30):
    torch.manual_seed(0)
    ids = torch.randint(20, (rows, 6))
    held = Columns(input_ids=ids, attention_mask=(torch.arange(6) < torch.randint(1, 7, (rows, 1))).long())
    return Task(
        name="texts", head="sentence-embedding", model_config={}, train=held, validation=held, test=held, metrics=(),
        baselines=dict, defaults=Defaults(settings=Settings(), model={}),
    )  # fmt: skip


def bert(seed=0, cls=BertModel):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, initializer_range=0.5,
    )  # fmt: skip
    return cls(config)


@pytest.mark.reference
def test_the_rank_correlation_is_scipys_ties_and_all():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    x, y = torch.randint(12, (200,)).double(), torch.randn(200).double()
    y = y + x / 3
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert ranks(x).tolist() == stats.rankdata(x).tolist()


def test_a_turned_and_stretched_space_is_the_same_space():
    torch.manual_seed(0)
    theirs = torch.randn(40, 8)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    assert agreement(3 * theirs @ turn, theirs) == pytest.approx({"fidelity": 1, "neighbours": 1})
    wider = torch.cat([theirs, torch.zeros(40, 5)], 1)
    assert agreement(wider, theirs)["fidelity"] == pytest.approx(1)


def test_another_space_is_near_zero_and_one_point_is_zero():
    torch.manual_seed(0)
    theirs = torch.randn(200, 32)
    found = agreement(torch.randn(200, 32), theirs)
    assert abs(found["fidelity"]) < 0.05
    assert found["neighbours"] < 0.15
    assert agreement(torch.ones(200, 32), theirs)["fidelity"] == 0


def test_neighbours_are_counted_by_hand():
    angles = torch.deg2rad(torch.arange(0.0, 60.0, 5.0))  # twelve texts: each misses exactly one
    theirs = torch.stack([angles.cos(), angles.sin()], 1)
    ours = theirs.clone()
    ours[0] = theirs[11] + torch.tensor([-1e-3, 0.0])  # the first moved next to the last
    nearest = [
        {j for j in sorted(range(12), key=lambda j: -float(e[i] @ e[j] / e[i].norm() / e[j].norm())) if j != i}
        for e in (ours,)
        for i in range(12)
    ]
    assert len(nearest[0]) == 11
    found = agreement(ours, theirs)
    assert 0.9 <= found["neighbours"] < 1


def test_a_model_agrees_with_itself_and_less_with_another():
    model, rows = bert(), task()
    model.train()
    assert fidelity(model, model, rows) == {"fidelity": pytest.approx(1), "neighbours": 1}
    assert model.training
    assert fidelity(bert(1), model, rows)["fidelity"] < 0.95
    assert len(embeddings(model, rows, most=7)) == 7


def test_the_mean_is_over_real_tokens():
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0]])
    pooled = mean_pooled(hidden, mask)
    torch.testing.assert_close(pooled[0], hidden[0].mean(0))
    torch.testing.assert_close(pooled[1], hidden[1, 1])


def test_what_has_no_embeddings_or_pairs_is_refused():
    with pytest.raises(FormwrightError, match="no hidden states to embed"):
        embeddings(bert(cls=BertForSequenceClassification), task())
    with pytest.raises(FormwrightError, match="at least 3"):
        agreement(torch.randn(2, 4), torch.randn(2, 4))
