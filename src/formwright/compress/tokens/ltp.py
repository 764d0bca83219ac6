"""LTP: tokens that receive too little attention leave the encoder, layer by layer, below thresholds that are learnt.

Paper    Kim, Shen, Thorsley, Gholami, Kwon, Hassoun, Keutzer: Learned Token Pruning for Transformers (KDD 2022),
         arXiv:2107.00910.
Idea     A token's score is the mean attention it receives over heads and queries. Each layer keeps what scores at least
         its threshold, a comparison and no sort, so that the kept length follows the text. A comparison has no
         gradient: thresholds and weights first learn together under a soft mask, then the weights alone under the hard
         one.

             s_l,i  = 1/(H N) sum_h sum_j A_l,h(j -> i)              live queries j only
             th_l   = th_final l / L + delta_l                       l = 0 .. L - 1, delta learnt from 0
             soft   M_l,i = sigmoid((s_l,i - th_l) / T), times what the layer gives for i
                    loss = task + lambda sum_l mean_i M_l,i
             hard   i stays if s_l,i >= max(1e-5, th_l), and is gone from this feed-forward on

Differs  N counts the live queries, so that padding changes nothing; variant="release" counts the padded length, and
         reads the scores after dropout, as the release does. There a pruned token is a hidden key; here it is taken out
         of the batch, in training too, and the first token, which the head reads, is always kept. The soft stage trains
         without weight decay, as published.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from formwright.compress.classifier import Classifier, classifier
from formwright.compress.modifier import Data, Modifier
from formwright.compress.runtime.packed import Policy, packed_encoder, sums
from formwright.compress.structure import EXECUTOR, Executor, attach
from formwright.errors import FormwrightError
from formwright.training import fit

Variant = Literal["paper", "release"]
# layer, scores of packed tokens, where their texts begin, how long those once were -> which tokens stay
Rule = Callable[[int, Float[Tensor, " t"], Int[Tensor, " s"], Int[Tensor, " b"]], Bool[Tensor, " t"]]

FLOOR = 1e-5  # below it a token counts as unseen, whatever the threshold


@dataclass
class TokenPruningOutput(SequenceClassifierOutput):
    """What a classifier gives, and how many tokens of each text there were before the first layer and after each."""

    lengths: Int[Tensor, "b layers_and_one"] | None = None


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """How much was left.

    Args:
        kept: tokens after each layer, mean over texts.
        length: tokens of a text before the first, mean.
        flops: of the encoder's layers without padding, as a share of what they are when no token leaves.
    """

    kept: list[float]
    length: float
    flops: float


def received(
    probabilities: Float[Tensor, "b h n n"], live: Bool[Tensor, "b n"], queries: int | None = None
) -> Float[Tensor, "b n"]:
    """The mean attention each token receives from live queries, in float32.

    Args:
        queries: what the sum is divided by beside the heads; none = how many queries are live.
    """
    votes = live.float()[:, None, :] @ probabilities.sum(1, dtype=torch.float32)
    count = live.sum(1, keepdim=True).clamp(min=1) if queries is None else queries
    return votes.squeeze(1) / (probabilities.shape[1] * count)


def soft_mask(scores: Float[Tensor, "b n"], threshold: Float[Tensor, ""], temperature: float) -> Float[Tensor, "b n"]:
    """1 well above the threshold and 0 well below; the first token stays."""
    mask = torch.sigmoid((scores - threshold) / temperature)
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)


def hard_mask(
    scores: Float[Tensor, "b n"], threshold: Float[Tensor, ""], live: Bool[Tensor, "b n"]
) -> Bool[Tensor, "b n"]:
    """The live tokens that stay; the first does."""
    keep = scores >= threshold.clamp(min=FLOOR)
    keep[:, 0] = True
    return keep & live


class TokenPruning(Executor):
    """The thresholds, and the run through the layers in which tokens leave.

    A call that asks for attentions or hidden states runs the model's own forward, with every token.

    Args:
        layers: of the encoder.
        final_threshold: the base threshold rises from 0 towards it, layer by layer.
        temperature: of the soft mask.
        variant: how scores are averaged.
    """

    kind = "token-pruning"

    def __init__(self, *, layers: int, final_threshold: float, temperature: float, variant: Variant) -> None:
        super().__init__()
        self.sizes = {"layers": layers, "final_threshold": final_threshold, "temperature": temperature}
        self.variant = variant
        self.delta = nn.Parameter(torch.zeros(layers))
        self.penalty: float | None = None  # lambda, while the soft stage lasts

    @property
    def thresholds(self) -> Float[Tensor, " layers"]:
        steps = torch.arange(len(self.delta), device=self.delta.device)
        return self.sizes["final_threshold"] * steps / len(self.delta) + self.delta.float()

    def structure(self) -> dict[str, Any]:
        return {**self.sizes, "variant": self.variant}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "TokenPruning":  # noqa: ARG003 - it stands alone
        return cls(**structure)

    def run(self, model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        whole = classifier(model, "LTP")
        if len(whole.layers) != len(self.delta):
            raise FormwrightError(
                f"The model has {len(whole.layers)} layers and thresholds for {len(self.delta)}: remove layers before "
                "ltp and not after it."
            )
        inputs = whole.inputs(*args, **kwargs)
        if inputs is None:
            return forward(*args, **kwargs)
        labels, given = inputs.pop("labels", None), inputs.get("attention_mask")
        if given is not None and not given[:, 0].all():
            raise FormwrightError(
                "Token pruning keeps the first token of a text and found padding there: pad on the right."
            )
        soft, regular = model.training and self.penalty is not None, None
        if whole.packs(inputs):
            logits, lengths = self.prune_packed(whole, inputs)
        else:
            hidden = whole.embed(**inputs)
            all_live = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            live = all_live if given is None else given.bool()
            logits, lengths, regular = (self.soften if soft else self.prune)(whole, hidden, live)
        loss = None if labels is None else whole.loss(logits, labels)
        if soft and loss is not None:
            loss = loss + self.penalty * regular
        output = TokenPruningOutput(loss=loss, logits=logits, lengths=lengths)
        return output if kwargs.get("return_dict", True) else output.to_tuple()

    def score(
        self,
        whole: Classifier,
        layer: nn.Module,
        hidden: Float[Tensor, "b n d"],
        live: Bool[Tensor, "b n"],
        padded: int,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n"]]:
        """The first half of a layer, and what its tokens score."""
        release = self.variant == "release"
        hidden, probabilities = whole.attend(layer, hidden, live, dropped=release)
        return hidden, received(probabilities, live, padded if release else None)

    def prune(
        self, whole: Classifier, hidden: Float[Tensor, "b n d"], live: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b c"], Int[Tensor, "b layers_and_one"], None]:
        """Hard thresholds; the batch is as long as the longest of what is left of its texts."""
        padded = hidden.shape[1]
        lengths = [live.sum(1)]
        hidden, live = compact(hidden, live)
        for number, layer in enumerate(whole.layers):
            hidden, scores = self.score(whole, layer, hidden, live, padded)
            hidden, live = compact(hidden, self.keep(number, scores, live, lengths[0]))
            hidden = whole.feed(layer, hidden)
            lengths.append(live.sum(1))
        return whole.head(hidden), torch.stack(lengths, 1), None

    def prune_packed(
        self, whole: Classifier, inputs: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "b c"], Int[Tensor, "b layers_and_one"]]:
        """The same on real tokens alone; no text pays for another's length."""
        hidden, borders = whole.packed(**inputs)
        padded = inputs["input_ids"].shape[1] if self.variant == "release" else None
        leaving = _Leaving(self, borders.diff().to(hidden.device), padded)
        hidden = packed_encoder(whole.base).run(hidden, borders, leaving)
        starts = sums(leaving.lengths[-1])[:-1]
        return whole.head(hidden[starts][:, None]), torch.stack(leaving.lengths, 1)

    def keep(
        self,
        number: int,
        scores: Float[Tensor, "b n"],
        live: Bool[Tensor, "b n"],
        lengths: Int[Tensor, " b"],  # noqa: ARG002 - of the whole texts, which other rules go by
    ) -> Bool[Tensor, "b n"]:
        """Which tokens stay after the attention of layer `number`."""
        return hard_mask(scores, self.thresholds[number].detach(), live)

    def packed_rule(self) -> Rule:
        """`keep` for texts one after the other; the thresholds are read once a run."""
        thresholds = self.thresholds.detach().clamp(min=FLOOR).tolist()

        def keep(number: int, scores: Tensor, borders: Tensor, _lengths: Tensor) -> Tensor:
            stays = scores >= thresholds[number]
            stays[borders[:-1]] = True
            return stays

        return keep

    def soften(
        self, whole: Classifier, hidden: Float[Tensor, "b n d"], live: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b c"], Int[Tensor, "b layers_and_one"], Float[Tensor, ""]]:
        """Soft masks on what the layers give; all tokens stay, and the last number is the sum of the masks' means."""
        padded, counts, thresholds = hidden.shape[1], live.sum(1), self.thresholds
        lengths, regular = [counts], hidden.new_zeros((), dtype=torch.float32)
        for number, layer in enumerate(whole.layers):
            hidden, scores = self.score(whole, layer, hidden, live, padded)
            mask = soft_mask(scores, thresholds[number], self.sizes["temperature"])
            hidden = whole.feed(layer, hidden)
            hidden = hidden * mask[..., None].to(hidden.dtype)
            regular = regular + ((mask * live).sum(1) / counts).mean()
            lengths.append(((mask > 0.5) & live).sum(1))
        return whole.head(hidden), torch.stack(lengths, 1), regular

    @torch.no_grad()
    def measure(self, model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> Pruned:
        """What is left of the texts of some batches, layer by layer."""
        whole = classifier(model, "LTP")
        training = model.training
        model.eval()
        lengths = torch.cat([model(**batch).lengths for batch in batches]).double()
        model.train(training)
        spent = full = 0.0
        for number, layer in enumerate(whole.layers):
            spent += flops(whole, layer, lengths[:, number], lengths[:, number + 1])
            full += flops(whole, layer, lengths[:, 0], lengths[:, 0])
        means = lengths.mean(0).tolist()
        return Pruned(kept=means[1:], length=means[0], flops=spent / full)


class _Leaving(Policy):
    """Which tokens leave a packed run, and how many are left of each text."""

    weighs = True

    def __init__(self, pruning: TokenPruning, lengths: Int[Tensor, " b"], padded: int | None) -> None:
        self.rule, self.padded, self.lengths = pruning.packed_rule(), padded, [lengths]

    def after_attention(
        self, layer: int, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"], received: Float[Tensor, " t"]
    ) -> Bool[Tensor, " t"]:
        scores = received.float()
        if self.padded is not None:
            lengths = cu_seqlens.diff()
            scores = scores * (lengths.repeat_interleave(lengths) / self.padded).to(scores.device)
        return self.rule(layer, scores, cu_seqlens.to(hidden.device), self.lengths[0])

    def after_layer(self, layer: int, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"]) -> None:
        del layer
        self.lengths.append(cu_seqlens.diff().to(hidden.device))


def compact(
    hidden: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"]
) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"]]:
    """The kept tokens in their order, as long as the longest row; the rest of a row is not live."""
    longest = int(keep.sum(1).max())
    if longest == keep.shape[1]:
        return hidden, keep
    places = torch.argsort((~keep).byte(), dim=1, stable=True)[:, :longest]
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])), keep.gather(1, places)


def flops(whole: Classifier, layer: nn.Module, before: Float[Tensor, " b"], after: Float[Tensor, " b"]) -> float:
    """Of a layer whose attention reads `before` tokens and whose feed-forward reads `after`, two a multiplication."""
    inner, hidden = whole.widths(layer)
    attention = 8 * before * whole.width * inner + 4 * before**2 * inner
    return float((attention + 4 * after * whole.width * hidden).sum())


class LTP(Modifier):
    """Learnt thresholds below which tokens leave, trained soft and then hard.

    Args:
        penalty: lambda, how hard tokens are pushed out; 0.01 to 0.2 in the paper, searched for each task.
        final_threshold: the base threshold rises from 0 towards it. 0.01 suits texts of about 100 tokens: a mean score
            is 1 / length.
        temperature: T of the soft mask, 1e-4 to 2e-3 in the paper.
        variant: "paper", or "release" for scores averaged over the padded length.
        soft_steps: of training thresholds and weights together; none = those of the data's settings, as for the others.
        hard_steps: of training the weights alone, with tokens gone.
        learning_rate: 2e-5 in the paper.
        batch_size: 64 in the paper.
    """

    trains = True

    def __init__(
        self,
        *,
        penalty: float = 0.1,
        final_threshold: float = 0.01,
        temperature: float = 1e-3,
        variant: Variant = "paper",
        soft_steps: int | None = None,
        hard_steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not penalty >= 0 or not final_threshold >= 0 or not temperature > 0:
            raise FormwrightError(
                f"penalty and final_threshold must not be negative and temperature must be above 0, got {penalty}, "
                f"{final_threshold} and {temperature}."
            )
        if variant not in get_args(Variant):
            raise FormwrightError(f"variant is {variant!r}, but it must be paper or release.")
        self.penalty, self.final_threshold = penalty, final_threshold
        self.temperature, self.variant = temperature, variant
        own = {"learning_rate": learning_rate, "batch_size": batch_size}
        self.settings = {name: value for name, value in own.items() if value is not None}
        self.steps = {"soft": soft_steps, "hard": hard_steps}

    def check(self, model: PreTrainedModel) -> None:
        whole = classifier(model, "LTP")
        if getattr(model, EXECUTOR, None) is not None:
            raise FormwrightError(f"The model is run by {model.executor.kind} already: leave ltp out.")
        for layer in whole.layers:
            whole.attention(layer)

    def apply(self, model: PreTrainedModel) -> None:
        executor = TokenPruning(
            layers=len(classifier(model, "LTP").layers),
            final_threshold=self.final_threshold,
            temperature=self.temperature,
            variant=self.variant,
        )
        attach(model, executor.to(model.device).train(model.training))

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        executor = model.executor
        settings = replace(data.settings, **self.settings)
        soft, hard = (settings.steps if one is None else one for one in (self.steps["soft"], self.steps["hard"]))
        executor.penalty = self.penalty
        try:
            fit(model, data.task, replace(settings, steps=soft, weight_decay=0.0))
        finally:
            executor.penalty = None
            executor.delta.requires_grad_(False)
        fit(model, data.task, replace(settings, steps=hard))
