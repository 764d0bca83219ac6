"""DeeBERT: a sample leaves the encoder at the first small classifier that is sure of it.

Paper    Xin, Tang, Lee, Yu, Lin: DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference (ACL 2020),
         arXiv:2004.12993.
Idea     After every layer but the last sits an off-ramp, a pooler and a classifier of its own, trained while the
         fine-tuned model under it stays frozen: the full model's answer remains what it was. A sample whose answer at
         ramp i is sure enough takes it, and the layers above are not run for it.

             z_i = W_c,i dropout(tanh(W_p,i h_i[CLS] + b_p,i)) + b_c,i      i = 1 .. L - 1
             loss = sum_i CE(z_i, y)                                        all samples at all ramps
             leave at i if H_i = -sum_c p_c ln p_c < S                      p = softmax(z_i), in nats

Differs  The paper runs one sample at a time; here a batch shrinks as its samples leave. The frozen layers run without
         dropout while the ramps learn (backbone="train" is the release's way). The release also lets an untrained ramp
         after the last layer answer; there is none here. Its ramps start from the pooler before fine-tuning: name that
         model's folder as `pooler`, else they start from what the fine-tuned model holds in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from formwright.compress.classifier import Classifier, classifier
from formwright.compress.modifier import Data, Modifier
from formwright.compress.runtime.packed import Policy, packed_encoder, sums
from formwright.compress.structure import EXECUTOR, Executor, attach
from formwright.errors import FormwrightError
from formwright.training import fit

Backbone = Literal["eval", "train"]


@dataclass
class EarlyExitOutput(SequenceClassifierOutput):
    """What a classifier gives, and after how many layers each sample left."""

    exit_layers: Int[Tensor, " b"] | None = None


def entropy(logits: Float[Tensor, "b c"]) -> Float[Tensor, " b"]:
    """In nats, in float32; a probability that underflows counts nothing."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


class OffRamp(nn.Module):
    """BERT's pooler, dropout and classifier, on the first token of a layer's output."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def forward(self, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        return self.classifier(self.dropout(torch.tanh(self.pooler(hidden[:, 0]))))

    def read(self, first: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        """The same of the first tokens alone, without dropout and without the cost of calling modules: a ramp is run
        for every layer that is saved."""
        pooled = F.linear(first, self.pooler.weight, self.pooler.bias).tanh_()
        return F.linear(pooled, self.classifier.weight, self.classifier.bias)


class EarlyExit(Executor):
    """The off-ramps, and the run through the layers that lets samples leave at them.

    In training mode the model runs as ever, its own last answer and loss. A call that asks for attentions or hidden
    states does so too: a sample that left has none.

    Args:
        width: of the hidden states.
        classes: of the answer.
        ramps: how many, one a layer but the last.
        threshold: entropy in nats below which a sample leaves, one number or one a ramp. 0 and less: none leaves.
        dropout: in the ramps, while they learn.
    """

    kind = "early-exit"

    def __init__(
        self, *, width: int, classes: int, ramps: int, threshold: float | int | Sequence[float | int], dropout: float
    ) -> None:
        super().__init__()
        self.sizes = {"width": width, "classes": classes, "ramps": ramps, "dropout": dropout}
        self.ramps = nn.ModuleList(OffRamp(width, classes, dropout) for _ in range(ramps))
        self.threshold = threshold
        self.learning: Backbone | None = None  # how the frozen layers run while the ramps learn

    @property
    def threshold(self) -> list[float]:
        """The entropy in nats below which a sample leaves, by ramp. May be set at any time."""
        return self._thresholds

    @threshold.setter
    def threshold(self, given: float | int | Sequence[float | int]) -> None:
        self._thresholds = _thresholds(given, len(self.ramps))

    def structure(self) -> dict[str, Any]:
        return {**self.sizes, "threshold": self.threshold}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "EarlyExit":  # noqa: ARG003 - it stands alone
        return cls(**structure)

    def run(self, model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        whole = classifier(model, "DeeBERT")
        if len(whole.layers) != len(self.ramps) + 1:
            raise FormwrightError(
                f"The model has {len(whole.layers)} layers and ramps for {len(self.ramps) + 1}: remove layers before "
                "deebert and not after it."
            )
        inputs = whole.inputs(*args, **kwargs)
        if inputs is None or (model.training and self.learning is None):
            return forward(*args, **kwargs)
        labels = inputs.pop("labels", None)
        if model.training:
            output = self.learn(whole, inputs, labels)
        elif whole.packs(inputs):
            output = self.leave_packed(whole, inputs, labels)
        else:
            output = self.leave(whole, inputs, labels)
        return output if kwargs.get("return_dict", True) else output.to_tuple()

    def leave(self, whole: Classifier, inputs: dict[str, Tensor], labels: Tensor | None) -> EarlyExitOutput:
        """Layer by layer; the rows of samples that left are taken out of the batch."""
        hidden = whole.embed(**inputs)
        mask = whole.mask(hidden, inputs.get("attention_mask"))
        left = torch.arange(len(hidden), device=hidden.device)  # which samples the rows of the batch are
        exits = torch.full_like(left, len(whole.layers))
        gone, said = [], []  # the samples in the order in which they left, and their answers
        for number, layer in enumerate(whole.layers, 1):
            hidden = layer(hidden, mask)
            if number == len(whole.layers):  # the model's own head answers, and no ramp
                gone.append(left)
                said.append(whole.head(hidden))
            elif self.threshold[number - 1] > 0:
                answers = self.ramps[number - 1](hidden)
                sure = entropy(answers) < self.threshold[number - 1]
                if not sure.any():
                    continue
                gone.append(left[sure])
                said.append(answers[sure])
                exits[left[sure]] = number
                if sure.all():
                    break
                rows = (~sure).nonzero().squeeze(1)
                left, hidden = left[rows], hidden[rows]
                mask = mask if mask is None else mask[rows]
        logits = torch.cat(said)[torch.argsort(torch.cat(gone))]
        loss = None if labels is None else whole.loss(logits, labels)
        return EarlyExitOutput(loss=loss, logits=logits, exit_layers=exits)

    def leave_packed(self, whole: Classifier, inputs: dict[str, Tensor], labels: Tensor | None) -> EarlyExitOutput:
        """The same on real tokens alone."""
        hidden, borders = whole.packed(**inputs)
        leaving = _Leaving(self, len(borders) - 1, hidden.device)
        hidden = packed_encoder(whole.base).run(hidden, borders, leaving)
        if len(leaving.left):  # the first tokens of those that stayed; the model's own head answers
            starts = sums(borders.diff()[leaving.left.cpu()])[:-1].to(hidden.device)
            leaving.answer(leaving.left, whole.head(hidden[starts][:, None]))
        logits = torch.cat(leaving.said)[torch.argsort(torch.cat(leaving.gone))]
        loss = None if labels is None else whole.loss(logits, labels)
        return EarlyExitOutput(loss=loss, logits=logits, exit_layers=leaving.exits)

    def learn(self, whole: Classifier, inputs: dict[str, Tensor], labels: Tensor | None) -> EarlyExitOutput:
        """The second stage: the ramps' losses, with the model under them frozen."""
        whole.model.train(self.learning == "train")
        self.train()
        answers = self.answers(whole, inputs)
        whole.model.train()
        loss = None if labels is None else sum(whole.loss(one, labels) for one in answers[:-1])
        return EarlyExitOutput(loss=loss, logits=answers[-1])

    def answers(self, whole: Classifier, inputs: dict[str, Tensor]) -> list[Float[Tensor, "b c"]]:
        """What every ramp says, and last the model's own head. No gradient reaches the model."""
        found = []
        with torch.no_grad():
            hidden = whole.embed(**inputs)
            mask = whole.mask(hidden, inputs.get("attention_mask"))
        for number, layer in enumerate(whole.layers):
            with torch.no_grad():
                hidden = layer(hidden, mask)
            if number < len(self.ramps):
                found.append(self.ramps[number](hidden))
        with torch.no_grad():
            return [*found, whole.head(hidden)]


class _Leaving(Policy):
    """Which texts leave a packed run, and what was said to them."""

    def __init__(self, ramps: EarlyExit, texts: int, device: torch.device) -> None:
        self.ramps, self.threshold = ramps.ramps, ramps.threshold
        self.left = torch.arange(texts, device=device)
        self.exits = torch.full_like(self.left, len(self.ramps) + 1)
        self.gone: list[Tensor] = []
        self.said: list[Tensor] = []

    def answer(self, texts: Int[Tensor, " some"], answers: Float[Tensor, "some c"]) -> None:
        self.gone.append(texts)
        self.said.append(answers)

    def after_layer(
        self, layer: int, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"]
    ) -> Bool[Tensor, " texts"] | None:
        if layer == len(self.ramps) or self.threshold[layer] <= 0 or not len(self.left):
            return None
        answers = self.ramps[layer].read(hidden[cu_seqlens[:-1].to(hidden.device)])
        sure = entropy(answers) < self.threshold[layer]
        if not sure.any():
            return None
        self.answer(self.left[sure], answers[sure])
        self.exits[self.left[sure]] = layer + 1
        self.left = self.left[~sure]
        return ~sure


class DeeBERT(Modifier):
    """Off-ramps after every layer but the last, trained with the model frozen.

    Args:
        threshold: the entropy in nats below which a sample leaves: one number, or one a ramp. With C classes ln C is
            the most there is, at which all leave after the first layer. `model.executor.threshold` changes it later.
        steps: of training the ramps; none = those of the data's settings, as for the two below.
        learning_rate: 2e-5 in the paper.
        batch_size: 8 in the paper.
        backbone: whether the frozen layers keep their dropout while the ramps learn: "eval" (no) or "train" (yes).
        pooler: folder of the model before fine-tuning, whose pooler the ramps start from.
    """

    trains = True

    def __init__(
        self,
        *,
        threshold: float | int | list[float | int] = 0.1,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        backbone: Backbone = "eval",
        pooler: str | None = None,
    ) -> None:
        if backbone not in get_args(Backbone):
            raise FormwrightError(f"backbone is {backbone!r}, but it must be eval or train.")
        _thresholds(threshold, len(threshold) if isinstance(threshold, list) else 1)
        self.threshold, self.backbone, self.pooler = threshold, backbone, pooler
        own = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size}
        self.settings = {name: value for name, value in own.items() if value is not None}

    def check(self, model: PreTrainedModel) -> None:
        layers = len(classifier(model, "DeeBERT").layers)
        if layers < 2:
            raise FormwrightError("DeeBERT needs two layers or more: with one there is nowhere to leave early.")
        if getattr(model, EXECUTOR, None) is not None:
            raise FormwrightError(f"The model is run by {model.executor.kind} already: leave deebert out.")
        _thresholds(self.threshold, layers - 1)

    def apply(self, model: PreTrainedModel) -> None:
        whole = classifier(model, "DeeBERT")
        config = model.config
        executor = EarlyExit(
            width=whole.width,
            classes=config.num_labels,
            ramps=len(whole.layers) - 1,
            threshold=self.threshold,
            dropout=getattr(config, "hidden_dropout_prob", None) or getattr(config, "dropout", 0.0),
        )
        start = self._pooler(whole)
        with torch.no_grad():
            for ramp in executor.ramps:
                ramp.classifier.weight.normal_(0.0, 0.02)
                ramp.classifier.bias.zero_()
                ramp.pooler.weight.copy_(start.weight)
                ramp.pooler.bias.copy_(start.bias)
        attach(model, executor.to(device=model.device, dtype=model.dtype).train(model.training))

    def _pooler(self, whole: Classifier) -> nn.Linear:
        """The matrix and bias the ramps' poolers start from."""
        if self.pooler is None:
            model = whole.model
            if whole.family == "bert":
                found = model.bert.pooler.dense
            else:
                found = model.pre_classifier if whole.family == "distilbert" else model.classifier.dense
            whence = "the model"
        else:
            try:
                found = getattr(getattr(AutoModel.from_pretrained(self.pooler), "pooler", None), "dense", None)
            except (OSError, ValueError) as wrong:
                raise FormwrightError(f"pooler is {self.pooler!r}, which holds no model: give its folder.") from wrong
            whence = self.pooler
        if getattr(getattr(found, "weight", None), "shape", None) != (whole.width, whole.width):
            raise FormwrightError(
                f"{whence} holds no pooler of width {whole.width} for the off-ramps to start from: "
                "name the folder of a model that does as pooler."
            )
        return found

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.requires_grad_(False)
        model.executor.requires_grad_(True)
        model.executor.learning = self.backbone
        try:
            fit(model, data.task, replace(data.settings, **self.settings))
        finally:
            model.executor.learning = None
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)


def _thresholds(given: float | int | Sequence[float | int], ramps: int) -> list[float]:
    one = isinstance(given, int | float) and not isinstance(given, bool)
    values = [given] * ramps if one else list(given) if isinstance(given, list | tuple) else []
    if len(values) != ramps or not all(isinstance(v, int | float) and v == v for v in values):
        raise FormwrightError(
            f"threshold is {given!r}, but it must be an entropy in nats, or a list of {ramps}, one for each layer "
            "but the last."
        )
    return [float(value) for value in values]
