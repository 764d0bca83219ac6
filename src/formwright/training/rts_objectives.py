"""RTS, C-RTS and SLM: pre-training that hides nothing behind a symbol; MLM and ELECTRA beside them.

Paper    Di Liello, Gabburo, Moschitti: Efficient pre-training objectives for Transformers (2021), arXiv:2104.09694;
         MLM: Devlin et al. (2018), arXiv:1810.04805; ELECTRA: Clark et al. (2020), arXiv:2003.10555.
Idea     A share p of the tokens is chosen and changed. A model that only says which tokens were changed needs two
         answers in place of a vocabulary's, at every token, and no second network that makes the changes.

             mlm      chosen: 80 % a mask, 10 % a random token, 10 % as they are; which token was it?   V answers
             slm      chosen: a random token; which token was it?                                       V answers
             rts      chosen: a random token; at every token: was it changed?                           2 answers
             c-rts    as rts, but a token of cluster a becomes one of cluster b ~ softmax(beta m(C[a])),
                      m(c) = (c - min c) / (max c - min c);  then C[a, b] += 1 where the model is wrong, -= 1 where
                      it is right: the pairs that deceive it are drawn more often
             electra  chosen: a mask, filled by drawing from a small generator that is trained as mlm; was it changed?
                      L = L_generator + 50 L_changed

         `pretrain` trains an encoder in place, ours or one of transformers; as a training method, pretrain(objective=
         rts), it does so before the task is learnt.
Differs  Tokens are changed inside the forward pass, on the model's device, so C is never stale. A chosen token that
         draws itself is unchanged and labelled so; special tokens are neither chosen nor drawn nor asked about (the
         authors' code draws them in rts). Duplicate pairs of a batch all count in C (theirs keeps one). Clusters are
         k-means over PPMI + SVD vectors of the texts, our choice, as are their number and that only changed tokens
         count. Whole words are not chosen together. A vocabulary without a mask gets a learned vector for it.
         ELECTRA's generator shares the tokens' table and has positions of its own.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from formwright.build import Spec, build
from formwright.errors import FormwrightError
from formwright.training.evaluation import Batch, Split, Trainable, fetch, rows
from formwright.training.items import Items
from formwright.training.loop import History, fit
from formwright.training.method import Method
from formwright.training.settings import Settings

IGNORED = -100
TOKENS_READ = 2_000_000  # of the texts, for clusters
WINDOW, CONTEXTS, DIMENSIONS, ROUNDS = 4, 1000, 48, 20  # of the clusters' token vectors

# The vocabulary


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which numbers are tokens of texts.

    Attributes:
        size: all of them.
        special: padding, unknown and the like: never chosen, drawn or asked about.
        mask: the token that stands for a hidden one, if there is such.
    """

    size: int
    special: frozenset[int] = frozenset()
    mask: int | None = None

    def __post_init__(self) -> None:
        if len(self.ordinary()) < 2:
            raise FormwrightError(f"Of {self.size} tokens fewer than two are ordinary: nothing can be exchanged.")

    def ordinary(self) -> Int[Tensor, " v"]:
        """The tokens that texts are made of."""
        return torch.tensor([token for token in range(self.size) if token not in self.special])

    def among(self, ids: Int[Tensor, "b n"], mask: Tensor | None) -> Bool[Tensor, "b n"]:
        """Where real tokens stand that are not special."""
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        special = torch.tensor(sorted(self.special), dtype=ids.dtype, device=ids.device)
        return real & ~torch.isin(ids, special)


def vocabulary_of(model: PreTrainedModel, tokenizer: Any = None) -> Vocabulary:
    """What a model's numbers mean; without a tokenizer only the padding is known to be special."""
    size = model.config.get_text_config().vocab_size
    pad = getattr(model.config, "pad_token_id", None)
    special = set() if pad is None else {pad}
    mask = None
    if hasattr(tokenizer, "all_special_ids"):  # transformers'
        special |= set(tokenizer.all_special_ids)
        mask, size = tokenizer.mask_token_id, min(size, len(tokenizer))
    elif tokenizer is not None:  # of the tokenizers library
        special |= {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        size = min(size, tokenizer.get_vocab_size())
    return Vocabulary(size=size, special=frozenset(special), mask=mask)


# The objectives: how texts are changed, and what is asked


class Changed(NamedTuple):
    """A batch to be read: its tokens, where a mask hides them, and the answers (-100 where nothing is asked)."""

    ids: Int[Tensor, "b n"]
    hidden: Bool[Tensor, "b n"] | None
    labels: Int[Tensor, "b n"]


class Objective(nn.Module):
    """How tokens are chosen and changed.

    Args:
        share: p, of the tokens to choose.
    """

    detects: ClassVar[bool] = True  # asks whether a token was changed, not which token it was
    hides: ClassVar[bool] = False  # behind a mask, from the encoder itself

    def __init__(self, *, share: float = 0.15) -> None:
        super().__init__()
        if not 0 < share < 1:
            raise FormwrightError(f"share is {share}, but it is the share of the tokens to choose: between 0 and 1.")
        self.share = share

    def study(self, texts: Sequence[Tensor], vocabulary: Vocabulary) -> None:  # noqa: ARG002
        """Look at the texts before training."""
        self.register_buffer("ordinary", vocabulary.ordinary(), persistent=False)

    def choose(self, among: Bool[Tensor, "b n"], share: float | None = None) -> Bool[Tensor, "b n"]:
        return among & (torch.rand(among.shape, device=among.device) < (self.share if share is None else share))

    def random(self, ids: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """Ordinary tokens, all equally likely."""
        return self.ordinary[torch.randint(len(self.ordinary), ids.shape, device=ids.device)]

    def change(self, ids: Int[Tensor, "b n"], among: Bool[Tensor, "b n"]) -> Changed:
        """The batch to read; only tokens `among` are chosen."""
        raise NotImplementedError

    def learn(self, ids: Tensor, seen: Tensor, right: Tensor) -> None:
        """What the model made of the changes in training: originals, what it saw, whether it was right, a cell each."""


class MLM(Objective):
    """Masked language modelling.

    Args:
        share: of the tokens to choose.
        all_tokens: ask about every token, not only the chosen ones.
    """

    detects, hides = False, True

    def __init__(self, *, share: float = 0.15, all_tokens: bool = False) -> None:
        super().__init__(share=share)
        self.all_tokens = all_tokens

    def change(self, ids: Int[Tensor, "b n"], among: Bool[Tensor, "b n"]) -> Changed:
        chosen = self.choose(among)
        lot = torch.rand(ids.shape, device=ids.device)
        exchanged = chosen & (lot >= 0.8) & (lot < 0.9)
        labels = ids.masked_fill(~(among if self.all_tokens else chosen), IGNORED)
        return Changed(torch.where(exchanged, self.random(ids), ids), chosen & (lot < 0.8), labels)


class SLM(MLM):
    """Swapped language modelling: MLM without a mask, all that is chosen is exchanged.

    Args:
        share: of the tokens to choose.
        all_tokens: ask about every token, not only the chosen ones.
    """

    hides = False

    def change(self, ids: Int[Tensor, "b n"], among: Bool[Tensor, "b n"]) -> Changed:
        chosen = self.choose(among)
        labels = ids.masked_fill(~(among if self.all_tokens else chosen), IGNORED)
        return Changed(torch.where(chosen, self.random(ids), ids), None, labels)


class RTS(Objective):
    """Random token substitution.

    Args:
        share: of the tokens to choose.
    """

    def change(self, ids: Int[Tensor, "b n"], among: Bool[Tensor, "b n"]) -> Changed:
        return detection(ids, torch.where(self.choose(among), self.random(ids), ids), among)


def detection(ids: Tensor, seen: Tensor, among: Tensor) -> Changed:
    """Asked at every ordinary token: was it changed?"""
    return Changed(seen, None, (seen != ids).long().masked_fill(~among, IGNORED))


class CRTS(Objective):
    """Cluster-based random token substitution.

    Args:
        share: of the tokens to choose.
        clusters: K, of tokens used alike.
        beta: how strongly the pairs that deceived the model are preferred; 0 = not at all.
    """

    def __init__(self, *, share: float = 0.15, clusters: int = 100, beta: float = 2.0) -> None:
        super().__init__(share=share)
        if clusters < 2 or beta < 0:
            raise FormwrightError(f"c-rts needs 2 clusters or more and beta from 0, got {clusters} and {beta}.")
        self.clusters, self.beta = clusters, beta

    def study(self, texts: Sequence[Tensor], vocabulary: Vocabulary) -> None:
        super().study(texts, vocabulary)
        if self.clusters > len(self.ordinary):
            raise FormwrightError(
                f"c-rts has {self.clusters} clusters for {len(self.ordinary)} tokens: set clusters below that."
            )
        self.assign(clusters_of(texts, vocabulary, self.clusters), vocabulary)

    def assign(self, cluster: Int[Tensor, " v"], vocabulary: Vocabulary) -> None:
        """Give every token its cluster, 0, 1, ..; those of special tokens are not read."""
        kept = vocabulary.ordinary()
        own = cluster[kept]
        count = int(own.max()) + 1
        sizes = torch.bincount(own, minlength=count)
        if not bool(sizes.all()):
            raise FormwrightError("A cluster holds no ordinary token: number them 0, 1, .. without a gap.")
        self.register_buffer("cluster", cluster)
        self.register_buffer("members", kept[own.argsort(stable=True)])  # cluster after cluster
        self.register_buffer("sizes", sizes)
        self.register_buffer("counts", torch.ones(count, count, dtype=torch.long))

    def probabilities(self) -> Float[Tensor, "k k"]:
        """Row a: how likely a token of cluster a is exchanged for one of each cluster."""
        low, high = self.counts.amin(1, keepdim=True), self.counts.amax(1, keepdim=True)
        return (self.beta * (self.counts - low) / (high - low).clamp(min=1)).softmax(-1)

    def change(self, ids: Int[Tensor, "b n"], among: Bool[Tensor, "b n"]) -> Changed:
        chosen = self.choose(among)
        drawn = torch.multinomial(self.probabilities()[self.cluster[ids[chosen]]], 1)[:, 0] if chosen.any() else None
        seen = ids.clone()
        if drawn is not None:
            size, start = self.sizes[drawn], (self.sizes.cumsum(0) - self.sizes)[drawn]
            place = (torch.rand(drawn.shape, device=ids.device) * size).long().clamp(max=size - 1)
            seen[chosen] = self.members[start + place]
        return detection(ids, seen, among)

    def learn(self, ids: Tensor, seen: Tensor, right: Tensor) -> None:
        at = ids != seen
        added = torch.zeros_like(self.counts)
        pairs = (self.cluster[ids[at]], self.cluster[seen[at]])
        added.index_put_(pairs, 1 - 2 * right[at].long(), accumulate=True)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(added)
        self.counts += added


class Electra(Objective):
    """Detection of what a small generator filled in.

    Args:
        share: of the tokens to choose.
        width: of the generator, as a share of the encoder's.
        weight: of the detection's loss beside the generator's.
    """

    def __init__(self, *, share: float = 0.15, width: float = 0.25, weight: float = 50.0) -> None:
        super().__init__(share=share)
        if not 0 < width <= 1 or weight <= 0:
            raise FormwrightError(
                f"electra needs a width above 0 and up to 1 and a positive weight, got {width}, {weight}."
            )
        self.width, self.weight = width, weight

    def change(self, ids: Int[Tensor, "b n"], among: Bool[Tensor, "b n"]) -> Changed:
        """For the generator: hidden tokens, and which they were."""
        chosen = self.choose(among)
        return Changed(ids, chosen, ids.masked_fill(~chosen, IGNORED))


def clusters_of(texts: Sequence[Tensor], vocabulary: Vocabulary, clusters: int) -> Int[Tensor, " v"]:
    """Tokens that stand near the same ones, in clusters none of which is empty.

    Vectors are the first DIMENSIONS of an SVD of the positive pointwise mutual information with the CONTEXTS commonest
    tokens, up to WINDOW places away; then k-means. The same texts give the same clusters.
    """
    kept = vocabulary.ordinary()
    place = torch.full((vocabulary.size,), -1)
    place[kept] = torch.arange(len(kept))
    lines, read = [], 0
    for text in texts:
        lines.append(
            F.pad(place[text.long().clamp(max=vocabulary.size - 1)], (0, WINDOW), value=-1)
        )  # a gap after each
        read += len(text)
        if read > TOKENS_READ:
            break
    line = torch.cat(lines)
    frequency = torch.bincount(line[line >= 0], minlength=len(kept))
    common = frequency.argsort(descending=True, stable=True)[:CONTEXTS]
    column = torch.full((len(kept) + 1,), -1)  # of a context; the last stands for -1
    column[common] = torch.arange(len(common))
    together = torch.zeros(len(kept) * len(common))
    for apart in range(1, WINDOW + 1):
        for a, b in ((line[:-apart], line[apart:]), (line[apart:], line[:-apart])):
            at = (a >= 0) & (column[b] >= 0)
            together += torch.bincount(a[at] * len(common) + column[b[at]], minlength=len(together))
    together = together.view(len(kept), len(common))
    expected = together.sum(1, keepdim=True) * together.sum(0) / together.sum().clamp(min=1)
    information = (together / expected.clamp(min=1e-12)).clamp(min=1).log()  # ln(x / 1) > 0 alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(information, q=min(DIMENSIONS, *information.shape))
        vectors = F.normalize(u * s.sqrt(), dim=1)
        own = k_means(vectors, clusters)
    cluster = torch.zeros(vocabulary.size, dtype=torch.long)
    cluster[kept] = own
    return cluster


def k_means(vectors: Float[Tensor, "v d"], clusters: int) -> Int[Tensor, " v"]:
    """Clusters by Lloyd's algorithm from random vectors; an empty one takes the vector farthest from its centre."""
    centres = vectors[torch.randperm(len(vectors))[:clusters]].clone()
    for _ in range(ROUNDS):
        distance, own = torch.cdist(vectors, centres).min(1)
        sizes = torch.bincount(own, minlength=clusters)
        for empty in (sizes == 0).nonzero()[:, 0].tolist():
            alone = torch.where(sizes[own] > 1, distance, -1.0).argmax()
            sizes[own[alone]] -= 1
            own[alone], distance[alone], sizes[empty] = empty, -1.0, 1
        centres = torch.zeros_like(centres).index_add_(0, own, vectors) / sizes[:, None]
    return own


# The heads


class TokenHead(nn.Module):
    """Which token stands here: a dense layer, GELU and a norm, then the tokens' own table and a bias, as BERT's.

    Args:
        dim: of the states.
        table: width and number of the tokens' embeddings.
    """

    def __init__(self, dim: int, width: int, tokens: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, width), nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(tokens))

    def forward(self, states: Float[Tensor, "*b d"], table: Float[Tensor, "v e"]) -> Float[Tensor, "*b v"]:
        return F.linear(self.norm(F.gelu(self.dense(states))), table, self.bias)


class Generator(nn.Module):
    """ELECTRA's small network: the encoder's kind at a share of its width, on the encoder's table of tokens."""

    def __init__(self, encoder: PreTrainedModel, width: float, vocabulary: Vocabulary) -> None:
        super().__init__()
        table = encoder.get_input_embeddings().weight
        self.body = narrowed(encoder, width)
        dim = self.body.config.hidden_size
        self.project = nn.Linear(table.shape[1], dim)
        self.mask = None if vocabulary.mask is not None else nn.Parameter(table.detach().mean(0))
        self.head = TokenHead(dim, table.shape[1], table.shape[0])

    def forward(
        self, embeddings: nn.Module, ids: Tensor, hidden: Tensor, token: int | None, inputs: dict[str, Tensor]
    ) -> Float[Tensor, "cells v"]:
        x = self.project(embedded(embeddings, ids, hidden, token, self.mask))
        return self.head(self.body(inputs_embeds=x, **inputs).last_hidden_state[hidden], embeddings.weight)


def narrowed(encoder: PreTrainedModel, width: float) -> PreTrainedModel:
    """An encoder of the same kind at a share of the width, drawn anew, without a table of tokens."""
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    heads = max(1, round(width * config.num_attention_heads))
    dim = heads * max(2, 2 * round(width * config.hidden_size / (2 * heads)))  # even heads, for rotary positions
    for name in ("intermediate_size", "hidden_dim"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, max(1, round(width * getattr(config, name))))
    for name in ("head_dim", "num_key_value_heads"):  # follow from the others
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    if "embedding_size" in config.to_dict():
        config.embedding_size = dim
    config.hidden_size, config.num_attention_heads = dim, heads
    config.vocab_size = (getattr(config, "pad_token_id", None) or 0) + 1
    pooled = "add_pooling_layer" in inspect.signature(type(encoder).__init__).parameters
    made = AutoModel.from_config(config, **({"add_pooling_layer": False} if pooled else {}))
    made.set_input_embeddings(nn.Identity())
    return made


def embedded(
    embeddings: nn.Module, ids: Tensor, hidden: Tensor, token: int | None, mask: Tensor | None
) -> Float[Tensor, "b n e"]:
    """The vectors of tokens, with the mask's where they are hidden: that of a token, or one of its own."""
    if token is not None:
        return embeddings(ids.masked_fill(hidden, token))
    x = embeddings(ids)
    return torch.where(hidden[..., None], mask.to(x.dtype), x)


@dataclass
class PretrainingOutput(ModelOutput):
    """`loss` as it is trained, `extra_losses`: the share of right answers, and ELECTRA's generator's loss."""

    loss: Tensor | None = None
    extra_losses: dict[str, Tensor] | None = None


class Answers(NamedTuple):
    """What was asked, a cell each."""

    logits: Float[Tensor, "cells c"]
    labels: Int[Tensor, " cells"]
    ids: Int[Tensor, " cells"]
    seen: Int[Tensor, " cells"]
    generator: Float[Tensor, ""] | None  # ELECTRA's generator's loss


class Pretraining(nn.Module):
    """An encoder with an objective and its head: what `fit` trains.

    Args:
        model: whose encoder is trained, in place.
        objective: how texts are changed.
        vocabulary: what the numbers mean.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.encoder, self.objective, self.vocabulary = model.base_model, objective, vocabulary
        table = self.encoder.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise FormwrightError(
                f"{type(model).__name__} keeps its tokens in a {type(table).__name__}, and pre-training needs one "
                "table of them: choose embeddings without factors."
            )
        dim, eps = model.config.hidden_size, getattr(model.config, "layer_norm_eps", None) or 1e-12
        self.head = (
            nn.Linear(dim, 2) if objective.detects else TokenHead(dim, table.embedding_dim, table.num_embeddings, eps)
        )
        self.generator = self.mask = None
        if isinstance(objective, Electra):
            self.generator = Generator(self.encoder, objective.width, vocabulary)
        elif objective.hides and vocabulary.mask is None:
            self.mask = nn.Parameter(table.weight.detach().mean(0))

    def answers(self, batch: Batch) -> Answers:
        """Change a batch, read it, and answer."""
        inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
        ids = batch["input_ids"]
        among = self.vocabulary.among(ids, batch.get("attention_mask"))
        embeddings, token = self.encoder.get_input_embeddings(), self.vocabulary.mask
        changed, told = self.objective.change(ids, among), None
        if self.generator is not None:
            logits = self.generator(embeddings, ids, changed.hidden, token, inputs)
            told = mean_loss(logits, ids[changed.hidden])
            seen = ids.clone()
            seen[changed.hidden] = self.drawn(logits)
            changed = detection(ids, seen, among)
        if changed.hidden is None or self.mask is None:
            read = changed.ids if changed.hidden is None else changed.ids.masked_fill(changed.hidden, token)
            states = self.encoder(input_ids=read, **inputs).last_hidden_state
        else:
            x = embedded(embeddings, changed.ids, changed.hidden, None, self.mask)
            states = self.encoder(inputs_embeds=x, **inputs).last_hidden_state
        asked = changed.labels != IGNORED  # a large head runs on these alone
        states = states[asked]
        logits = self.head(states) if self.objective.detects else self.head(states, embeddings.weight)
        return Answers(logits, changed.labels[asked], ids[asked], changed.ids[asked], told)

    def drawn(self, logits: Float[Tensor, "cells v"]) -> Int[Tensor, " cells"]:
        """Tokens by the generator's probabilities, none of them special; no gradient comes back through a draw."""
        barred = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        barred[self.objective.ordinary] = False
        noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()  # argmax of + Gumbel is a draw
        return (logits.detach().float() + noise).masked_fill(barred, -torch.inf).argmax(-1)

    def forward(self, **batch: Tensor) -> PretrainingOutput:
        found = self.answers(batch)
        loss = mean_loss(found.logits, found.labels)
        right = found.logits.argmax(-1) == found.labels
        extra = {"accuracy": right.float().sum() / max(1, len(right))}
        if self.training:
            self.objective.learn(found.ids, found.seen, right)
        if found.generator is not None:
            extra["generator"] = found.generator
            loss = found.generator + self.objective.weight * loss
        return PretrainingOutput(loss=loss, extra_losses=extra)


def mean_loss(logits: Float[Tensor, "cells c"], labels: Int[Tensor, " cells"]) -> Float[Tensor, ""]:
    """The mean over cells; 0 where nothing was chosen."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))


# Training


def unread(*_: Any) -> Any:
    raise FormwrightError("A pre-training objective is read by `measure`, not by `evaluate`.")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The texts of a task as `fit` wants them: every real token counts as a cell."""

    name: str
    train: Dataset
    collate: Callable[[Any], Batch]
    head: str = "masked-lm"
    validation: Dataset | None = None
    test: Dataset | None = None
    score: Callable[[Tensor, Batch], Items] = unread
    summary: Callable[[Items], dict[str, float]] = unread


def texts_only(collate: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
    """Batches whose labels are the tokens themselves: the task's own are not looked at."""

    def collated(given: Any) -> Batch:
        batch = {name: value for name, value in collate(given).items() if name != "labels"}
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~real, IGNORED)}

    return collated


def check(model: nn.Module, task: Trainable, objective: Objective) -> None:
    """Raise where pre-training cannot work.

    Raises:
        FormwrightError: a model that is no encoder of texts, a task without texts, or an encoder that reads no vectors
            where the objective needs that.
    """
    config = getattr(model, "config", None)
    known = isinstance(model, PreTrainedModel) and any(
        one in AutoModelForMaskedLM._model_mapping for one in type(config).__mro__
    )
    if not known or getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        raise FormwrightError(
            f"{type(model).__name__} is no encoder of texts that reads in both directions, and only such are "
            'pre-trained this way: choose BERT, RoBERTa and the like, or architecture="encoder".'
        )
    if "input_ids" not in fetch(corpus_rows(task), [0], task.collate):
        raise FormwrightError(f"{task.name} holds no texts to pre-train on: choose a task of texts.")
    vectors = "inputs_embeds" in inspect.signature(model.base_model.forward).parameters
    masked = objective.hides and vocabulary_of(model, getattr(task, "tokenizer", None)).mask is None
    if not vectors and (masked or isinstance(objective, Electra)):
        raise FormwrightError(
            f"{type(model.base_model).__name__} reads no inputs_embeds, which a mask needs: choose rts."
        )


def corpus_rows(task: Trainable) -> Dataset:
    """The texts to pre-train on: those without labels, if the task holds such, else the training rows."""
    unlabelled = getattr(task, "unlabelled", None)
    return task.train if unlabelled is None else unlabelled


def equip(model: PreTrainedModel, task: Trainable, objective: Objective) -> Pretraining:
    """A model's encoder with an objective and its head, on its device; weights are drawn by torch's seed."""
    check(model, task, objective)
    vocabulary = vocabulary_of(model, getattr(task, "tokenizer", None))
    texts = corpus_rows(task)
    objective.study(Tokens(texts, task.collate), vocabulary)
    return Pretraining(model, objective, vocabulary).to(next(model.parameters()).device)


class Tokens(Sequence[Tensor]):
    """The real tokens of every text, one text at a time."""

    def __init__(self, dataset: Dataset, collate: Callable[[Any], Batch]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = fetch(self.dataset, [index], self.collate)
        mask = batch.get("attention_mask")
        return batch["input_ids"][0] if mask is None else batch["input_ids"][0][mask[0].bool()]


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What pre-training was like, and what carries it on.

    Attributes:
        history: losses, and in `extras` the share of right answers, step by step.
        trained: the encoder with its head, for `measure`; the model holds the same encoder.
    """

    history: History
    trained: Pretraining


def pretrain(
    model: PreTrainedModel,
    task: Trainable,
    objective: Spec | Objective = "rts",
    *,
    settings: Settings,
    methods: Sequence[Method] = (),
) -> Pretrained:
    """Train a model's encoder in place on the texts of a task; labels are not looked at, and no head stays behind.

    Args:
        model: an encoder, or a classifier, which is then fine-tuned as it stands.
        task: whose texts: `task.unlabelled` if there are any, else the training rows.
        objective: mlm, slm, rts, c-rts or electra, with options in brackets.
        settings: of this training.
        methods: training methods beside those that the settings name.

    Raises:
        FormwrightError: no encoder, no texts, or no such objective.
    """
    objective = objective if isinstance(objective, Objective) else build("objective", objective)
    body = equip(model, task, objective)
    corpus = Corpus(name=f"{task.name}, texts", train=corpus_rows(task), collate=texts_only(task.collate))
    if settings.evaluate_every:
        raise FormwrightError("Pre-training has no learning curve of a task's metric: set evaluate_every=0.")
    return Pretrained(history=fit(body, corpus, settings, methods=methods), trained=body)


@torch.no_grad()
def measure(
    body: Pretraining, task: Trainable, split: Split = "test", *, batch_size: int = 64, seed: int = 0
) -> dict[str, float]:
    """How well an objective is met on the texts of a split, changed by this seed.

    Accuracy and loss; of detection, also precision, recall and F1 of the changed tokens, since whoever calls none
    changed is right 85 % of the time; of ELECTRA the generator's loss too.
    """
    dataset = rows(task, split)
    device, training = next(body.parameters()).device, body.training
    sums: dict[str, float] = dict.fromkeys(("loss", "cells", "right", "called", "changed", "both", "generator"), 0.0)
    body.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for places in torch.arange(len(dataset)).split(batch_size):  # type: ignore[arg-type]
                batch = fetch(dataset, places.tolist(), texts_only(task.collate))
                found = body.answers({name: value.to(device) for name, value in batch.items()})
                guess = found.logits.argmax(-1)
                sums["loss"] += float(F.cross_entropy(found.logits.float(), found.labels, reduction="sum"))
                sums["cells"] += len(guess)
                sums["right"] += int((guess == found.labels).sum())
                sums["called"] += int((guess == 1).sum())
                sums["changed"] += int((found.labels == 1).sum())
                sums["both"] += int(((guess == 1) & (found.labels == 1)).sum())
                if found.generator is not None:
                    sums["generator"] += float(found.generator) * len(places)
    finally:
        body.train(training)
    metrics = {"accuracy": sums["right"] / max(1, sums["cells"]), "loss": sums["loss"] / max(1, sums["cells"])}
    if body.objective.detects:
        metrics["precision"] = sums["both"] / max(1, sums["called"])
        metrics["recall"] = sums["both"] / max(1, sums["changed"])
        metrics["f1"] = 2 * sums["both"] / max(1, sums["called"] + sums["changed"])
    if body.generator is not None:
        metrics["generator"] = sums["generator"] / len(dataset)  # type: ignore[arg-type]
    return metrics


class Pretrain(Method):
    """Pre-train the model's encoder on the task's texts, then learn the task.

    Args:
        objective: mlm, slm, rts, c-rts or electra, with options in brackets: c-rts(clusters=50).
        steps: of pre-training, beside the task's own.
        learning_rate: of pre-training; none = the task's.
        batch_size: of pre-training; none = the task's.
    """

    def __init__(
        self,
        *,
        objective: str = "rts",
        steps: int = 1000,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.objective: Objective = build("objective", objective)
        self.given = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size}
        Settings(**{name: value for name, value in self.given.items() if value is not None})  # what they may be
        self.pretrained: Pretrained | None = None

    def check(self, model: nn.Module, task: Trainable, settings: Settings) -> None:  # noqa: ARG002
        check(model, task, self.objective)

    def prepare(self, model: nn.Module, task: Trainable, settings: Settings) -> None:
        told = {name: value for name, value in self.given.items() if value is not None}
        own = replace(settings, evaluate_every=0, save_every=0, methods="none", **told)
        self.pretrained = pretrain(model, task, self.objective, settings=own)
