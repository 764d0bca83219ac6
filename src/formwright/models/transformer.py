"""The configurable Transformer: encoder, decoder or encoder-decoder, from parts named in a config.

A config names a part for every slot; a list repeats over the layers, so `mixer=["mamba", "mamba", "softmax"]` is two
Mamba layers to one of attention. Every model here is an ordinary Hugging Face model: Auto classes, generate, Trainer,
pipelines, safetensors. The config is in `config`, the body in `body`; here are the heads, and the registration with
the Auto classes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from formwright.build import build
from formwright.errors import FormwrightError
from formwright.models.body import TransformerModel, TransformerOutput, TransformerPreTrainedModel
from formwright.models.config import TransformerConfig
from formwright.models.generation import Generates
from formwright.ops.linear import project

__all__ = [
    "TransformerConfig",
    "TransformerForCausalLM",
    "TransformerForConditionalGeneration",
    "TransformerForImageClassification",
    "TransformerForMaskedLM",
    "TransformerForSequenceClassification",
    "TransformerForTokenClassification",
    "TransformerHeadOutput",
    "TransformerModel",
    "TransformerPreTrainedModel",
]


@dataclass
class TransformerHeadOutput(ModelOutput):
    """What a model with a head gives. `loss` includes the parts' extra losses in training and is the task's alone in
    evaluation. Of an encoder-decoder, `hidden_states` and `attentions` are the decoder's.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    extra_losses: dict[str, Tensor] | None = None

    @property
    def decoder_hidden_states(self) -> tuple[Tensor, ...] | None:
        """What transformers' generate calls those of an encoder-decoder."""
        return self.hidden_states

    @property
    def decoder_attentions(self) -> tuple[Tensor, ...] | None:
        """What transformers' generate calls those of an encoder-decoder."""
        return self.attentions


class _Head(TransformerPreTrainedModel):
    """What the models with a head share: the body, the Auto-facing names and the sum of losses."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.model = TransformerModel(config)
        self.lower: nn.Linear | None = None

    def _add_language_head(self) -> None:
        """`lm_head`; where it is tied to narrow embeddings, `lower` comes before it."""
        config, width = self.config, self.config.hidden_size
        if config.tie_word_embeddings and config.embedding_size != width:
            width = config.embedding_size
            self.lower = nn.Linear(config.hidden_size, width)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=config.lm_head_bias)

    @property
    def main_input_name(self) -> str:
        return self.model.main_input_name

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def _read(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """What a language model's head reads: at the width of the embeddings it is tied to, times a constant where the
        initialisation scheme has one.
        """
        x = x if self.lower is None else project(self.lower, x)
        factor = getattr(self._scheme, "tied_factor", 1.0) if self.config.tie_word_embeddings else 1.0
        return x if factor == 1 else x * factor

    def _output(self, body: TransformerOutput, logits: Tensor, loss: Tensor | None) -> TransformerHeadOutput:
        if loss is not None and self.training and body.extra_losses:
            loss = loss + sum(body.extra_losses.values())
        return TransformerHeadOutput(
            loss=loss,
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            cross_attentions=body.cross_attentions,
            encoder_last_hidden_state=body.encoder_last_hidden_state,
            extra_losses=body.extra_losses,
        )


def token_loss(logits: Float[Tensor, "b n c"], labels: Int[Tensor, "b n"]) -> Float[Tensor, ""]:
    """Mean cross-entropy over the tokens whose label is not -100."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class TransformerForCausalLM(_Head, Generates, GenerationMixin):
    """Next-token prediction: logits (b, n, vocab); labels are the ids themselves, shifted here."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.tokens.weight"}

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture != "decoder":
            raise FormwrightError(f"A causal language model is a decoder, got architecture={config.architecture!r}.")
        super().__init__(config)
        self._add_language_head()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> TransformerHeadOutput:
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        x = body.last_hidden_state
        kept_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        logits = project(self.lm_head, self._read(x if kept_all else x[:, kept]))
        loss = None
        if labels is not None:
            loss = token_loss(logits, F.pad(labels[:, 1:], (0, 1), value=-100))
        return self._output(body, logits, loss)


class TransformerForConditionalGeneration(_Head, Generates, GenerationMixin):
    """Sequence to sequence: logits (b, t, vocab); decoder inputs are the labels moved one place to the right unless
    given. Hidden states and attentions are the decoder's alone.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.tokens.weight"}

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture != "encoder-decoder":
            raise FormwrightError(
                f"A sequence-to-sequence model is an encoder-decoder, got architecture={config.architecture!r}."
            )
        super().__init__(config)
        self._add_language_head()
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """The labels one place to the right, behind the start token; ignored labels become the padding id.

        Raises:
            FormwrightError: the config names no decoder_start_token_id, or labels are ignored and it names no
                pad_token_id.
        """
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None:
            raise FormwrightError("Set decoder_start_token_id in the config: the decoder's first token.")
        moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        if pad is None and bool((moved == -100).any()):
            raise FormwrightError("Set pad_token_id in the config: some labels are ignored (-100).")
        return moved if pad is None else moved.masked_fill(moved == -100, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        pixel_values: Float[Tensor, "b c h w"] | None = None,
        decoder_input_ids: Int[Tensor, "b t"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int = 0,
    ) -> TransformerHeadOutput:
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            encoder_outputs=encoder_outputs,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        x = body.last_hidden_state
        logits = project(self.lm_head, self._read(x[:, -logits_to_keep:] if logits_to_keep else x))
        return self._output(body, logits, None if labels is None else token_loss(logits, labels))


class TransformerForMaskedLM(_Head):
    """The token behind every mask: logits (b, n, vocab); labels are ids, -100 where nothing is asked."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.tokens.weight"}

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture != "encoder":
            raise FormwrightError(f"A masked language model is an encoder, got architecture={config.architecture!r}.")
        super().__init__(config)
        self.transform = (
            nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.GELU(),
                build("norm", config.norm, dim=config.hidden_size),
            )
            if config.head_transform
            else nn.Identity()
        )
        self._add_language_head()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TransformerHeadOutput:
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = project(self.lm_head, self._read(self.transform(body.last_hidden_state)))
        return self._output(body, logits, None if labels is None else token_loss(logits, labels))


class TransformerForTokenClassification(_Head):
    """A label for every token: logits (b, n, labels); label t belongs to token t, -100 where nothing is asked."""

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture == "encoder-decoder":
            raise FormwrightError("Tokens are classified by an encoder or a decoder; set architecture to one of these.")
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TransformerHeadOutput:
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **({} if self.model.decoder is None else {"use_cache": False}),
        )
        logits = self.classifier(body.last_hidden_state)
        return self._output(body, logits, None if labels is None else token_loss(logits, labels))


class _Classifies(_Head):
    """Pooling, an optional pooler and a classifier or regressor over the pooled token."""

    def __init__(self, config: TransformerConfig) -> None:
        if config.architecture == "encoder-decoder":
            raise FormwrightError(
                "A classifier is an encoder or a decoder; an encoder-decoder has no one sequence to pool."
            )
        super().__init__(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if config.pooler else None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _classified(self, body: TransformerOutput, mask: Tensor | None, labels: Tensor | None) -> TransformerHeadOutput:
        x = pool(body.last_hidden_state, mask, self.config.pooling)
        if self.pooler is not None:
            x = self.pooler(x).tanh()
        logits = self.classifier(x)
        return self._output(body, logits, None if labels is None else self._loss(logits, labels))

    def _loss(self, logits: Float[Tensor, "b c"], labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            one_label = labels.dtype in (torch.long, torch.int)
            kind = "single_label_classification" if one_label else "multi_label_classification"
            kind = "regression" if self.config.num_labels == 1 else kind
        if kind == "regression":
            return F.mse_loss(logits.view_as(labels).float(), labels.float())
        if kind == "single_label_classification":
            return F.cross_entropy(logits.float(), labels)
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())


def pool(x: Float[Tensor, "b n d"], mask: Tensor | None, how: str) -> Float[Tensor, "b d"]:
    """One token for a sequence: the mean of the real ones, the first or the last real one."""
    if mask is None:
        return {"mean": lambda: x.mean(1), "first": lambda: x[:, 0], "last": lambda: x[:, -1]}[how]()
    real = mask.to(x.dtype)
    if how == "mean":
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(x.shape[1], device=x.device) * mask.bool()
    index = mask.long().argmax(1) if how == "first" else places.argmax(1)
    return x[torch.arange(x.shape[0], device=x.device), index]


class TransformerForSequenceClassification(_Classifies):
    """A class, several classes or numbers for a sequence: logits (b, labels), by `problem_type` as everywhere in
    transformers.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TransformerHeadOutput:
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **({} if self.model.decoder is None else {"use_cache": False}),
        )
        return self._classified(body, attention_mask, labels)


class TransformerForImageClassification(_Classifies):
    """A class for an image: pixel_values (b, c, h, w) -> logits (b, labels)."""

    def __init__(self, config: TransformerConfig) -> None:
        if not config.image_size:
            raise FormwrightError("An image classifier needs image_size in its config.")
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Float[Tensor, "b c h w"] | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TransformerHeadOutput:
        body = self.model(
            pixel_values=pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            **({} if self.model.decoder is None else {"use_cache": False}),
        )
        return self._classified(body, None, labels)


AutoConfig.register(TransformerConfig.model_type, TransformerConfig)
for _auto, _model in (
    (AutoModel, TransformerModel),
    (AutoModelForCausalLM, TransformerForCausalLM),
    (AutoModelForSeq2SeqLM, TransformerForConditionalGeneration),
    (AutoModelForMaskedLM, TransformerForMaskedLM),
    (AutoModelForTokenClassification, TransformerForTokenClassification),
    (AutoModelForSequenceClassification, TransformerForSequenceClassification),
    (AutoModelForImageClassification, TransformerForImageClassification),
):
    _auto.register(TransformerConfig, _model)
