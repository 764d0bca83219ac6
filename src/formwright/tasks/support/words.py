"""Tokenizers, learnt on the training text alone. They are of the `tokenizers` library, which comes with
transformers."""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

PAD, UNKNOWN = "[PAD]", "[UNK]"


def byte_pairs(texts: Iterable[str], vocab: int, special: tuple[str, ...] = ()) -> Any:
    """Byte-level BPE: it can write every text, and needs no unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def words(texts: Iterable[str], vocab: int) -> Any:
    """The commonest words in lower case, punctuation apart; [PAD] is 0 and [UNK], every other word, 1."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=vocab, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def numbers(tokenizer: Any, text: str) -> Int[Tensor, " n"]:
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int32)
