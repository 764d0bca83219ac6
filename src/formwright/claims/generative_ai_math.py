"""Claims: sub-words by likelihood write text shorter; a cross-entropy search beats chance; a harmonic penalty helps
RoPE beyond its length; probabilistic blocks save time; a cache in stairs degrades gradually.

Paper  A position paper without figures: all five are the ideas of its abstract.
Here   Python's own manual. Sub-words: 2,048, bits a character of held-out tenths of the text, words written by each
       tokenizer and counted one by one, unknown ones spelled out. Search: rate and weight decay of a character model,
       30 trainings of 60 steps.
       Position: trained at 64 bytes, read at 512. Blocks: 4,096 tokens, b = 64. Cache: a model trained at 256 bytes,
       one key head, read 32 at a time.
Fair   Tokenizers share the cutting into words, the bytes and the size of the vocabulary. Chance draws as many settings
       from the search's first distributions, leaders are scored again alike. Positions: each at its best of three
       rates, on validation text. Blocks against the same fused attention in full. Caches share the model.
Rule   words     holds: in every seed fewer bits than BPE and WordPiece; in direction: on the mean
       search    holds: in every seed a loss no higher than chance's; in direction: on the mean
       position  holds: in every seed RoPE's loss at 512 is above the harmonic's and that above ALiBi's; in direction:
                 the harmonic's mean is below RoPE's
       blocks    holds: in every seed at least twice as fast as full attention at 4,096 tokens; in direction: faster
       cache     holds: in every seed at most 1.5 times the 2-bit cache's bytes and a loss nearer to the 4-bit cache's
                 than to the 2-bit's; in direction: a mean loss below the 2-bit's
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch.nn import functional as F

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.compress.quantize.generative_ai_math import staircase_cache
from formwright.contracts import Mask
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.attention.generative_ai_math import PrFlashAttention
from formwright.tasks.support.generative_ai_math import cutter, sub_words
from formwright.tasks.support.language import read_symbols
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.generative_ai_math import Logarithmic, cross_entropy_search, score_by_training

SEEDS = (0, 1, 2)
PAPER = {"abstract": "the idea alone, no figures"}


def run(scale: Scale, seed: int) -> Outcome:
    parts = [part(scale, seed) for part in (words, search, positions, blocks, cache)]
    measured, baseline = ({k: v for part in parts for k, v in part[i].items()} for i in (0, 1))
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


Numbers = tuple[dict[str, float], dict[str, float]]


def words(scale: Scale, seed: int) -> Numbers:
    """Bits a character of tenths of the text that no tokenizer has seen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = read_symbols(None).decode()[: 20_000 if scale == "smoke" else None]
    vocab = 600 if scale == "smoke" else 2048
    pieces = [text[i : i + 2000] for i in range(0, len(text), 2000)]
    random.Random(seed).shuffle(pieces)
    held, learnt = pieces[: len(pieces) // 10], pieces[len(pieces) // 10 :]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe, wordpiece = (
        Tokenizer(models.BPE()),
        Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=10**6)),
    )
    for made, trainer in (
        (bpe, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)),
        (
            wordpiece,
            trainers.WordPieceTrainer(
                vocab_size=vocab, initial_alphabet=alphabet, special_tokens=["[UNK]"], show_progress=False
            ),
        ),
    ):
        made.pre_tokenizer, made.decoder = cutter(), decoders.ByteLevel()
        made.train_from_iterator(learnt, trainer)

    def bits(tokenizer: Any) -> float:
        seen = Counter(i for text in learnt for i in tokenizer.encode(text).ids)
        total = seen.total() + tokenizer.get_vocab_size() / 2
        written = 0.0
        for text in held:
            one = tokenizer.encode(text)
            for i, piece, (start, end) in zip(one.ids, one.tokens, one.offsets, strict=True):
                unknown = piece == "[UNK]"  # spelled out, byte by byte
                written += 8 * len(text[start:end].encode()) if unknown else -math.log2((seen[i] + 0.5) / total)
        return written / sum(map(len, held))

    ours = bits(sub_words(learnt, vocab))
    return {"words: SWE": ours}, {"words: BPE": bits(bpe), "words: WordPiece": bits(wordpiece)}


def search(scale: Scale, seed: int) -> Numbers:
    """Validation loss, under fresh seeds, of what the search and as many draws by chance found."""
    task = tasks.load("char-lm(length=32, test=0.02, validation=0.02)")
    settings = Settings(steps=2 if scale == "smoke" else 60, batch_size=16, betas=(0.9, 0.95))
    score = score_by_training(
        model=lambda: TransformerForCausalLM(TransformerConfig(**task.model_config, hidden_size=32)),
        task=task,
        settings=settings,
    )
    space = {"learning_rate": Logarithmic(1e-4, 1.0), "weight_decay": Logarithmic(1e-3, 1.0)}
    samples, rounds = (2, 1) if scale == "smoke" else (10, 3)
    again = {"leaders": 1, "again": 1} if scale == "smoke" else {"leaders": 3, "again": 3}
    ours = cross_entropy_search(space=space, score=score, samples=samples, rounds=rounds, seed=seed, **again)
    chance = cross_entropy_search(
        space=space, score=score, samples=samples * rounds, rounds=1, seed=seed + 1000, **again
    )
    return {"search: cross-entropy": ours.score}, {"search: chance": chance.score}


def trained(task: Any, scale: Scale, seed: int, rate: float, **config: Any) -> TransformerForCausalLM:
    seeded(seed)
    sizes = dict(task.model_config) | {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 512}
    model = TransformerForCausalLM(TransformerConfig(**sizes | config))
    steps = 4 if scale == "smoke" else 400
    fit(
        model,
        task,
        Settings(steps=steps, batch_size=32, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed),
    )
    return model


def positions(scale: Scale, seed: int) -> Numbers:
    """Nats a byte read at 512, after training at 64."""
    held = 0.01 if scale == "smoke" else 0.05
    short, long = (tasks.load(f"char-lm(length={n}, test={held}, validation={held})") for n in (64, 512))
    found = {}
    for name in ("rope-alibi", "rope-alibi(steepness=300)", "rope", "alibi"):
        tried = []
        for rate in (8e-3,) if scale == "smoke" else (4e-3, 8e-3, 16e-3):
            model = trained(short, scale, seed, rate, position=name)
            tried.append((evaluate(model, short, "validation").metrics["loss"], rate, model))
        best = min(tried, key=lambda one: one[0])
        found[f"position: {name}"] = evaluate(best[2], long, "test", batch_size=32).metrics["loss"]
    ours = {name: value for name, value in found.items() if "rope-alibi" in name}
    return ours, {name: value for name, value in found.items() if name not in ours}


def blocks(scale: Scale, seed: int) -> Numbers:
    """How many times faster than full attention, and how many times fewer blocks."""
    ours, theirs = {}, {}
    for n in (256,) if scale == "smoke" else (1024, 2048, 4096):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 4, n, 32, generator=generator) for _ in range(3))
        part, mask = PrFlashAttention(layer=seed).eval(), Mask(queries=n, keys=n, causal=True)
        calls: tuple[Callable[[], Any], ...] = (
            lambda part=part, q=q, k=k, v=v, mask=mask: part(q, k, v, mask=mask),
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        )
        spent: list[list[float]] = [[], []]
        for _ in range(2 if scale == "smoke" else 15):
            for call, times in zip(calls, spent, strict=True):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
        size = n // 64
        ours[f"blocks: speed at {n}"] = median(spent[1][1:]) / median(spent[0][1:])
        theirs[f"blocks: ceiling at {n}"] = size * (size + 1) / 2 / int(part.draw(size).sum())
    ours["blocks: speed at the longest"] = list(ours.values())[-1]
    return ours, theirs


def cache(scale: Scale, seed: int) -> Numbers:
    """Nats a byte and bytes kept, read through each cache."""
    task = tasks.load("char-lm(length=256, test=0.05)")
    model = trained(task, scale, seed, 8e-3, position="rope", num_key_value_heads=1)
    count = 2 if scale == "smoke" else 32
    ids = torch.stack([task.test[i]["input_ids"] for i in range(count)])
    found: dict[str, float] = {}
    for name, bits in (("16 bits", (16, 16)), ("4 bits", (16, 4)), ("2 bits", (16, 2)), ("stairs", (16, 8, 4, 2))):
        kept = staircase_cache(model=model, width=32, group=32, bits=bits)
        with torch.no_grad():
            read = [model(input_ids=part, past_key_values=kept, use_cache=True).logits for part in ids.split(32, 1)]
        logits = torch.cat(read, 1)[:, :-1]
        found[f"cache: {name}, loss"] = float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        found[f"cache: {name}, bytes"] = sum(layer.nbytes for layer in kept.layers) / count
    ours = {name: value for name, value in found.items() if "stairs" in name}
    return ours, {name: value for name, value in found.items() if name not in ours}


def _judged(every: Callable[[dict], bool], mean: Callable[[dict], bool]) -> Callable[[Sequence[Outcome]], Verdict]:
    """Holds where all seeds fulfil `every`, in direction where the means fulfil `mean`."""

    def verdict(outcomes: Sequence[Outcome]) -> Verdict:
        rows = [{**one.measured, **one.baseline} for one in outcomes]
        if all(map(every, rows)):
            return "holds"
        means = {name: fmean(row[name] for row in rows) for name in rows[0]}
        return "holds in direction" if mean(means) else "does not hold here"

    return verdict


def _claim(statement: str, rule: str, start: str, shows: tuple[str, ...], every: Any, mean: Any) -> Claim:
    shown = tuple(f"{start}: {name}" for name in shows)
    return Claim(statement=statement, paper=PAPER, rule=rule, verdict=_judged(every, mean), shows=shown)


def _shorter(row: dict) -> bool:
    return row["words: SWE"] < min(row["words: BPE"], row["words: WordPiece"])


def _found(row: dict) -> bool:
    return row["search: cross-entropy"] <= row["search: chance"]


def _ordered(row: dict) -> bool:
    return row["position: rope"] > row["position: rope-alibi"] > row["position: alibi"]


def _gradual(row: dict) -> bool:
    four, two, ours = (row[f"cache: {name}, loss"] for name in ("4 bits", "2 bits", "stairs"))
    small = row["cache: stairs, bytes"] <= 1.5 * row["cache: 2 bits, bytes"]
    return small and abs(ours - four) < abs(ours - two)


POSITIONS = ("rope-alibi", "rope-alibi(steepness=300)", "rope", "alibi")
SPEEDS = ("speed at 256", "speed at 1024", "speed at 2048", "speed at 4096", "speed at the longest")
CEILINGS = ("ceiling at 256", "ceiling at 1024", "ceiling at 2048", "ceiling at 4096")
CACHES = tuple(f"{name}, {what}" for name in ("16 bits", "4 bits", "2 bits", "stairs") for what in ("loss", "bytes"))
CLAIMS = (
    _claim(
        "Sub-words learnt by likelihood write unseen text in fewer bits than BPE's and WordPiece's.",
        "bits a character of held-out text, tokens counted one by one; holds: in every seed below BPE and WordPiece; "
        "holds in direction: on the mean.",
        "words",
        ("SWE", "BPE", "WordPiece"),
        _shorter,
        _shorter,
    ),
    _claim(
        "A cross-entropy search finds hyper-parameters no worse than as many draws by chance.",
        "validation loss under fresh seeds; holds: in every seed no higher than chance's; holds in direction: on the "
        "mean.",
        "search",
        ("cross-entropy", "chance"),
        _found,
        _found,
    ),
    _claim(
        "Beyond the training length a harmonic penalty degrades less than RoPE alone and more than ALiBi.",
        "nats a byte at 512 after training at 64; holds: in every seed RoPE > harmonic > ALiBi; holds in "
        "direction: the harmonic's mean is below RoPE's.",
        "position",
        POSITIONS,
        _ordered,
        lambda row: row["position: rope-alibi"] < row["position: rope"],
    ),
    _claim(
        "Attention over blocks drawn by their distance is faster than full attention.",
        "time of the fused full attention over ours at 4,096 tokens; holds: at least 2 in every seed; holds in "
        "direction: above 1 on the mean.",
        "blocks",
        (*SPEEDS, *CEILINGS),
        lambda row: row["blocks: speed at the longest"] >= 2,
        lambda row: row["blocks: speed at the longest"] > 1,
    ),
    _claim(
        "A key-value cache in stairs has nearly the bytes of 2 bits a number and degrades less.",
        "holds: in every seed at most 1.5 times the 2-bit cache's bytes and a loss nearer to the 4-bit cache's; holds "
        "in direction: a mean loss below the 2-bit's.",
        "cache",
        CACHES,
        _gradual,
        lambda row: row["cache: stairs, loss"] < row["cache: 2 bits, loss"],
    ),
)
