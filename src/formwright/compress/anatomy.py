"""Where things sit in a transformers model: attention, feed-forwards, norms, embeddings, pooler and head.

    anatomy = describe(model)
    anatomy.layers[3].attention.query          # "bert.encoder.layer.3.attention.self.query"
    anatomy.layers[3].feedforward.width        # of the projections, not of the config: the model may be cut already

A family is data: one `Family`, its paths relative to what holds them, in the table at the end; `register_family` adds
another. In a path `a|b` means a, or b where there is no a: variants of one family differ in such names. An attention or
a feed-forward that a module of ours stands for is None in the anatomy: there is nothing left to cut.

Layers count through all stacks: those of an encoder come first, then those of its decoder. A family that shares layers
(ALBERT) has each once, with the number of times it runs: what is done to it is done to all repeats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.structure import PREFIX, Rebuilt
from formwright.errors import FormwrightError

Fused = Literal["blocks", "heads"]  # all queries, all keys, all values; or head by head its query, key and value


# What a model has


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention: paths from the model, sizes from its weights.

    `counts` tells which attributes of the module hold what: "heads" or "width", heads x head_dim.
    """

    path: str
    query: str | None
    key: str | None
    value: str | None
    fused: str | None
    layout: Fused | None
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    counts: Mapping[str, str]
    norm: str | None
    bias: str | None  # a position bias, an embedding of one column a head, which all layers of the stack share


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """down(act(up(x))), or down(act(gate(x)) * up(x)). Gate and up of one path are one projection, whose first half
    is the gate.
    """

    up: str
    gate: str | None
    down: str
    activation: str
    width: int
    counts: tuple[str, ...]  # paths of attributes that hold the width
    norm: str | None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer; `index` counts through all stacks."""

    path: str
    index: int
    norm_first: bool
    repeats: int
    attention: Attention | None
    cross: Attention | None
    feedforward: FeedForward | None
    norms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that run one after the other. `path` leads to their ModuleList, `count` names its length in the config."""

    path: str
    causal: bool
    layers: tuple[Layer, ...]
    final_norm: str | None
    count: str
    description: "StackDescription"


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """What turns the input into vectors; for images and sound `token` is the projection of a patch or a frame."""

    token: str | None
    position: str | None
    type: str | None


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model taken apart. `base` is the path of the model without its head, "" for the model itself."""

    family: str
    base: str
    stacks: tuple[Stack, ...]
    embeddings: Embeddings
    pooler: str | None
    head: tuple[str, ...]
    causal: bool
    shared: bool

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    @property
    def final_norm(self) -> str | None:
        """Of the last stack: what the head reads."""
        return self.stacks[-1].final_norm


# What a family is described by


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


# Taking a model apart


def describe(model: PreTrainedModel) -> Anatomy:
    """Where things sit in the model, with any head or none, cut or whole.

    Raises:
        FormwrightError: its family is unknown, or its description does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        raise FormwrightError(
            f"{type(model).__name__} is no transformers model: load it with AutoModel.from_pretrained or the like."
        )
    name = model.config.model_type.removeprefix(PREFIX)
    if name not in _families:
        raise FormwrightError(
            f"The family {name!r} is not described; known are {', '.join(families())}. Say where its parts are with "
            "formwright.compress.anatomy.register_family."
        )
    family = _families[name]
    base = model.base_model
    root = next((path for path, module in model.named_modules() if module is base), "")
    stacks: list[Stack] = []
    for one in family.stacks:
        path = _find(base, one.layers)
        if path is not None:
            stacks.append(_stack(model, _join(root, path), one, sum(len(stack.layers) for stack in stacks)))
    if not stacks or not any(layer.attention for stack in stacks for layer in stack.layers):
        raise FormwrightError(f"{type(model).__name__} has no layers where the description of {name} looks for them.")
    return Anatomy(
        family=name,
        base=root,
        stacks=tuple(stacks),
        embeddings=Embeddings(
            token=_path(model, root, family.token),
            position=_path(model, root, family.position),
            type=_path(model, root, family.type),
        ),
        pooler=_path(model, root, family.pooler),
        head=_head(model, root, family),
        causal=stacks[-1].causal,
        shared=any(stack.description.shared for stack in stacks),
    )


def _stack(model: PreTrainedModel, path: str, described: StackDescription, first: int) -> Stack:
    paths = _entries(model, path)
    repeats = 1
    if described.shared:
        repeats = getattr(model.config, described.count) // len(paths)
        paths = [one for group in paths for one in _entries(model, f"{group}.{described.shared}")]
    base, _, _ = path.rpartition(".")
    # The final norm lies beside the layers or one level up, wherever the description says: it is looked for from both.
    outer = base.rpartition(".")[0]
    norm_first = _truth(model, described.norm_first)
    final = _path(model, base, described.final_norm) or _path(model, outer, described.final_norm)
    return Stack(
        path=path,
        causal=_truth(model, described.causal),
        layers=tuple(_layer(model, one, first + i, repeats, described, path) for i, one in enumerate(paths)),
        final_norm=final if norm_first else None,
        count=described.count,
        description=described,
    )


def _entries(model: nn.Module, path: str) -> list[str]:
    return [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]


def _layer(
    model: PreTrainedModel, path: str, index: int, repeats: int, described: StackDescription, stack: str
) -> Layer:
    attention = _attention(model, path, described.attention, stack)
    cross = described.cross
    across = (
        None if cross is None or _path(model, path, cross.module) is None else _attention(model, path, cross, stack)
    )
    feedforward = _feedforward(model, path, described.feedforward)
    norms = [part.norm for part in (attention, across, feedforward) if part is not None and part.norm is not None]
    return Layer(
        path=path,
        index=index,
        norm_first=_truth(model, described.norm_first),
        repeats=repeats,
        attention=attention,
        cross=across,
        feedforward=feedforward,
        norms=tuple(norms),
    )


def _attention(model: PreTrainedModel, layer: str, described: AttentionDescription, stack: str) -> Attention | None:
    found: dict[str, str] = {}
    for name in ("module", "query", "key", "value", "fused", "output"):
        if getattr(described, name) is not None:
            lies = _part(model, layer, getattr(described, name))
            if lies is None:
                return None
            found[name] = lies
    path = found["module"]
    head_dim = getattr(model.get_submodule(path), described.head_dim)
    if described.fused is None:
        heads, kv_heads = (widths(model, found[name])[1] // head_dim for name in ("query", "key"))
    else:
        parts = 3 if described.query is None else 2
        heads = kv_heads = widths(model, found["fused"])[1] // head_dim // parts
    return Attention(
        path=path,
        query=found.get("query"),
        key=found.get("key"),
        value=found.get("value"),
        fused=found.get("fused"),
        layout=described.layout if described.fused else None,
        output=found["output"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        counts=described.counts,
        norm=_path(model, layer, described.norm),
        bias=_path(model, stack.rpartition(".")[0], described.bias),
    )


def _feedforward(model: PreTrainedModel, layer: str, described: FeedForwardDescription) -> FeedForward | None:
    up, down = _part(model, layer, described.up), _part(model, layer, described.down)
    if up is None or down is None:
        return None
    gate = _path(model, layer, described.gate)
    named = described.gated if gate is not None else None
    return FeedForward(
        up=up,
        gate=gate,
        down=down,
        activation=named or str(getattr(model.config, described.activation)),
        width=widths(model, down)[0],
        counts=tuple(f"{layer}.{one}" for one in described.counts),
        norm=_path(model, layer, described.norm),
    )


def widths(model: nn.Module, path: str) -> tuple[int, int]:
    """Fan-in and fan-out of the projection there.

    Raises:
        FormwrightError: it is no projection.
    """
    module = model.get_submodule(path)
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    raise FormwrightError(f"{path} is a {type(module).__name__}, of which no width is known: it must be a projection.")


def _head(model: PreTrainedModel, root: str, family: Family) -> tuple[str, ...]:
    outside = root.partition(".")[0]
    return tuple(
        name
        for name, child in model.named_children()
        if any(True for _ in child.parameters())
        and (name != outside if root else name in family.heads)
        and name != "executor"
    )


def _truth(model: PreTrainedModel, said: bool | str) -> bool:
    return said if isinstance(said, bool) else bool(getattr(model.config, said))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _path(model: nn.Module, root: str, said: str | None) -> str | None:
    """The path from the model of what lies at `said` under the root, a module or a parameter, or None."""
    if said is None:
        return None
    found = _find(model.get_submodule(root), said)
    return None if found is None else _join(root, found)


def _find(module: nn.Module, said: str) -> str | None:
    return next((path for path in said.split("|") if _lies(module, path)), None)


def _lies(module: nn.Module, path: str) -> bool:
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return isinstance(found, nn.Module | nn.Parameter)


def _part(model: nn.Module, layer: str, said: str) -> str | None:
    """As `_path`, but what is missing must have given way to a module of ours.

    Raises:
        FormwrightError: it is missing from an unchanged layer.
    """
    path = _path(model, layer, said)
    if path is not None:
        return path
    found = model.get_submodule(layer)
    for name in said.split("|")[0].split("."):
        if isinstance(found, Rebuilt):
            return None
        found = getattr(found, name, None)  # type: ignore[assignment]
        if found is None:
            break
    raise FormwrightError(f"{layer} has no {said}: the description of this family does not fit the model.")


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
