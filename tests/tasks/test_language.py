"""Language modelling: every symbol scored once, an alphabet that fits, n-grams by counting, texts that cannot be."""

import math
from collections import Counter

import pytest
import torch

from formwright import tasks
from formwright.errors import FormwrightError
from formwright.tasks.support.language import ngrams, tiled


@pytest.mark.parametrize("symbols", [2, 7, 8, 13, 63, 64])
@pytest.mark.parametrize("length", [2, 3, 7])
def test_every_symbol_but_the_first_is_scored_exactly_once(symbols, length):
    if symbols < length:
        return
    windows = tiled(torch.arange(symbols), length)
    labels = windows.__getitems__(list(range(len(windows))))["labels"][:, 1:]
    assert labels[labels != -100].tolist() == list(range(1, symbols))


def test_one_window_alone_is_as_in_a_batch():
    windows = tiled(torch.arange(20), 7)
    together = windows.__getitems__(list(range(len(windows))))
    for i in range(len(windows)):
        assert torch.equal(windows[i]["labels"], together["labels"][i])
        assert torch.equal(windows[i]["input_ids"], together["input_ids"][i])


@pytest.fixture
def verse(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text("Grüß Gott, schöne Müllerin! " * 40, encoding="utf-8")
    return path


@pytest.mark.parametrize("unit", ["bytes", "characters"])
def test_the_test_text_is_the_last_tenth_and_read_once(verse, unit):
    content = verse.read_bytes() if unit == "bytes" else verse.read_text(encoding="utf-8")
    task = tasks.load(f"char-lm(file={verse},unit={unit},length=16)")
    known = sorted(set(content))
    assert task.model_config["vocab_size"] == len(known)
    labels = task.test.__getitems__(list(range(len(task.test))))["labels"][:, 1:]
    read = [known[i] for i in labels[labels != -100].tolist()]
    assert read == list(content[int(len(content) * 0.9) :])


def test_bits_a_byte_do_not_hang_on_the_unit(verse):
    """Both spread a text's bits over its bytes: nats a character / ln 2 / bytes a character."""
    task = tasks.load(f"char-lm(file={verse},unit=characters,length=16)")
    text = verse.read_text(encoding="utf-8")
    test = text[int(len(text) * 0.9) :]
    uniform = task.baselines()["uniform"]
    assert uniform["bits_per_byte"] == pytest.approx(math.log2(len(set(text))) * len(test) / len(test.encode()))


def test_ngrams_by_counting():
    random = torch.Generator().manual_seed(0)
    train, test = (torch.randint(5, (count,), generator=random) for count in (300, 80))
    found = ngrams(train, test, 6, 1.0)
    counts = Counter(train.tolist())
    single = {s: (counts[s] + 1) / (300 + 6) for s in range(6)}
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    loss = right = 0.0
    for a, b in zip(test[:-1].tolist(), test[1:].tolist(), strict=True):
        followers = {s: pairs[a, s] for s in range(6) if pairs[a, s]}
        total = sum(followers.values())
        loss -= math.log((pairs[a, b] + len(followers) * single[b]) / (total + len(followers)))
        right += pairs[a, b] == max(followers.values())
    assert found["bigram"]["loss"] == pytest.approx(loss / 79)
    assert found["unigram"]["loss"] == pytest.approx(-sum(math.log(single[s]) for s in test[1:].tolist()) / 79)
    assert found["bigram"]["accuracy"] <= right / 79
    assert found["uniform"]["bits_per_byte"] == pytest.approx(math.log2(6))


def test_bpe_is_learnt_on_the_training_text_alone(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcabcabc " * 200 + "zyxwzyxw " * 24)
    task = tasks.load(f"bpe-lm(file={path},vocab=300,length=4,test=0.1)")
    words = task.tokenizer.get_vocab()
    assert "abc" in words
    assert not any("zy" in word for word in words)
    assert task.tokenizer.decode(task.tokenizer.encode("Grüße, zyx!").ids) == "Grüße, zyx!"


def test_the_default_text_is_pythons_manual():
    task = tasks.load("char-lm")
    assert 300_000 < len(task.train) < 700_000
    assert task.name == "char-lm"
    bigram, unigram = task.baselines()["bigram"], task.baselines()["unigram"]
    assert bigram["bits_per_byte"] < unigram["bits_per_byte"] < 8


def test_validation_is_the_end_of_the_training_text(verse):
    plain = tasks.load(f"char-lm(file={verse},length=16)")
    task = tasks.load(f"char-lm(file={verse},length=16,validation=0.2)")
    assert len(task.train) < len(plain.train)
    first = task.validation[0]["input_ids"]
    assert torch.equal(first, plain.train.symbols[len(task.train) + 15 :][:16].long())


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (None, "", "There is no file"),
        (b"", "", "is empty"),
        (b"caf\xe9 " * 200, ",unit=characters", "is not UTF-8 .byte 3 is 0xe9.: convert it first"),
        (b"short", "", "training text of char-lm has 4 symbols, fewer than one window"),
        (b"x" * 900, ",test=1.5", "test is 1.5, but it is the share of the text"),
        (b"x" * 900, ",length=1", "length is 1"),
        (b"x" * 900, ",validation=-0.1", "validation is -0.1"),
    ],
)
def test_texts_that_cannot_be_are_sentences(tmp_path, content, options, says):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormwrightError, match=says):
        tasks.load(f"char-lm(file={path}{options})")


def test_a_vocabulary_below_the_bytes_is_a_sentence(verse):
    with pytest.raises(FormwrightError, match="the 256 bytes are tokens already"):
        tasks.load(f"bpe-lm(file={verse},vocab=100)")
