"""Protoformer: which texts become prototypes, whom they vote for, and training on both labels."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForSequenceClassification
from formwright.tasks.base import ACCURACY, LOSS, Defaults, Task
from formwright.tasks.support.texts import Texts, padded
from formwright.training import Method, Settings, evaluate, fit, seeded
from formwright.training.protoformer import (
    Protoformer,
    Prototypes,
    Rows,
    adjusted,
    choose,
    count,
    density,
    last_layer,
    prototypes,
    read,
    recalled_least,
    similarity,
    sorted_by,
    walked,
)


def blobs(rows=60, classes=2, width=8, spread=0.4, seed=0):
    """Well separated classes, and their labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = 3 * torch.eye(width)[:classes]
    return centres[labels] + spread * torch.randn(rows, width, generator=random), labels


# Selection


def test_similarities_are_cosines():
    e, _ = blobs()
    s = similarity(e)
    assert torch.equal(s, s.T)
    assert torch.equal(s.diagonal(), torch.ones(60))
    torch.testing.assert_close(s[3, 5], F.cosine_similarity(e[3], e[5], dim=0))


def test_identical_texts_are_the_densest():
    e, _ = blobs(30, 1)
    e[10:20] = e[10]
    rho, _ = density(similarity(e), 0.9)
    assert bool((rho[10:20] == rho.max()).all())
    assert rho.max() > rho[[*range(10), *range(20, 30)]].max()


def test_a_density_counts_nearer_less_farther_and_leaves_itself_out():
    s = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.5], [0.1, 0.5, 1.0]])
    rho, sigma = density(s, 0.5)  # of .1 .1 .5 .5 .9 .9 the median is .5
    assert rho.tolist() == [0, 1, -1]
    torch.testing.assert_close(sigma, torch.tensor([0.5, 0.7, 0.3]))


def test_equal_densities_are_sorted_by_similarity():
    rho, sigma = torch.tensor([1, 3, 3, 1]), torch.tensor([0.2, 0.1, 0.5, 0.4])
    assert sorted_by(rho, sigma, dense=True).tolist() == [2, 1, 3, 0]
    assert sorted_by(rho, sigma, dense=False).tolist() == [3, 0, 2, 1]


@pytest.mark.parametrize("rows", range(3, 70))
def test_pieces_double_so_a_class_has_as_many_prototypes_as_its_logarithm(rows):
    s = similarity(blobs(rows, 1)[0])
    dense, sparse = choose(s, 0.2)
    assert len(dense) == len(sparse) == math.floor(math.log2(rows + 1)) - 1 == count(rows)
    order = sorted_by(*density(s, 0.2), dense=True).tolist()
    start = 0
    for place, chosen in enumerate(dense):
        size = 2 ** (place + 1)
        assert chosen in order[start : start + size]
        start += size
    assert len(set(dense)) == len(dense)


def test_of_a_piece_the_most_different_text_is_chosen():
    s = torch.eye(7).clamp(min=0.5)
    s[2:6, 0] = s[0, 2:6] = torch.tensor([0.8, 0.7, 0.2, 0.9])
    assert walked(s, torch.arange(7)) == [0, 4]
    assert walked(s, torch.arange(7), beside=[6])[0] == 0  # of two alike, the first


def test_dense_texts_stand_for_the_class_and_outliers_are_anomalies():
    e, _ = blobs(60, 1)
    e[50:] = 4 * torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    s = similarity(e)
    rho, _ = density(s, 0.2)
    dense, sparse = choose(s, 0.2)
    middle = rho.float().median()
    assert bool((rho[dense][:-1] >= middle).all())
    assert bool((rho[sparse][:-1] <= middle).all())
    assert sum(place >= 50 for place in sparse) > sum(place >= 50 for place in dense)


def test_another_order_of_the_texts_gives_the_same_prototypes():
    e, labels = blobs(80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    first, second = prototypes(e, labels, 2), prototypes(e[order], labels[order], 2)
    assert torch.equal(first.rows, order[second.rows])
    assert torch.equal(first.labels, second.labels)


def test_prototypes_stand_for_their_own_class_and_large_classes_are_sampled():
    e, labels = blobs(90, 3)
    found = prototypes(e, labels, 3)
    assert torch.equal(labels[found.rows], found.labels)
    assert torch.equal(found.embeddings, e[found.rows])
    assert found.anomalous.sum() == (~found.anomalous).sum() == 3 * count(30)
    few = prototypes(e, labels, 3, most=7, seed=1)
    assert len(few.rows) == 2 * 3 * count(7)
    assert torch.equal(few.rows, prototypes(e, labels, 3, most=7, seed=1).rows)
    assert not torch.equal(few.rows, prototypes(e, labels, 3, most=7, seed=2).rows)
    with pytest.raises(FormwrightError, match="Class 2 has 0 training texts"):
        prototypes(e[labels < 2], labels[labels < 2], 3)


# Votes


def test_separated_classes_are_voted_as_they_are():
    e, labels = blobs(90, 3)
    found = prototypes(e, labels, 3)
    assert torch.equal(found.vote(e), labels)
    assert torch.equal(adjusted(found, e, labels, labels, torch.arange(3)), labels)


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_wrong_labels_of_separated_classes_are_repaired(share):
    e, labels = blobs(400, 2)
    noisy = labels.clone()
    at = torch.randperm(400, generator=torch.Generator().manual_seed(0))[: int(share * 400)]
    noisy[at] = 1 - noisy[at]
    new = adjusted(prototypes(e, noisy, 2), e, noisy, labels, torch.arange(2))
    assert (new == labels).float().mean() > 0.98


def test_a_vote_is_the_mean_similarity_to_class_prototypes():
    e = torch.eye(4)
    found = Prototypes(
        rows=torch.arange(4),
        labels=torch.tensor([0, 0, 1, 1]),
        anomalous=torch.tensor([False, False, False, True]),
        embeddings=e,
    )
    texts = torch.tensor([[1.0, 1.0, 1.2, 0.0], [1.0, 0.0, 0.9, 0.0], [0.0, 0.1, 0.0, 9.0]])
    assert found.vote(texts).tolist() == [1, 1, 0]  # 1 and 1.2; .5 and .9; anomalies do not vote
    places, alike = found.nearest(texts, 2)
    assert places[2].tolist() == [3, 1]
    torch.testing.assert_close(alike, similarity(torch.cat([texts, e]))[:3, 3:].topk(2, 1).values)


def test_a_prototype_keeps_its_label_unless_classifier_and_vote_both_say_another():
    e, labels = blobs(60)
    found = prototypes(e, labels, 2)
    noisy = labels.clone()
    keeps, yields, ordinary = int(found.rows[0]), int(found.rows[1]), next(i for i in range(60) if i not in found.rows)
    for place in (keeps, yields, ordinary):
        noisy[place] = 1 - labels[place]  # the vote says labels
    predictions = labels.clone()
    predictions[keeps] = noisy[keeps]
    new = adjusted(found, e, noisy, predictions, torch.arange(2))
    assert new[keeps] == noisy[keeps]
    assert new[yields] == labels[yields]
    assert new[ordinary] == labels[ordinary]


def test_only_difficult_classes_are_adjusted_and_those_are_recalled_least():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    predictions = torch.tensor([0, 0, 0, 0, 2, 0])
    assert recalled_least(labels, predictions, 3, 0.3).tolist() == [1]
    assert recalled_least(labels, predictions, 3, 0.7).tolist() == [1, 2]
    assert recalled_least(labels, predictions, 3, 0.01).tolist() == [1]
    e, labels = blobs(60)
    noisy = 1 - labels
    new = adjusted(prototypes(e, labels, 2), e, noisy, noisy, torch.tensor([1]))
    kept = torch.isin(torch.arange(60), prototypes(e, labels, 2).rows)
    assert torch.equal(new[(noisy == 0)], noisy[noisy == 0])
    assert torch.equal(new[(noisy == 1) & ~kept], labels[(noisy == 1) & ~kept])


# Training


def corpus(rows=96, wrong=0):
    """Texts of two classes, of words of their own and common ones; some labels wrong."""
    random = torch.Generator().manual_seed(0)
    tokens, labels = [], torch.arange(rows) % 2
    for label in labels.tolist():
        length = int(torch.randint(5, 12, (), generator=random))
        own = torch.randint(2 + 10 * label, 12 + 10 * label, (length,), generator=random)
        tokens.append(torch.where(torch.rand(length, generator=random) < 0.5, own, 1))
    given = labels.clone()
    given[:wrong] = 1 - given[:wrong]
    settings = Settings(steps=8, batch_size=16, learning_rate=3e-3)
    return Task(
        name="two kinds",
        head="sequence-classification",
        model_config={"num_labels": 2},
        train=Texts(tokens, given, 0),
        test=Texts(tokens, labels, 0),
        metrics=(ACCURACY, LOSS),
        collate=lambda rows: padded(rows, 0),
        baselines=dict,
        defaults=Defaults(settings=settings, model={}),
    )


SETTINGS = corpus().defaults.settings
SIZE = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
BERT = {**SIZE, "intermediate_size": 32, "max_position_embeddings": 32}
CLASSIFIERS = {
    "ours": lambda: TransformerForSequenceClassification(TransformerConfig(**SIZE, position="rope", num_labels=2)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=24, dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=0)
    ),
}


def model_of(kind="ours"):
    seeded(1)
    return CLASSIFIERS[kind]()


def weights(methods, kind="ours", settings=SETTINGS, task=None):
    model = model_of(kind)
    fit(model, task or corpus(), settings, methods=methods)
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_every_classifier_is_trained_with_voted_labels(kind):
    model, method = model_of(kind), Protoformer(warmup=0.25, rounds=2)
    before = set(model.state_dict())
    history = fit(model, corpus(), SETTINGS, methods=[method])
    assert set(model.state_dict()) == before
    assert len(history.extras["adjusted"]) == 6  # from the third step on
    assert method.found.embeddings.shape[1] == 16
    assert len(method.labels) == 96


def test_without_weight_it_is_plain_training():
    assert torch.equal(weights([]), weights([Protoformer(alpha=0.0)]))
    assert not torch.equal(weights([]), weights([Protoformer(alpha=0.5, warmup=0.0)], task=corpus()))


def test_with_all_weight_only_voted_labels_are_learnt():
    class Vote(Protoformer):
        def renew(self, model):
            super().renew(model)
            self.labels = corpus().test.labels  # as if all were repaired

    wrong, right = corpus(wrong=40), corpus()
    assert torch.allclose(weights([Vote(alpha=1.0, warmup=0.0)], task=wrong), weights([], task=right), atol=1e-5)


def test_its_loss_is_the_mixture():
    losses = []

    class Watch(Method):
        def forward(self, given):
            outputs = given.run(given.batch)
            losses.append((float(outputs["loss"]), outputs["logits"].detach(), given.batch["labels"]))
            return outputs

    method = Protoformer(alpha=0.3, warmup=0.0, rounds=1)
    rows = []

    class Rowed(Method):
        def forward(self, given):
            rows.append(given.batch["row"])
            return given.run(given.batch)

    model = model_of()
    history = fit(model, corpus(wrong=30), SETTINGS, methods=[Rowed(), method, Watch()])
    for total, (plain, logits, labels), row in zip(history.losses, losses, rows, strict=True):
        assert torch.equal(corpus(wrong=30).train.labels[row], labels)
        assert total == pytest.approx(0.7 * plain + 0.3 * float(F.cross_entropy(logits, method.labels[row])), rel=1e-5)


def test_wrong_labels_are_repaired_in_training():
    task = corpus(wrong=24)
    method = Protoformer(warmup=0.5, rounds=2)
    model = model_of()
    fit(model, task, replace(SETTINGS, steps=60), methods=[method])
    assert (method.labels == task.test.labels).float().mean() > 0.85
    assert evaluate(model, task).metrics["accuracy"] > 0.85


def test_it_is_found_by_name_and_resumes_where_it_was(tmp_path):
    settings = replace(SETTINGS, steps=12, methods="protoformer(warmup=0.25, rounds=2)", save_every=5)

    class Stop(Method):
        def stepped(self, model, step):  # noqa: ARG002
            if step == 8:
                raise KeyboardInterrupt

    whole = model_of()
    fit(whole, corpus(wrong=20), replace(settings, save_every=0))
    cut = model_of()
    with pytest.raises(KeyboardInterrupt):
        fit(cut, corpus(wrong=20), settings, folder=tmp_path, methods=[Stop()])
    again = model_of()
    history = fit(again, corpus(wrong=20), settings, folder=tmp_path)
    assert len(history.extras["adjusted"]) == 7  # steps 6 to 12
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_are_found_in_any_batch_and_read_in_their_own_order():
    task, model = corpus(), model_of().eval()
    rows = Rows(task.train, task.collate)
    at = [50, 3, 77, 3]
    assert rows.find(task.collate([task.train[i] for i in at])).tolist() == at
    stranger = {"input_ids": torch.full((1, 4), 23), "attention_mask": torch.ones(1, 4)}
    assert rows.find(stranger).tolist() == [-1]
    embeddings, logits = rows.read(model)
    alone, own = read(model, [task.collate([task.train[i]]) for i in at])
    torch.testing.assert_close(embeddings[at], alone)
    torch.testing.assert_close(logits[at], own)
    torch.testing.assert_close(last_layer(model)(embeddings), logits)


def test_impossible_options_and_tasks_are_refused():
    for options in ({"alpha": 2.0}, {"warmup": 1.0}, {"rounds": 0}, {"difficult": 0.0}, {"quantile": 1.0}, {"most": 2}):
        with pytest.raises(FormwrightError, match=next(iter(options))):
            Protoformer(**options)
    images = replace(corpus(), head="image-classification")
    with pytest.raises(FormwrightError, match="classifies texts"):
        fit(model_of(), images, SETTINGS, methods=[Protoformer()])
    with pytest.raises(FormwrightError, match="as many outputs"):
        last_layer(torch.nn.LayerNorm(4))
    decoder = hf.GPT2ForSequenceClassification(
        hf.GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, num_labels=2)
    )
    with pytest.raises(FormwrightError, match="reads every token"):
        fit(decoder, corpus(), SETTINGS, methods=[Protoformer()])


# References


@pytest.mark.reference
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rows", [3, 6, 7, 31, 64])
def test_selection_is_that_of_plain_loops_over_sklearn_s_cosines(rows, dense):
    import numpy as np

    metrics = pytest.importorskip("sklearn.metrics.pairwise")
    e, _ = blobs(rows, 1, spread=1.0, seed=rows)
    s = metrics.cosine_similarity(e.double().numpy())
    pairs = sorted(s[i, j] for i in range(rows) for j in range(rows) if i != j)
    base = pairs[max(1, math.ceil(0.2 * len(pairs))) - 1]
    facts = []
    for i in range(rows):
        others = [s[i, j] for j in range(rows) if j != i]
        rho = sum(int(np.sign(round(one - base, 12))) for one in others)
        facts.append((-rho if dense else rho, -float(np.mean(others)), i))
    order = [i for *_, i in sorted(facts)]
    kept = [order[0]] if dense else []
    begin, size = 0, 2
    while begin + size <= rows - 1:
        best = order[begin]
        for i in order[begin : begin + size]:
            if kept and s[i, kept].mean() < s[best, kept].mean() - 1e-12:
                best = i
        kept.append(best)
        begin, size = begin + size, size * 2
    assert choose(similarity(e.double()), 0.2)[0 if dense else 1] == kept[1 if dense else 0 :]
