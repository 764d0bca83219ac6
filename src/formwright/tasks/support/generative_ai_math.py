"""SWE: sub-words that raise the likelihood of the training text, and the likeliest way to write a word in them.

Paper    Li: The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI (2024),
         arXiv:2410.18441, whose abstract proposes an optimal sub-word encoding: in the setting of BPE, with the
         objective of WordPiece, the likelihood of the text.
Idea     With n_s the count of sub-word s and T their sum, tokens drawn one by one explain the text as well as

             L = sum_s n_s log n_s - T log T

         From single characters up, the two neighbours a, b are joined whose joining raises L most, exactly:

             n_a -= n_ab, n_b -= n_ab (a = b: n_a -= 2 n_ab), n_(ab) = n_ab, T -= n_ab

         Then every word is written anew in its likeliest way, max sum log p(s) (Viterbi), and p counted anew, a few
         times: hard expectation-maximisation, in which L never falls. Sub-words that no word uses any more go,
         single characters stay.
Differs  The score and the rounds are our choice: the paper's equations could not be read. Characters are bytes, so
         that every text can be written. The end of a word is the one white space after it, which belongs to the word:
         decoding gives the text back. "Optimal" is true of the writing of a word given p; joining is greedy. A piece
         that was there before, from another pair, is counted on.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy

from formwright.errors import FormwrightError

BYTES = 256
WORD = r"\p{L}+\s?|\p{N}+\s?|[^\s\p{L}\p{N}]+\s?|\s"
Word = tuple[str, ...]


def x_log_x(x: Any) -> Any:
    """x log x, 0 at 0."""
    x = numpy.asarray(x, dtype=numpy.float64)
    return numpy.where(x > 0, x * numpy.log(numpy.maximum(x, 1.0)), 0.0)


def likelihood(counts: Mapping[str, int]) -> float:
    """L of sub-word counts."""
    numbers = numpy.array(list(counts.values()), dtype=numpy.float64)
    return float(x_log_x(numbers).sum() - x_log_x(numbers.sum()))


def gain(both: Any, first: Any, second: Any, joined: Any, same: Any, total: int) -> Any:
    """By how much joining pairs raises L.

    Args:
        both: n_ab; first, second, joined: n_a, n_b and what (ab) counts already; same: whether a is b.
        total: T.
    """
    apart = x_log_x(first - both) + x_log_x(second - both) - x_log_x(first) - x_log_x(second)
    apart = numpy.where(same, x_log_x(first - 2 * both) - x_log_x(first), apart)
    return apart + x_log_x(joined + both) - x_log_x(joined) - x_log_x(total - both) + x_log_x(total)


def pairs(word: Word) -> Counter[tuple[str, str]]:
    """Neighbours and how often they can be joined in one word: of aaa the pair aa once."""
    found: Counter[tuple[str, str]] = Counter()
    used = -1  # the last place that a pair of two equal ones has taken
    for i, (a, b) in enumerate(pairwise(word)):
        if a == b and used == i:
            continue
        found[a, b] += 1
        used = i + 1 if a == b else -1
    return found


def join(word: Word, pair: tuple[str, str]) -> Word:
    """The word with that pair joined, from the left."""
    joined: list[str] = []
    i = 0
    while i < len(word):
        if word[i : i + 2] == pair:
            joined.append(word[i] + word[i + 1])
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return tuple(joined)


class _Pairs:
    """All neighbours of all words, their counts in arrays that grow."""

    def __init__(self, words: Sequence[Word], counts: Sequence[int]) -> None:
        self.words, self.counts = list(words), counts
        self.single: Counter[str] = Counter()
        self.names: list[tuple[str, str]] = []
        self.slots: dict[tuple[str, str], int] = {}
        self.where: dict[tuple[str, str], set[int]] = defaultdict(set)
        self.tokens: dict[str, int] = {}
        self.both = numpy.zeros(1024, dtype=numpy.int64)
        self.ends = numpy.zeros((3, 1024), dtype=numpy.int64)
        for number in range(len(words)):
            self.count(number, 1)

    def count(self, number: int, sign: int) -> None:
        """A word's pieces and pairs, added or taken away."""
        word, times = self.words[number], sign * self.counts[number]
        for piece in word:
            self.single[piece] += times
        for pair, often in pairs(word).items():
            slot = self._slot(pair)  # first: it may make the arrays anew
            self.both[slot] += times * often
            (self.where[pair].add if sign > 0 else self.where[pair].discard)(number)

    def _slot(self, pair: tuple[str, str]) -> int:
        if pair not in self.slots:
            slot = self.slots[pair] = len(self.names)
            self.names.append(pair)
            if slot == len(self.both):
                self.both = numpy.concatenate((self.both, numpy.zeros_like(self.both)))
                self.ends = numpy.concatenate((self.ends, numpy.zeros_like(self.ends)), 1)
            self.ends[:, slot] = [self.tokens.setdefault(piece, len(self.tokens)) for piece in (*pair, "".join(pair))]
        return self.slots[pair]

    def best(self) -> tuple[str, str] | None:
        """The pair whose joining raises L most; of equals the first by the alphabet; none when none raises it."""
        used = len(self.names)
        live = self.both[:used].nonzero()[0]
        if not len(live):
            return None
        known = numpy.zeros(len(self.tokens), dtype=numpy.int64)
        for piece, place in self.tokens.items():
            known[place] = self.single[piece]
        first, second, joined = self.ends[:, live]
        counts = (known[first], known[second], known[joined])
        gains = gain(self.both[live], *counts, first == second, self.single.total())
        top = gains.max()
        return None if top <= 0 else min(self.names[i] for i in live[gains == top])

    def join(self, pair: tuple[str, str]) -> None:
        for number in sorted(self.where[pair]):
            self.count(number, -1)
            self.words[number] = join(self.words[number], pair)
            self.count(number, 1)


@dataclass(frozen=True, kw_only=True)
class SubWords:
    """What was learnt.

    Attributes:
        scores: log p of every sub-word; of a character that was never used, as if it had been met half a time.
        history: L after joining, then after every round of writing and counting anew.
    """

    scores: Mapping[str, float]
    history: tuple[float, ...]

    def encode(self, word: str) -> Word:
        """The likeliest way to write a word of known characters."""
        return viterbi(word, self.scores)


def viterbi(word: str, scores: Mapping[str, float]) -> Word:
    """max sum log p(s) over all ways to cut a word; of equals that with the longest last piece.

    Raises:
        FormwrightError: a character is in no sub-word.
    """
    longest = max(map(len, scores), default=0)
    best, came = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
    for end in range(1, len(word) + 1):
        for start in range(max(0, end - longest), end):
            score = scores.get(word[start:end])
            if score is not None and best[start] + score > best[end]:
                best[end], came[end] = best[start] + score, start
    if best[-1] == -math.inf:
        raise FormwrightError(f"{word!r} holds a character that the sub-words were not learnt with.")
    pieces, end = [], len(word)
    while end:
        pieces.append(word[came[end] : end])
        end = came[end]
    return tuple(reversed(pieces))


def learn(words: Mapping[str, int], vocab: int, *, characters: Iterable[str] = (), rounds: int = 3) -> SubWords:
    """Sub-words of words and their counts.

    Args:
        vocab: how many at most; joining stops earlier when nothing raises the likelihood.
        characters: in the vocabulary whether or not a word has them.
        rounds: of writing the words anew and counting.

    Raises:
        FormwrightError: no words, or a vocabulary without room for the characters.
    """
    alphabet = sorted({*characters, *(character for word in words for character in word)})
    if not words or vocab < len(alphabet) or rounds < 0:
        raise FormwrightError(
            f"Sub-words are learnt from at least one word, with room for its characters and rounds from 0; got "
            f"{len(words)} words, vocab={vocab} for {len(alphabet)} characters and rounds={rounds}."
        )
    spelled = sorted(words)
    state = _Pairs([tuple(word) for word in spelled], [words[word] for word in spelled])
    pieces = set(alphabet)
    while len(pieces) < vocab and (pair := state.best()) is not None:
        state.join(pair)
        pieces.add("".join(pair))
    counts = Counter({piece: count for piece, count in state.single.items() if count})
    history = [likelihood(counts)]
    for _ in range(rounds):
        scores = _logarithms(counts)
        counts = Counter()
        for word in spelled:
            for piece in viterbi(word, scores):
                counts[piece] += words[word]
        history.append(likelihood(counts))
    unused = math.log(0.5 / counts.total())
    return SubWords(scores=dict.fromkeys(alphabet, unused) | _logarithms(counts), history=tuple(history))


def _logarithms(counts: Counter[str]) -> dict[str, float]:
    total = math.log(counts.total())
    return {piece: math.log(count) - total for piece, count in sorted(counts.items())}


def cutter() -> Any:
    """Words with the white space that ends them, as byte symbols."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sub_words(texts: Iterable[str], vocab: int, special: tuple[str, ...] = (), *, rounds: int = 3) -> Any:
    """A `tokenizers.Tokenizer` learnt on texts: it can write every text and needs no unknown token.

    Raises:
        FormwrightError: no text, or no room for the 256 bytes and the special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    cut, counts = cutter(), Counter()
    for text in texts:
        counts.update(word for word, _ in cut.pre_tokenize_str(text))
    learnt = learn(counts, vocab - len(special), characters=pre_tokenizers.ByteLevel.alphabet(), rounds=rounds)
    ranked = heapq.nlargest(len(learnt.scores), learnt.scores.items(), key=lambda item: (item[1], item[0]))
    # Special tokens come first, as in byte_pairs; no text can hold them by chance of a score.
    tokenizer = Tokenizer(models.Unigram([*((token, -1e9) for token in special), *ranked]))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def fast_tokenizer(*, texts: list[str], vocab: int = 4096, rounds: int = 3) -> Any:
    """A transformers `PreTrainedTokenizerFast` learnt on texts, with [PAD], [BOS] and [EOS]; save it with
    `save_pretrained`, load it with `AutoTokenizer.from_pretrained`.
    """
    from transformers import PreTrainedTokenizerFast

    made = sub_words(texts, vocab, ("[PAD]", "[BOS]", "[EOS]"), rounds=rounds)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        clean_up_tokenization_spaces=False,
    )
