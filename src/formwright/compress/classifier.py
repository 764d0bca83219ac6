"""An encoder with a classification head, taken apart: embeddings, layers, the two halves of a layer, and the head.

What early exit and token pruning run one after the other, on the user's own modules. Families: BERT, RoBERTa, ELECTRA
and DistilBERT, each with its own names for the same things.
"""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from formwright.compress.runtime import encoders
from formwright.compress.runtime.packed import packed_encoder, runs_packed, sums
from formwright.compress.structure import PREFIX
from formwright.errors import FormwrightError

FAMILIES = ("bert", "roberta", "electra", "distilbert")
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


@cache
def _signature(source: type[PreTrainedModel]) -> inspect.Signature:
    return inspect.signature(source.forward)


@dataclass(frozen=True)
class Classifier:
    """A view of a model; it holds nothing of its own. Made by `classifier`."""

    model: PreTrainedModel
    family: str

    @property
    def base(self) -> nn.Module:
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.transformer.layer if self.family == "distilbert" else self.base.encoder.layer

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """The arguments of a call to the model by name; None when it asks for more than logits and a loss."""
        bound = _signature(type(self.model)._source).bind(self.model, *args, **kwargs).arguments
        given = {name: value for name, value in bound.items() if name not in ("self", "kwargs") and value is not None}
        given |= {name: value for name, value in bound.get("kwargs", {}).items() if value not in (None, False)}
        given.pop("return_dict", None)
        mask = given.get("attention_mask")
        known = set(given) <= {*INPUTS, "labels"} and (mask is None or mask.ndim == 2)
        return given if known else None

    def embed(self, **inputs: Tensor) -> Float[Tensor, "b n d"]:
        """What the first layer reads."""
        inputs.pop("attention_mask", None)
        if self.family == "distilbert":  # no token types; the name of the ids must be given
            inputs.pop("token_type_ids", None)
            inputs.setdefault("input_ids", None)
        hidden = self.base.embeddings(**inputs)
        project = getattr(self.base, "embeddings_project", None)
        return hidden if project is None else project(hidden)

    def packs(self, inputs: dict[str, Any]) -> bool:
        """Whether a call can run on real tokens alone: nobody asks for gradients, and the layers are the family's."""
        if torch.is_grad_enabled() or self.model.training or not torch.is_tensor(inputs.get("input_ids")):
            return False
        return runs_packed(self.base) and not packed_encoder(self.base).hooked()

    def packed(self, **inputs: Tensor) -> tuple[Float[Tensor, "t d"], Int[Tensor, " s"]]:
        """What the first layer reads of the real tokens, one text after the other, and where texts begin."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        places = real.flatten().nonzero().squeeze(1)
        return encoders.embed(self.base, self.family, inputs, places), sums(real.sum(1).cpu())

    def mask(self, hidden: Float[Tensor, "b n d"], attention_mask: Int[Tensor, "b n"] | None) -> Any:
        """The mask as the model's own attention reads it."""
        return create_bidirectional_mask(config=self.base.config, inputs_embeds=hidden, attention_mask=attention_mask)

    def attention(self, layer: nn.Module) -> tuple[nn.Module, tuple[nn.Module, nn.Module, nn.Module]]:
        """The module of a layer's attention, and its projections of queries, keys and values.

        Raises:
            FormwrightError: the layer holds no attention of its family any more.
        """
        try:
            if self.family == "distilbert":
                own = layer.attention
                return own, (own.q_lin, own.k_lin, own.v_lin)
            own = layer.attention.self
            return own, (own.query, own.key, own.value)
        except AttributeError as wrong:
            raise FormwrightError(
                f"A layer of this model holds no attention of its own any more ({wrong}): take another order of steps."
            ) from wrong

    def attend(
        self, layer: nn.Module, hidden: Float[Tensor, "b n d"], live: Bool[Tensor, "b n"], *, dropped: bool = False
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b h n n"]]:
        """The first half of a layer, and its probabilities before or after dropout; keys that are not live are
        hidden."""
        own, projections = self.attention(layer)
        q, k, v = (make(hidden).unflatten(-1, (-1, own.attention_head_size)).transpose(1, 2) for make in projections)
        scores = (q @ k.mT) * own.scaling
        scores = scores.masked_fill(~live[:, None, None, :], torch.finfo(scores.dtype).min)
        before = scores.softmax(-1)
        after = own.dropout(before)
        mixed = (after.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        read = after if dropped else before
        if self.family == "distilbert":
            return layer.sa_layer_norm(own.out_lin(mixed) + hidden), read
        return layer.attention.output(mixed, hidden), read

    def widths(self, layer: nn.Module) -> tuple[int, int]:
        """Of a layer's values over all heads, and of its feed-forward."""
        _, (_, _, values) = self.attention(layer)
        first = layer.ffn.lin1 if self.family == "distilbert" else layer.intermediate.dense
        return values.out_features, first.out_features

    def feed(self, layer: nn.Module, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The second half of a layer."""
        if self.family == "distilbert":
            return layer.output_layer_norm(layer.ffn(hidden) + hidden)
        return layer.feed_forward_chunk(hidden)

    def head(self, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b c"]:
        """The model's own classification of what its last layer gave."""
        model = self.model
        if self.family == "bert":
            return model.classifier(model.dropout(model.bert.pooler(hidden)))
        if self.family == "distilbert":
            return model.classifier(model.dropout(F.relu(model.pre_classifier(hidden[:, 0]))))
        return model.classifier(hidden)

    def loss(self, logits: Float[Tensor, "b c"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        return F.cross_entropy(logits, labels.to(logits.device).view(-1))


def classifier(model: nn.Module, method: str) -> Classifier:
    """A text classifier of one of the families above.

    Args:
        method: what asks, for the message.

    Raises:
        FormwrightError: another family, another head, or a head whose answer is no class.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__).removeprefix(PREFIX)
    if family not in FAMILIES:
        raise FormwrightError(f"{method} knows {', '.join(FAMILIES)} and not {family}: choose another method.")
    if not any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__):
        raise FormwrightError(
            f"{method} works on a classifier of whole texts and {type(model).__name__} is none: load the model with "
            "AutoModelForSequenceClassification."
        )
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise FormwrightError(
            f"{method} needs one answer out of two or more classes, but this model has {config.num_labels} outputs "
            f"of the kind {config.problem_type or 'regression'}: choose another method."
        )
    if getattr(config, "is_decoder", False):
        raise FormwrightError(f"{method} works on encoders and this model is set to is_decoder: choose another method.")
    return Classifier(model, family)
