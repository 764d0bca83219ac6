"""Pre-training objectives: what is changed and asked, the count table, and encoders of all kinds trained in place."""

import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from formwright.build import build
from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForSequenceClassification,
    TransformerModel,
)
from formwright.tasks.base import ACCURACY, LOSS, Columns, Defaults, Task
from formwright.tasks.support.texts import Texts, padded
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.rts_objectives import (
    CRTS,
    IGNORED,
    MLM,
    RTS,
    SLM,
    Electra,
    Pretrain,
    Pretraining,
    TokenHead,
    Vocabulary,
    clusters_of,
    detection,
    k_means,
    measure,
    narrowed,
    pretrain,
    vocabulary_of,
)

PAD, UNKNOWN, MASK = 0, 1, 2
VOCABULARY = Vocabulary(size=60, special=frozenset({PAD, UNKNOWN, MASK}), mask=MASK)
NAMES = ("mlm", "slm", "rts", "c-rts(clusters=5)", "electra(width=0.5)")


def studied(objective, vocabulary=VOCABULARY):
    random = torch.Generator().manual_seed(0)
    objective.study([torch.randint(3, vocabulary.size, (40,), generator=random) for _ in range(20)], vocabulary)
    return objective


def text(rows=400, width=50):
    """Ids with padding on the right and unknown tokens here and there, and what may be chosen."""
    ids = torch.randint(3, 60, (rows, width))
    ids[:, 5], ids[:, 40:] = UNKNOWN, PAD
    mask = (ids != PAD).long()
    return ids, mask, VOCABULARY.among(ids, mask)


def near(count, of, share):
    """Within five standard deviations of a binomial."""
    return abs(count - share * of) < 5 * math.sqrt(of * share * (1 - share))


# How texts are changed


@pytest.mark.parametrize("make", [MLM, SLM, RTS, CRTS, Electra])
def test_special_tokens_and_padding_are_never_touched_nor_asked_about(make):
    torch.manual_seed(0)
    objective = studied(make(share=0.9) if make is not CRTS else CRTS(share=0.9, clusters=6))
    ids, _, among = text()
    changed = objective.change(ids, among)
    assert torch.equal(changed.ids[~among], ids[~among])
    assert bool((changed.labels[~among] == IGNORED).all())
    assert not torch.isin(changed.ids[among], torch.tensor(sorted(VOCABULARY.special))).any()
    if changed.hidden is not None:
        assert not (changed.hidden & ~among).any()


@pytest.mark.parametrize(("name", "labelled"), [("mlm", "chosen"), ("mlm(all_tokens=true)", "all"), ("slm", "chosen")])
def test_language_modelling_asks_which_token_it_was(name, labelled):
    torch.manual_seed(0)
    ids, _, among = text()
    changed = studied(build("objective", name)).change(ids, among)
    asked = changed.labels != IGNORED
    assert torch.equal(changed.labels[asked], ids[asked])
    assert near(int(asked.sum()), int(among.sum()), 0.15) if labelled == "chosen" else torch.equal(asked, among)


def test_of_what_mlm_chooses_eight_tenths_are_hidden_one_exchanged_one_left():
    torch.manual_seed(0)
    ids, _, among = text()
    changed = studied(MLM(share=0.5)).change(ids, among)
    chosen = changed.labels != IGNORED
    count = int(chosen.sum())
    assert near(count, int(among.sum()), 0.5)
    assert near(int(changed.hidden.sum()), count, 0.8)
    other = (changed.ids != ids) & ~changed.hidden
    assert near(int(other.sum()), count, 0.1 * 56 / 57)  # one draw in 57 is the token itself
    assert not (other & ~chosen).any()


@pytest.mark.parametrize("objective", [SLM(share=0.3), RTS(share=0.3), CRTS(share=0.3, clusters=6)])
def test_what_exchanges_tokens_knows_no_mask_and_changes_its_share(objective):
    torch.manual_seed(0)
    ids, _, among = text()
    changed = studied(objective).change(ids, among)
    assert changed.hidden is None
    assert not (changed.ids == MASK).any()
    assert near(int((changed.ids != ids).sum()), int(among.sum()), 0.3 * 56 / 57) or isinstance(objective, CRTS)


def test_detection_is_asked_everywhere_and_its_label_is_whether_the_token_is_another():
    torch.manual_seed(0)
    ids, _, among = text()
    changed = studied(RTS()).change(ids, among)
    assert torch.equal(changed.labels != IGNORED, among)
    assert torch.equal(changed.labels == 1, changed.ids != ids)
    same = detection(ids, ids, among)  # every chosen token drew itself
    assert bool((same.labels[among] == 0).all())


def test_random_tokens_are_ordinary_and_all_alike():
    torch.manual_seed(0)
    drawn = studied(RTS()).random(torch.zeros(570, 100, dtype=torch.long))
    counts = torch.bincount(drawn.flatten(), minlength=60)
    assert counts[:3].tolist() == [0, 0, 0]
    assert bool(((counts[3:] - 1000).abs() < 5 * 32).all())


# The count table


def table(counts, beta=2.0, sizes=(3, 4, 5)):
    objective = CRTS(clusters=len(sizes), beta=beta, share=0.5)
    vocabulary = Vocabulary(size=1 + sum(sizes), special=frozenset({0}))
    own = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    objective.register_buffer("ordinary", vocabulary.ordinary(), persistent=False)
    objective.assign(torch.cat([torch.zeros(1, dtype=torch.long), own]), vocabulary)
    objective.counts.copy_(torch.tensor(counts))
    return objective, vocabulary


def test_rows_of_the_table_are_probabilities_after_minmax():
    objective, _ = table([[1, 1, 1], [-7, 3, -2], [0, 0, 9]])
    rows = objective.probabilities()
    torch.testing.assert_close(rows.sum(1), torch.ones(3))
    torch.testing.assert_close(rows[0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(rows[1], (2 * torch.tensor([0.0, 1.0, 0.5])).softmax(0))
    torch.testing.assert_close(rows[2], (2 * torch.tensor([0.0, 0.0, 1.0])).softmax(0))


def test_beta_goes_from_all_alike_to_the_pair_that_deceives_most():
    counts = [[1, 2, 3], [-7, 3, -2], [0, 0, 9]]
    torch.testing.assert_close(table(counts, beta=0.0)[0].probabilities(), torch.full((3, 3), 1 / 3))
    assert table(counts, beta=1e4)[0].probabilities().argmax(1).tolist() == [2, 1, 2]
    torch.testing.assert_close(table(counts, beta=1e4)[0].probabilities().amax(1), torch.ones(3))


def test_tokens_of_a_drawn_cluster_are_drawn_alike():
    torch.manual_seed(0)
    objective, vocabulary = table([[0, 9, 0]] * 3, beta=1e4)
    ids = torch.randint(1, 13, (200, 60))
    seen = objective.change(ids, vocabulary.among(ids, None)).ids
    at = seen != ids
    counts = torch.bincount(seen[at], minlength=13)
    assert counts[[0, 1, 2, 3, 8, 9, 10, 11, 12]].sum() == 0  # cluster 1 alone: tokens 4 to 7
    assert bool(((counts[4:8] - counts[4:8].float().mean()).abs() < 300).all())


def test_the_table_counts_every_pair_of_the_paper_s_example():
    """The authors' example: right answers lower a pair's count, wrong ones raise it; unchanged tokens do not count."""
    objective = CRTS(clusters=2)
    vocabulary = Vocabulary(size=80)
    objective.study([torch.arange(80)] * 3, vocabulary)
    objective.assign(torch.arange(80), vocabulary)  # every token a cluster
    ids, seen = torch.tensor([2, 3, 56, 1, 2, 23]), torch.tensor([2, 33, 76, 1, 2, 28])
    predictions, labels = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 0, 0])
    objective.learn(ids, seen, predictions == labels)
    moved = objective.counts - 1
    assert (moved[3, 33], moved[56, 76], moved[23, 28]) == (-1, 1, -1)
    assert moved.abs().sum() == 3
    objective.learn(torch.tensor([3, 3]), torch.tensor([33, 33]), torch.tensor([False, False]))
    assert objective.counts[3, 33] == 2  # both count


def test_clusters_gather_tokens_used_alike_and_none_is_empty():
    random = torch.Generator().manual_seed(0)
    low = [torch.randint(1, 11, (50,), generator=random) for _ in range(60)]
    high = [torch.randint(11, 21, (50,), generator=random) for _ in range(60)]  # two languages
    cluster = clusters_of(low + high, Vocabulary(size=21, special=frozenset({0})), 2)
    assert len(set(cluster[1:11].tolist())) == len(set(cluster[11:21].tolist())) == 1
    assert cluster[1] != cluster[11]
    many = k_means(torch.zeros(20, 3), 15)  # all vectors alike
    assert torch.bincount(many, minlength=15).min() == 1


def test_impossible_options_are_refused():
    for spec, says in [
        ("rts(share=0)", "share is 0"),
        ("c-rts(clusters=1)", "2 clusters"),
        ("electra(width=2)", "width"),
        ("rtss", "rts"),
    ]:
        with pytest.raises(FormwrightError, match=says):
            build("objective", spec)
    with pytest.raises(FormwrightError, match="clusters for 57 tokens"):
        studied(CRTS(clusters=58))
    with pytest.raises(FormwrightError, match="fewer than two"):
        Vocabulary(size=3, special=frozenset({0, 1}))


# Encoders


def corpus(rows=64, vocab=60, special=3):
    """Texts in which a token tells the next: the one behind it, most often."""
    random = torch.Generator().manual_seed(0)
    tokens = []
    for _ in range(rows):
        length = int(torch.randint(6, 14, (), generator=random))
        start = int(torch.randint(vocab - special, (), generator=random))
        tokens.append((start + torch.arange(length)) % (vocab - special) + special)
    labels = torch.tensor([int(text[0] > vocab // 2) for text in tokens])
    texts = Texts(tokens, labels, PAD)
    return Task(
        name="counting",
        head="sequence-classification",
        model_config={"num_labels": 2},
        train=texts,
        test=texts.select(torch.arange(30)),
        metrics=(ACCURACY, LOSS),
        collate=lambda rows: padded(rows, PAD),
        baselines=dict,
        defaults=Defaults(settings=Settings(), model={}),
    )


SIZE = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": PAD}
BERT = {**SIZE, "intermediate_size": 32, "max_position_embeddings": 32}
ENCODERS = {
    "ours": lambda: TransformerForSequenceClassification(TransformerConfig(**SIZE, position="rope", num_labels=2)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=PAD)
    ),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(**BERT, embedding_size=8)),
}
QUICK = Settings(steps=3, batch_size=16, learning_rate=1e-3)


ALL = [("ours", name) for name in NAMES] + [(kind, NAMES[i]) for kind in list(ENCODERS)[1:] for i in (0, 2, 4)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_objective_trains_every_encoder_in_place_and_leaves_no_head(kind, name):
    seeded(0)
    model = ENCODERS[kind]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = pretrain(model, corpus(), name, settings=QUICK)
    assert model.state_dict().keys() == before.keys()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    own = {f"{model.base_model_prefix}.{key}" for key, _ in model.base_model.named_parameters()}
    assert {key for key in own if "pooler" not in key and "classifier" not in key} - moved <= {
        key for key in own if key.endswith("token_type_embeddings.weight") or "bias" in key
    }
    assert not {key for key in moved if key.startswith("classifier")}  # the task's head is not pre-training's
    assert len(found.history.extras["accuracy"]) == 3
    metrics = measure(found.trained, corpus())
    assert all(math.isfinite(value) for value in metrics.values())
    assert ("f1" in metrics) == found.trained.objective.detects
    fit(model, corpus(), QUICK)  # goes on as a classifier


@pytest.mark.parametrize("name", ["mlm", "rts"])
def test_an_objective_is_learnt(name):
    """Each token follows from its neighbours: what is asked can be told far better than by chance."""
    seeded(0)
    config = TransformerConfig(**{**SIZE, "hidden_size": 32, "num_hidden_layers": 2}, position="rope")
    model = TransformerModel(config)
    settings = Settings(steps=100, batch_size=32, learning_rate=1e-2)
    found = pretrain(model, corpus(256), name, settings=settings)
    metrics = measure(found.trained, corpus(256))
    assert metrics["f1"] > 0.5 if found.trained.objective.detects else metrics["accuracy"] > 3 / 57


def test_what_is_measured_hangs_on_the_seed_alone_and_counts_as_sklearn_does():
    seeded(0)
    found = pretrain(
        ENCODERS["ours"](), corpus(), "rts(share=0.4)", settings=replace(QUICK, steps=40, learning_rate=1e-2)
    )
    torch.manual_seed(1)
    first = measure(found.trained, corpus(), seed=5)
    torch.manual_seed(2)
    again = measure(found.trained, corpus(), seed=5)
    assert first == again != measure(found.trained, corpus(), seed=6)
    scores = pytest.importorskip("sklearn.metrics")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        task = corpus()
        answers = found.trained.eval().answers(task.collate([task.test[i] for i in range(30)]))
    truth, guess = answers.labels.numpy(), answers.logits.argmax(-1).numpy()
    assert first["f1"] == pytest.approx(scores.f1_score(truth, guess))
    assert first["accuracy"] == pytest.approx(scores.accuracy_score(truth, guess))


def body_of(objective, encoder="ours", vocabulary=None):
    model = ENCODERS[encoder]()
    vocabulary = vocabulary or vocabulary_of(model)
    objective.study(corpus().train.tokens, vocabulary)
    return Pretraining(model, objective, vocabulary)


def test_the_generator_learns_from_its_own_loss_alone():
    seeded(0)
    body = body_of(Electra(width=0.5, share=0.5))
    batch = padded([corpus().train[i] for i in range(8)], PAD)
    found = body.answers(batch)
    F.cross_entropy(found.logits, found.labels).backward()
    assert all(weight.grad is None for weight in body.generator.parameters())
    assert body.encoder.embeddings.tokens.weight.grad is not None
    body.zero_grad(set_to_none=True)
    body.answers(batch).generator.backward()
    assert all(weight.grad is not None for weight in body.generator.parameters())
    assert body.encoder.embeddings.tokens.weight.grad is not None  # one table for both
    assert all(weight.grad is None for weight in body.encoder.encoder.parameters())


def test_electra_s_loss_is_both_and_a_perfect_generator_changes_nothing():
    seeded(0)
    body = body_of(Electra(width=0.5, weight=50.0))
    batch = padded([corpus().train[i] for i in range(8)], PAD)
    torch.manual_seed(3)
    output = body(**batch)
    torch.manual_seed(3)
    found = body.answers(batch)
    expected = found.generator + 50 * F.cross_entropy(found.logits, found.labels)
    torch.testing.assert_close(output.loss, expected)
    ids = batch["input_ids"]
    body.drawn = lambda _: ids[chosen]
    torch.manual_seed(3)
    chosen = body.objective.choose(body.vocabulary.among(ids, batch["attention_mask"]))
    torch.manual_seed(3)
    assert not body.answers(batch).labels.any()


def test_the_generator_draws_by_its_probabilities_and_no_special_token():
    torch.manual_seed(0)
    body = body_of(Electra(width=0.5), vocabulary=VOCABULARY)
    logits = torch.randn(60)
    drawn = torch.bincount(body.drawn(logits.expand(20000, -1)), minlength=60) / 20000
    assert drawn[:3].sum() == 0
    expected = logits[3:].softmax(0)
    assert bool(((drawn[3:] - expected).abs() < 5 * (expected / 20000).sqrt()).all())


@pytest.mark.parametrize("kind", list(ENCODERS))
def test_the_generator_has_the_share_of_the_width_and_no_table_of_its_own(kind):
    encoder = ENCODERS[kind]().base_model
    small = narrowed(encoder, 0.5)
    assert small.config.hidden_size == 8
    assert small.config.num_hidden_layers == encoder.config.num_hidden_layers
    assert not any(weight.shape[0] == 60 for weight in small.parameters())


@pytest.mark.parametrize(("objective", "hidden"), [(MLM(share=0.9), True), (SLM(share=0.9), False)])
def test_a_vocabulary_without_a_mask_gets_a_vector_for_it(objective, hidden):
    body = body_of(objective)
    assert (body.mask is not None) == hidden
    if hidden:
        batch = padded([corpus().train[i] for i in range(4)], PAD)
        body(**batch).loss.backward()
        assert body.mask.grad.abs().sum() > 0
    assert body_of(type(objective)(), "bert", VOCABULARY).mask is None


def test_padding_changes_no_answer():
    """A text alone and the same beside a longer one are read alike."""
    seeded(0)
    body = body_of(RTS()).eval()
    task = corpus()
    short = min(range(20), key=lambda i: len(task.train.tokens[i]))
    body.objective.change = lambda ids, among: detection(ids, ids, among)
    alone = body.answers(padded([task.train[short]], PAD)).logits
    beside = body.answers(padded([task.train[short], task.train[19]], PAD)).logits
    torch.testing.assert_close(beside[: len(alone)], alone)


def test_two_answers_cost_a_vocabulary_s_share():
    states, table = torch.randn(7, 16), torch.randn(60, 16)
    head = TokenHead(16, 16, 60)
    costs = []
    for run in (lambda: F.linear(head.norm(states), table, head.bias), lambda: torch.nn.Linear(16, 2)(states)):
        with FlopCounterMode(display=False) as counter:
            run()
        costs.append(counter.get_total_flops())
    assert costs[1] / costs[0] == 2 / 60


def test_batches_cut_in_parts_are_weighed_by_their_tokens():
    settings = replace(QUICK, accumulate=4, steps=2)
    assert all(
        math.isfinite(loss) for loss in pretrain(ENCODERS["ours"](), corpus(), "rts", settings=settings).history.losses
    )


# As a method of training


def test_as_a_method_it_comes_before_the_task():
    seeded(0)
    plain, first = ENCODERS["ours"](), ENCODERS["ours"]()
    first.load_state_dict(plain.state_dict())
    settings = replace(QUICK, steps=1, learning_rate=1e-9)
    method = Pretrain(objective="rts", steps=5, learning_rate=1e-2, batch_size=32)
    history = fit(first, corpus(), settings, methods=[method])
    assert len(history.losses) == 1
    assert len(method.pretrained.history.losses) == 5
    assert not torch.allclose(first.model.embeddings.tokens.weight, plain.model.embeddings.tokens.weight, atol=1e-4)
    torch.testing.assert_close(first.classifier.weight, plain.classifier.weight, atol=1e-6, rtol=0)
    by_name = replace(settings, methods="pretrain(objective=c-rts(clusters=5), steps=2)")
    fit(first, corpus(), by_name)
    assert 0 <= evaluate(first, corpus()).metrics["accuracy"] <= 1


def test_texts_without_labels_come_first():
    """`unlabelled` is read in place of the training rows."""
    task = corpus()
    other = Texts([torch.full((8,), 59)] * 20, torch.zeros(20, dtype=torch.long), PAD)
    seeded(0)
    model = ENCODERS["bert"]()
    found = pretrain(
        model, replace(task, unlabelled=other), "mlm(share=0.9)", settings=replace(QUICK, steps=30, learning_rate=1e-2)
    )
    assert measure(found.trained, replace(task, test=other))["accuracy"] > 0.99  # every token is 59


def test_what_cannot_be_pretrained_is_refused():
    decoder = TransformerForCausalLM(TransformerConfig(**SIZE, architecture="decoder"))
    for model in (decoder, hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))):
        with pytest.raises(FormwrightError, match="no encoder of texts"):
            pretrain(model, corpus(), settings=QUICK)
    images = replace(
        corpus(), train=Columns(pixel_values=torch.zeros(20, 1, 2, 2), labels=torch.zeros(20).long()), collate=dict
    )
    with pytest.raises(FormwrightError, match="holds no texts"):
        pretrain(ENCODERS["bert"](), images, settings=QUICK)
    with pytest.raises(FormwrightError, match="evaluate_every"):
        pretrain(ENCODERS["bert"](), corpus(), settings=replace(QUICK, evaluate_every=1))


def test_what_is_special_is_read_from_either_kind_of_tokenizer():
    from formwright.tasks.support.words import words

    made = words(["a b c d e f"] * 3, 300)
    model = ENCODERS["bert"]()
    ours = vocabulary_of(model, made)
    assert (ours.size, ours.special, ours.mask) == (8, {0, 1}, None)
    theirs = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    found = vocabulary_of(model, theirs)
    assert (found.size, found.special, found.mask) == (9, {0, 1, 8}, 8)
    assert vocabulary_of(model).special == {PAD}


# References


@pytest.mark.reference
def test_mlm_is_bert_s():
    """The same corrupted batch through BertForMaskedLM with the same weights gives the same loss and gradient."""
    seeded(0)
    theirs = hf.BertForMaskedLM(hf.BertConfig(**BERT)).eval()
    body = Pretraining(theirs, studied(MLM(share=0.5)), VOCABULARY).eval()
    predictions = theirs.cls.predictions
    body.head.dense.load_state_dict(predictions.transform.dense.state_dict())
    body.head.norm.load_state_dict(predictions.transform.LayerNorm.state_dict())
    ids = torch.randint(3, 60, (6, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(1)
    ours = body(**batch).loss
    torch.manual_seed(1)
    changed = body.objective.change(ids, VOCABULARY.among(ids, None))
    expected = theirs(input_ids=changed.ids.masked_fill(changed.hidden, MASK), labels=changed.labels).loss
    torch.testing.assert_close(ours, expected)
    table = theirs.get_input_embeddings().weight
    torch.testing.assert_close(
        torch.autograd.grad(ours, table)[0], torch.autograd.grad(expected, table)[0], atol=1e-6, rtol=1e-4
    )


@pytest.mark.reference
def test_mlm_changes_as_often_as_transformers_collator():
    torch.manual_seed(0)
    made = hf.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="p", unk_token="u", mask_token="m")
    theirs = hf.DataCollatorForLanguageModeling(made, mlm_probability=0.15)
    ids = torch.randint(3, 60, (600, 50))
    batch = theirs([{"input_ids": row.tolist()} for row in ids])
    changed = studied(MLM()).change(ids, VOCABULARY.among(ids, None))

    def shares(read, labels):
        chosen = labels != IGNORED
        return torch.tensor([chosen.sum() / ids.numel(), (read[chosen] == MASK).sum() / chosen.sum()]), (
            (read != ids) & (read != MASK)
        ).sum() / chosen.sum()

    ours, random = shares(changed.ids.masked_fill(changed.hidden, MASK), changed.labels)
    expected, expected_random = shares(batch["input_ids"], batch["labels"])
    torch.testing.assert_close(ours, expected, atol=0.02, rtol=0)
    torch.testing.assert_close(random, expected_random, atol=0.02, rtol=0)


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"p": 0, "u": 1, "m": 2} | {f"w{i}": i for i in range(3, 60)}, unk_token="u"))
