"""Trained weights of transformers' own models in ours: the same function, from our parts.

`from_transformers(model)` takes a BERT, RoFormer or GPT-2 (bare or with a head we have) and gives the Transformer that
computes the same. Our model can then be changed part by part, which the original cannot. One thing differs: where
padding stands on the left and no position_ids are given, theirs count the padding and ours the real tokens. `generate`
gives position_ids to both. Dropout before BERT's classifier is left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from formwright.errors import FormwrightError
from formwright.models.text.roformer import roformer_config
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForMaskedLM,
    TransformerForSequenceClassification,
    TransformerModel,
    TransformerPreTrainedModel,
)

Weights = dict[str, Tensor]


def from_transformers(model: PreTrainedModel) -> TransformerPreTrainedModel:
    """The same function as `model`, built from our parts, in the same dtype, on the same device and in the same mode.

    Raises:
        FormwrightError: a family or head that has no counterpart here, or an option of it that changes the function.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise FormwrightError(
            f"{type(model).__name__} cannot be converted: the families known are {', '.join(FAMILIES)}."
        )
    return FAMILIES[family](model)


def _filled(
    kind: type[TransformerPreTrainedModel], config: TransformerConfig, weights: Weights, like: PreTrainedModel
) -> TransformerPreTrainedModel:
    """A model of ours holding the weights; every one must find its place and every place its weight."""
    ours = kind(config).to(like.dtype)
    bare = kind is TransformerModel
    weights = {name.removeprefix("model.") if bare else name: value.clone() for name, value in weights.items()}
    if not bare and "lm_head.weight" in ours.state_dict() and config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embeddings.tokens.weight"]
    ours.load_state_dict(weights)
    ours.tie_weights()
    return ours.to(like.device).train(like.training)


def _stacked(linears: list[nn.Linear]) -> tuple[Tensor, Tensor]:
    return torch.cat([linear.weight for linear in linears]), torch.cat([linear.bias for linear in linears])


def _same(weights: Weights, name: str, module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        weights[f"{name}.{key}"] = value


ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise FormwrightError(f"No feed-forward layer here uses {name!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


@torch.no_grad()
def _from_bert(model: PreTrainedModel) -> TransformerPreTrainedModel:
    theirs = model.config
    if theirs.is_decoder:
        raise FormwrightError("This BERT is a decoder (is_decoder=True); only the encoder has a counterpart here.")
    heads = {
        "BertModel": TransformerModel,
        "BertForMaskedLM": TransformerForMaskedLM,
        "BertForSequenceClassification": TransformerForSequenceClassification,
    }
    kind = _head(model, heads)
    body = model if kind is TransformerModel else model.bert
    config = TransformerConfig(
        architecture="encoder",
        vocab_size=theirs.vocab_size,
        type_vocab_size=theirs.type_vocab_size,
        hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
        max_position_embeddings=theirs.max_position_embeddings,
        mixer={"name": "softmax", "dropout": theirs.attention_probs_dropout_prob},
        position="learned",
        feedforward=_activation(theirs.hidden_act),
        norm={"name": "layernorm", "eps": theirs.layer_norm_eps},
        block="post",
        embedding_norm=True,
        dropout=theirs.hidden_dropout_prob,
        pooling="first",
        pooler=kind is TransformerForSequenceClassification,
        head_transform=kind is TransformerForMaskedLM,
        lm_head_bias=kind is TransformerForMaskedLM,
        tie_word_embeddings=theirs.tie_word_embeddings,
        pad_token_id=theirs.pad_token_id,
        id2label=theirs.id2label,
        label2id=theirs.label2id,
        problem_type=theirs.problem_type,
    )
    weights: Weights = {}
    _same(weights, "model.embeddings.tokens", body.embeddings.word_embeddings)
    _same(weights, "model.embeddings.types", body.embeddings.token_type_embeddings)
    weights["model.encoder.position.weight"] = body.embeddings.position_embeddings.weight
    _same(weights, "model.encoder.embedding_norm", body.embeddings.LayerNorm)
    _bert_layers(weights, body)
    if kind is TransformerForSequenceClassification:
        _same(weights, "pooler", model.bert.pooler.dense)
        _same(weights, "classifier", model.classifier)
    if kind is TransformerForMaskedLM:
        _bert_language_head(weights, model.cls.predictions)
    return _filled(kind, config, weights, model)


def _bert_layers(weights: Weights, body: PreTrainedModel) -> None:
    """The layers of BERT and of what was made from it."""
    for i, layer in enumerate(body.encoder.layer):
        block, attention = f"model.encoder.layers.{i}.block", layer.attention.self
        weight, bias = _stacked([attention.query, attention.key, attention.value])
        weights[f"{block}.mixer.query_key_value.weight"], weights[f"{block}.mixer.query_key_value.bias"] = weight, bias
        _same(weights, f"{block}.mixer.out", layer.attention.output.dense)
        _same(weights, f"{block}.mixer_norm", layer.attention.output.LayerNorm)
        _same(weights, f"{block}.feedforward.up", layer.intermediate.dense)
        _same(weights, f"{block}.feedforward.down", layer.output.dense)
        _same(weights, f"{block}.feedforward_norm", layer.output.LayerNorm)


def _bert_language_head(weights: Weights, predictions: nn.Module) -> None:
    _same(weights, "transform.0", predictions.transform.dense)
    _same(weights, "transform.2", predictions.transform.LayerNorm)
    _same(weights, "lm_head", predictions.decoder)


@torch.no_grad()
def _from_roformer(model: PreTrainedModel) -> TransformerPreTrainedModel:
    theirs = model.config
    if theirs.is_decoder or theirs.rotary_value or theirs.embedding_size != theirs.hidden_size:
        raise FormwrightError(
            "This RoFormer is a decoder, turns its values (rotary_value=True) or has an embedding_size of its own; "
            "only the plain encoder has a counterpart here."
        )
    if theirs.hidden_act != "gelu" or theirs.layer_norm_eps != 1e-12:
        raise FormwrightError(
            f"This RoFormer has hidden_act={theirs.hidden_act!r} and layer_norm_eps={theirs.layer_norm_eps}; the one "
            "here has gelu and 1e-12."
        )
    kind = _head(model, {"RoFormerModel": TransformerModel, "RoFormerForMaskedLM": TransformerForMaskedLM})
    body = model if kind is TransformerModel else model.roformer
    config = roformer_config(
        vocab_size=theirs.vocab_size,
        type_vocab_size=theirs.type_vocab_size,
        hidden_size=theirs.hidden_size,
        num_hidden_layers=theirs.num_hidden_layers,
        num_attention_heads=theirs.num_attention_heads,
        intermediate_size=theirs.intermediate_size,
        max_position_embeddings=theirs.max_position_embeddings,
        dropout=theirs.hidden_dropout_prob,
        attention_dropout=theirs.attention_probs_dropout_prob,
        pad_token_id=theirs.pad_token_id,
    )
    config.tie_word_embeddings = theirs.tie_word_embeddings
    weights: Weights = {}
    _same(weights, "model.embeddings.tokens", body.embeddings.word_embeddings)
    _same(weights, "model.embeddings.types", body.embeddings.token_type_embeddings)
    _same(weights, "model.encoder.embedding_norm", body.embeddings.LayerNorm)
    _bert_layers(weights, body)
    if kind is TransformerForMaskedLM:
        _bert_language_head(weights, model.cls.predictions)
    return _filled(kind, config, weights, model)


@torch.no_grad()
def _from_gpt2(model: PreTrainedModel) -> TransformerPreTrainedModel:
    theirs = model.config
    if theirs.scale_attn_by_inverse_layer_idx or not theirs.scale_attn_weights or theirs.add_cross_attention:
        raise FormwrightError(
            "This GPT-2 scales its attention by the layer, not at all, or reads an encoder; only the plain one has a "
            "counterpart here."
        )
    kind = _head(model, {"GPT2Model": TransformerModel, "GPT2LMHeadModel": TransformerForCausalLM})
    body = model if kind is TransformerModel else model.transformer
    if not theirs.embd_pdrop == theirs.resid_pdrop:
        raise FormwrightError(
            f"This GPT-2 drops {theirs.embd_pdrop} of the embeddings but {theirs.resid_pdrop} of the residuals; ours "
            "knows one rate: set both alike in its config first."
        )
    config = TransformerConfig(
        architecture="decoder",
        vocab_size=theirs.vocab_size,
        hidden_size=theirs.n_embd,
        num_hidden_layers=theirs.n_layer,
        num_attention_heads=theirs.n_head,
        intermediate_size=theirs.n_inner or 4 * theirs.n_embd,
        max_position_embeddings=theirs.n_positions,
        mixer={"name": "softmax", "dropout": theirs.attn_pdrop},
        position="learned",
        feedforward=_activation(theirs.activation_function),
        norm={"name": "layernorm", "eps": theirs.layer_norm_epsilon},
        block="pre",
        dropout=theirs.resid_pdrop,
        pad_token_id=theirs.pad_token_id,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        tie_word_embeddings=theirs.tie_word_embeddings,
    )
    weights: Weights = {}
    _same(weights, "model.embeddings.tokens", body.wte)
    weights["model.decoder.position.weight"] = body.wpe.weight
    for i, layer in enumerate(body.h):
        block = f"model.decoder.layers.{i}.block"
        _same(weights, f"{block}.mixer_norm", layer.ln_1)
        _same(weights, f"{block}.feedforward_norm", layer.ln_2)
        matrices = {
            "mixer.query_key_value": layer.attn.c_attn,
            "mixer.out": layer.attn.c_proj,
            "feedforward.up": layer.mlp.c_fc,
            "feedforward.down": layer.mlp.c_proj,
        }
        for name, matrix in matrices.items():  # theirs are stored (in, out)
            weights[f"{block}.{name}.weight"], weights[f"{block}.{name}.bias"] = matrix.weight.T, matrix.bias
    _same(weights, "model.decoder.norm", body.ln_f)
    if kind is TransformerForCausalLM and not theirs.tie_word_embeddings:
        _same(weights, "lm_head", model.lm_head)
    return _filled(kind, config, weights, model)


def _head(
    model: PreTrainedModel, heads: dict[str, type[TransformerPreTrainedModel]]
) -> type[TransformerPreTrainedModel]:
    name = type(model).__name__
    if name not in heads:
        raise FormwrightError(f"{name} has no counterpart here; there are ones for {', '.join(heads)}.")
    return heads[name]


FAMILIES: dict[str, Callable[[PreTrainedModel], TransformerPreTrainedModel]] = {
    "bert": _from_bert,
    "roformer": _from_roformer,
    "gpt2": _from_gpt2,
}
