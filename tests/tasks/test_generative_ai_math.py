"""SWE: exact properties, brute force, and the tokenizer's way into transformers."""

import itertools
import json
import math
import random
from collections import Counter

import pytest
from transformers import AutoTokenizer

from formwright.errors import FormwrightError
from formwright.tasks.support.generative_ai_math import (
    fast_tokenizer,
    gain,
    join,
    learn,
    likelihood,
    pairs,
    sub_words,
    viterbi,
)
from formwright.tasks.support.language import read_symbols

WORDS = {"aaaa_": 5, "abab_": 3, "banana_": 4, "bandana_": 2, "cab_": 7, "aa_": 1, "nab_": 2}


def text(characters=12_000):
    return read_symbols(None).decode()[:characters]


def counted(words):
    counts = Counter()
    for word, times in words:
        for piece in word:
            counts[piece] += times
    return counts


def test_the_gain_is_what_counting_anew_finds():
    words = [(tuple(word), times) for word, times in WORDS.items()]
    for _ in range(4):
        counts, found = counted(words), Counter()
        for word, times in words:
            for pair, often in pairs(word).items():
                found[pair] += often * times
        gains = {}
        for (a, b), n in found.items():
            gains[a, b] = float(gain(n, counts[a], counts[b], counts[a + b], a == b, counts.total()))
            after = counted([(join(word, (a, b)), times) for word, times in words])
            assert gains[a, b] == pytest.approx(likelihood(after) - likelihood(counts), abs=1e-9)
        best = min(pair for pair in gains if gains[pair] == max(gains.values()))
        words = [(join(word, best), times) for word, times in words]


@pytest.mark.parametrize(("word", "often"), [("aa", 1), ("aaa", 1), ("aaaa", 2), ("aaaaa", 2), ("baaab", 1)])
def test_overlapping_pairs_are_counted_as_often_as_they_can_be_joined(word, often):
    assert pairs(tuple(word))["a", "a"] == often
    assert len(join(tuple(word), ("a", "a"))) == len(word) - often


def test_the_best_pair_is_joined_first_and_of_equals_the_first_by_the_alphabet():
    assert set(learn({"xyz_": 3, "xyq_": 3}, 6, rounds=0).scores) >= {"xy"}
    equal = learn({"ab": 1, "cd": 1, "ef": 1}, 7, rounds=0).scores
    assert [piece for piece in equal if len(piece) > 1] == ["ab"]


def test_likelihood_never_falls_from_round_to_round():
    words = Counter(f"{word}_" for word in text().split())
    for vocab in (100, 200, 400):
        history = learn(words, vocab, rounds=5).history
        assert len(history) == 6
        assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(history))


@pytest.mark.reference
def test_viterbi_is_the_best_of_all_ways_to_cut():
    learnt = learn(Counter(f"{word}_" for word in text(4000).split()), 150)
    draw = random.Random(0)
    words = sorted({f"{word}_"[:8] for word in text(8000).split()})
    for word in draw.sample([word for word in words if set(word) <= set("".join(learnt.scores))], 40):
        best = -math.inf
        for cuts in itertools.product((False, True), repeat=len(word) - 1):
            places = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(word)]
            pieces = [word[a:b] for a, b in itertools.pairwise(places)]
            if all(piece in learnt.scores for piece in pieces):
                best = max(best, sum(learnt.scores[piece] for piece in pieces))
        found = learnt.encode(word)
        assert "".join(found) == word
        assert sum(learnt.scores[piece] for piece in found) == pytest.approx(best)


def test_single_characters_stay_and_the_rest_is_used():
    learnt = learn(WORDS, 20, characters="z")
    assert set("abcdnz_") <= set(learnt.scores)
    used = {piece for word in WORDS for piece in learnt.encode(word)}
    assert {piece for piece in learnt.scores if len(piece) > 1} <= used
    assert learnt.encode("zzz") == ("z", "z", "z")


def test_learning_is_deterministic():
    words = Counter(text(4000).split())
    backwards = dict(reversed(list(words.items())))
    assert learn(words, 150) == learn(backwards, 150)


@pytest.mark.parametrize(
    "said", ["", "Words, and  spaces\n\n\tand tabs.", "Zürich — 東京 \N{GRINNING FACE}", "x" * 50, " leading"]
)
def test_decoding_gives_the_text_back(said):
    tokenizer = sub_words([text()], 500)
    ids = tokenizer.encode(said).ids
    assert tokenizer.decode(ids) == said
    assert all(0 <= i < tokenizer.get_vocab_size() for i in ids)


@pytest.mark.reference
def test_tokenizers_writes_words_as_likely_as_our_viterbi():
    tokenizer = sub_words([text()], 500)
    scores = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text(3000)):
        theirs = tokenizer.model.tokenize(word)
        ours = viterbi(word, scores)
        assert sum(scores[t.value] for t in theirs) == pytest.approx(sum(scores[piece] for piece in ours))


def test_the_space_after_a_word_ends_it():
    words = [word for word, _ in sub_words([text()], 300).pre_tokenizer.pre_tokenize_str("the end of it")]
    assert words == ["theĠ", "endĠ", "ofĠ", "it"]


def test_a_fast_tokenizer_is_saved_and_loaded(tmp_path):
    made = fast_tokenizer(texts=[text()], vocab=400)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    said = ["The statement is executed.", "if x:"]
    assert loaded(said)["input_ids"] == made(said)["input_ids"]
    assert len(made) <= 400
    assert [made.pad_token_id, made.bos_token_id, made.eos_token_id] == [0, 1, 2]
    padded = loaded(said, padding=True)
    assert len({len(row) for row in padded["input_ids"]}) == 1
    assert loaded.batch_decode(padded["input_ids"], skip_special_tokens=True) == said


@pytest.mark.parametrize("wrong", [{"words": {}}, {"vocab": 3}, {"rounds": -1}])
def test_impossible_requests_are_refused(wrong):
    with pytest.raises(FormwrightError):
        learn(**({"words": WORDS, "vocab": 20} | wrong))
    with pytest.raises(FormwrightError, match="character"):
        viterbi("q", {"a": -1.0})
