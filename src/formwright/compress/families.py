"""The families of models compression knows, as data: where each keeps its parts.

A family is one `Family`, its paths relative to what holds them, in the table at the end; `register_family` adds
another. In a path `a|b` means a, or b where there is no a: variants of one family differ in such names.
`formwright.compress.anatomy.describe` reads a model by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from formwright.errors import FormwrightError

Fused = Literal["blocks", "heads"]  # all queries, all keys, all values; or head by head its query, key and value


@dataclass(frozen=True, kw_only=True)
class AttentionDescription:
    """Paths from the layer. Either query, key and value, or `fused` (with `query` apart: keys and values are fused).

    Args:
        module: what runs the attention and keeps the attributes below.
        head_dim: its attribute with the width of a head.
        counts: further attributes that follow the number of heads, as "heads" or "width".
        skip: what a skipped attention replaces: the module itself, whose part of the residual sum is then zero, or a
            module around it that adds the residual too.
        residual: `skip` adds the residual.
        hands_on: what `skip` replaces also hands the position bias on to the next layer.
        after: modules that scale what the attention gives.
        bias: from the stack: a position bias whose heads are columns.
    """

    module: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    layout: Fused = "blocks"
    output: str
    head_dim: str
    counts: Mapping[str, str] = field(default_factory=dict)
    norm: str | None
    skip: str | None = None
    residual: bool = False
    hands_on: bool = False
    after: tuple[str, ...] = ()
    bias: str | None = None


@dataclass(frozen=True, kw_only=True)
class FeedForwardDescription:
    """Paths from the layer.

    Args:
        activation: the attribute of the config that names it.
        gated: the activation where there is a gate, if the config does not say.
        counts: attributes that hold the width.
    """

    up: str
    gate: str | None = None
    down: str
    activation: str
    gated: str | None = None
    counts: tuple[str, ...] = ()
    norm: str | None


@dataclass(frozen=True, kw_only=True)
class StackDescription:
    """Paths of the layers (from the base) and of what is in one. `norm_first` may name an attribute of the config."""

    layers: str
    attention: AttentionDescription
    cross: AttentionDescription | None = None
    feedforward: FeedForwardDescription
    norm_first: bool | str
    causal: bool | str = False
    final_norm: str | None = None
    count: str = "num_hidden_layers"
    shared: str | None = None  # the ModuleList in each entry of `layers`, where `count` says how often layers run


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models; paths from the base. `heads` are for heads that sit in the base itself."""

    stacks: tuple[StackDescription, ...]
    token: str | None
    position: str | None = None
    type: str | None = None
    pooler: str | None = None
    heads: tuple[str, ...] = ()


_families: dict[str, Family] = {}


def register_family(model_type: str, family: Family) -> None:
    """Describe a family, by the `model_type` of its config.

    Raises:
        FormwrightError: it is known already.
    """
    if model_type in _families:
        raise FormwrightError(f"The family {model_type} is described already: leave this description out.")
    _families[model_type] = family


def families() -> tuple[str, ...]:
    """The families that are described."""
    return tuple(sorted(_families))


def family_called(model_type: str) -> Family:
    """The description of a family.

    Raises:
        FormwrightError: there is none.
    """
    if model_type not in _families:
        raise FormwrightError(
            f"The family {model_type!r} is not described; known are {', '.join(families())}. Say where its parts are "
            "with formwright.compress.families.register_family."
        )
    return _families[model_type]


# The families

_BERT = StackDescription(
    layers="encoder.layer",
    attention=AttentionDescription(
        module="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        head_dim="attention_head_size",
        counts={"num_attention_heads": "heads", "all_head_size": "width"},
        norm="attention.output.LayerNorm",
        skip="attention",
        residual=True,
    ),
    cross=AttentionDescription(
        module="crossattention.self",
        query="crossattention.self.query",
        key="crossattention.self.key",
        value="crossattention.self.value",
        output="crossattention.output.dense",
        head_dim="attention_head_size",
        counts={"num_attention_heads": "heads", "all_head_size": "width"},
        norm="crossattention.output.LayerNorm",
    ),
    feedforward=FeedForwardDescription(
        up="intermediate.dense", down="output.dense", activation="hidden_act", norm="output.LayerNorm"
    ),
    norm_first=False,
    causal="is_decoder",
)


def _bert(stack: StackDescription = _BERT, **changed: str | None) -> Family:
    paths: dict[str, str | None] = {
        "token": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "type": "embeddings.token_type_embeddings",
        "pooler": "pooler",
    }
    return Family(stacks=(stack,), **{**paths, **changed})  # type: ignore[arg-type]


def _projections(module: str, names: str = "q_proj k_proj v_proj out_proj", **changed: object) -> AttentionDescription:
    """The four projections inside the module."""
    query, key, value, output = (f"{module}.{name}" for name in names.split())
    given: dict[str, object] = {
        "counts": {"num_heads": "heads"},
        "head_dim": "head_dim",
        "query": query,
        "key": key,
        "value": value,
        "output": output,
    }
    return AttentionDescription(module=module, **{**given, **changed})  # type: ignore[arg-type]


_VIT = Family(
    stacks=(
        StackDescription(
            layers="layers",
            attention=_projections(
                "attention",
                "q_proj k_proj v_proj o_proj",
                counts={"num_attention_heads": "heads"},
                norm="layernorm_before",
            ),
            feedforward=FeedForwardDescription(
                up="mlp.fc1", down="mlp.fc2", activation="hidden_act", norm="layernorm_after"
            ),
            norm_first=True,
            final_norm="layernorm",
        ),
    ),
    token="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    pooler="pooler",
)

_LLAMA = Family(
    stacks=(
        StackDescription(
            layers="layers",
            attention=_projections(
                "self_attn",
                "q_proj k_proj v_proj o_proj",
                counts={},
                norm="input_layernorm",
            ),
            feedforward=FeedForwardDescription(
                up="mlp.up_proj",
                gate="mlp.gate_proj",
                down="mlp.down_proj",
                activation="hidden_act",
                counts=("mlp.intermediate_size",),
                norm="post_attention_layernorm",
            ),
            norm_first=True,
            causal=True,
            final_norm="norm",
        ),
    ),
    token="embed_tokens",
)

_FAIRSEQ = StackDescription(
    layers="decoder.layers",
    attention=_projections("self_attn", norm="self_attn_layer_norm"),
    feedforward=FeedForwardDescription(up="fc1", down="fc2", activation="activation_function", norm="final_layer_norm"),
    norm_first=True,
    final_norm="layer_norm|final_layer_norm",
)

_T5 = StackDescription(
    layers="encoder.block",
    attention=_projections(
        "layer.0.SelfAttention",
        "q k v o",
        head_dim="key_value_proj_dim",
        counts={"n_heads": "heads", "inner_dim": "width"},
        norm="layer.0.layer_norm",
        skip="layer.0",
        residual=True,
        hands_on=True,
        bias="block.0.layer.0.SelfAttention.relative_attention_bias",
    ),
    feedforward=FeedForwardDescription(
        up="layer.1.DenseReluDense.wi|layer.1.DenseReluDense.wi_1",
        gate="layer.1.DenseReluDense.wi_0",
        down="layer.1.DenseReluDense.wo",
        activation="dense_act_fn",
        norm="layer.1.layer_norm",
    ),
    norm_first=True,
    final_norm="final_layer_norm",
    count="num_layers",
)

for _name, _family in {
    "bert": _bert(),
    "roberta": _bert(),
    "electra": _bert(),
    "distilbert": _bert(
        replace(
            _BERT,
            layers="transformer.layer",
            attention=_projections(
                "attention",
                "q_lin k_lin v_lin out_lin",
                head_dim="attention_head_size",
                counts={"n_heads": "heads"},
                norm="sa_layer_norm",
            ),
            cross=None,
            feedforward=FeedForwardDescription(
                up="ffn.lin1", down="ffn.lin2", activation="activation", norm="output_layer_norm"
            ),
            causal=False,
        ),
        type=None,
        pooler=None,
    ),
    "mpnet": _bert(
        replace(
            _BERT,
            attention=_projections(
                "attention.attn",
                "q k v o",
                head_dim="attention_head_size",
                counts={"num_attention_heads": "heads", "all_head_size": "width"},
                norm="attention.LayerNorm",
                skip="attention",
                residual=True,
                bias="relative_attention_bias",
            ),
            cross=None,
            causal=False,
        ),
        type=None,
    ),
    "albert": _bert(
        replace(
            _BERT,
            layers="encoder.albert_layer_groups",
            shared="albert_layers",
            attention=_projections(
                "attention",
                "query key value dense",
                head_dim="attention_head_size",
                counts={"num_attention_heads": "heads", "all_head_size": "width"},
                norm="attention.LayerNorm",
                skip="attention",
                residual=True,
            ),
            cross=None,
            feedforward=FeedForwardDescription(
                up="ffn", down="ffn_output", activation="hidden_act", norm="full_layer_layer_norm"
            ),
            causal=False,
        ),
    ),
    "modernbert": Family(
        stacks=(
            StackDescription(
                layers="layers",
                attention=AttentionDescription(
                    module="attn", fused="attn.Wqkv", output="attn.Wo", head_dim="head_dim", norm="attn_norm"
                ),
                feedforward=FeedForwardDescription(
                    up="mlp.Wi", gate="mlp.Wi", down="mlp.Wo", activation="hidden_activation", norm="mlp_norm"
                ),
                norm_first=True,
                final_norm="final_norm",
            ),
        ),
        token="embeddings.tok_embeddings",
    ),
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": Family(
        stacks=(
            StackDescription(
                layers="encoder.layer",
                attention=_projections(
                    "attention",
                    "q_proj k_proj v_proj o_proj",
                    counts={"num_attention_heads": "heads"},
                    norm="norm1",
                    after=("layer_scale1",),
                ),
                feedforward=FeedForwardDescription(
                    up="mlp.fc1|mlp.up_proj",
                    gate="mlp.gate_proj",
                    down="mlp.fc2|mlp.down_proj",
                    activation="hidden_act",
                    gated="silu",
                    norm="norm2",
                ),
                norm_first=True,
                final_norm="layernorm",
            ),
        ),
        token="embeddings.patch_embeddings.projection",
        position="embeddings.position_embeddings",
    ),
    "gpt2": Family(
        stacks=(
            StackDescription(
                layers="h",
                attention=AttentionDescription(
                    module="attn",
                    fused="attn.c_attn",
                    output="attn.c_proj",
                    head_dim="head_dim",
                    counts={"num_heads": "heads", "split_size": "width"},
                    norm="ln_1",
                ),
                cross=AttentionDescription(
                    module="crossattention",
                    query="crossattention.q_attn",
                    fused="crossattention.c_attn",
                    output="crossattention.c_proj",
                    head_dim="head_dim",
                    counts={"num_heads": "heads", "split_size": "width"},
                    norm="ln_cross_attn",
                ),
                feedforward=FeedForwardDescription(
                    up="mlp.c_fc", down="mlp.c_proj", activation="activation_function", norm="ln_2"
                ),
                norm_first=True,
                causal=True,
                final_norm="ln_f",
            ),
        ),
        token="wte",
        position="wpe",
    ),
    "opt": Family(
        stacks=(replace(_FAIRSEQ, norm_first="do_layer_norm_before", causal=True, final_norm="final_layer_norm"),),
        token="decoder.embed_tokens",
        position="decoder.embed_positions",
    ),
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "whisper": Family(
        stacks=(
            replace(_FAIRSEQ, layers="encoder.layers|layers", count="encoder_layers"),
            replace(
                _FAIRSEQ,
                cross=_projections("encoder_attn", norm="encoder_attn_layer_norm"),
                causal=True,
                count="decoder_layers",
            ),
        ),
        token="encoder.conv1|conv1",
        position="encoder.embed_positions|embed_positions",
        heads=("projector", "classifier", "proj_out"),
    ),
    "wav2vec2": Family(
        stacks=(
            StackDescription(
                layers="encoder.layers",
                attention=_projections("attention", norm="layer_norm"),
                feedforward=FeedForwardDescription(
                    up="feed_forward.intermediate_dense",
                    down="feed_forward.output_dense",
                    activation="hidden_act",
                    norm="final_layer_norm",
                ),
                norm_first="do_stable_layer_norm",
                final_norm="layer_norm",
            ),
        ),
        token="feature_projection.projection",
        position="encoder.pos_conv_embed",
    ),
    "t5": Family(
        stacks=(
            _T5,
            replace(
                _T5,
                layers="decoder.block",
                cross=_projections(
                    "layer.1.EncDecAttention",
                    "q k v o",
                    head_dim="key_value_proj_dim",
                    counts={"n_heads": "heads", "inner_dim": "width"},
                    norm="layer.1.layer_norm",
                ),
                feedforward=FeedForwardDescription(
                    up="layer.2.DenseReluDense.wi|layer.2.DenseReluDense.wi_1",
                    gate="layer.2.DenseReluDense.wi_0",
                    down="layer.2.DenseReluDense.wo",
                    activation="dense_act_fn",
                    norm="layer.2.layer_norm",
                ),
                causal=True,
                count="num_decoder_layers",
            ),
        ),
        token="shared",
        heads=("lm_head", "qa_outputs"),
    ),
}.items():
    register_family(_name, _family)
