"""The config of the Transformer: a part named for every slot, and the sizes."""

from typing import Any, ClassVar, no_type_check

from transformers import PreTrainedConfig

from formwright.build import Spec, parse_spec
from formwright.errors import FormwrightError

ARCHITECTURES = ("encoder", "decoder", "encoder-decoder")
POOLINGS = ("mean", "first", "last")


@no_type_check  # transformers gives a config an __init__ that takes more than its fields; a type checker's would not
class TransformerConfig(PreTrainedConfig):
    """What a Transformer is made of.

    Args:
        architecture: "encoder" (bidirectional), "decoder" (causal) or "encoder-decoder".
        vocab_size: ids; 0 = no token table (images only).
        type_vocab_size: token types, as BERT's two segments; 0 = none.
        hidden_size: width of a token.
        num_hidden_layers: blocks of the encoder, or of the only stack.
        num_decoder_layers: blocks of the decoder of an encoder-decoder; none = as many as the encoder's.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; none = as many as query heads, 1 = multi-query.
        head_dim: width of a head; none = hidden_size / num_attention_heads.
        intermediate_size: hidden width of the feed-forward layer; none = 4 x hidden_size, 8/3 x with a gate.
        max_position_embeddings: longest sequence, for parts that need one.
        mixer, position, feedforward, norm, block: specs, or lists of specs repeated over the layers ("none" leaves a
        slot empty).
        cross_mixer: the mixer that reads the encoder's output.
        cross_position: the position of that mixer, one for all layers, such as "t5"; T5 itself has none there.
        embedding: how narrow token embeddings are lifted to hidden_size, such as "safe(rank=64)"; none = no narrower.
        sharing: which layers use the same matrices, such as "sandwich"; none = each its own.
        init: initialisation scheme.
        image_size, patch_size, num_channels: images instead of ids when image_size > 0.
        use_grid: whether patches lie on a grid for the parts, or count as a sequence, row by row.
        class_token: whether a learned token stands in front of the patches, for pooling="first" to read.
        embedding_norm: whether a norm follows the embeddings, as in BERT.
        qkv_bias: whether query, key and value projections have biases.
        dropout: of embeddings and of what each sub-layer adds.
        pooling: which tokens a classifier reads: their mean, the first or the last.
        pooler: whether a dense tanh layer precedes the classifier, as in BERT.
        head_transform: whether a dense GELU layer and a norm precede the masked-language-model head, as in BERT.
        lm_head_bias: whether the language-model head has a bias.
    """

    model_type = "formwright-transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "extra_losses"]

    architecture: str = "encoder"
    vocab_size: int = 256
    type_vocab_size: int = 0
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_decoder_layers: int | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 512
    mixer: str | dict | list = "softmax"
    position: str | dict | list = "learned"
    feedforward: str | dict | list = "gelu"
    norm: str | dict = "layernorm"
    block: str | dict | list = "pre"
    cross_mixer: str | dict = "softmax"
    cross_position: str | dict = "none"
    embedding: str | dict | None = "none"
    sharing: str | dict | None = "none"
    init: str | dict = "normal"
    image_size: int = 0
    patch_size: int = 4
    num_channels: int = 3
    use_grid: bool = False
    class_token: bool = False
    embedding_norm: bool = False
    qkv_bias: bool = True
    dropout: float = 0.0
    pooling: str = "mean"
    pooler: bool = False
    head_transform: bool = False
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    is_decoder: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.architecture not in ARCHITECTURES:
            raise FormwrightError(f"An architecture is one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}.")
        if self.pooling not in POOLINGS:
            raise FormwrightError(f"Pooling is one of {', '.join(POOLINGS)}, got {self.pooling!r}.")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise FormwrightError(f"{name} is a whole number from 1, got {getattr(self, name)!r}.")
        for name in ("num_decoder_layers", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise FormwrightError(f"{name} is a whole number from 1 or none, got {getattr(self, name)!r}.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise FormwrightError(
                f"A hidden_size of {self.hidden_size} does not split into {self.num_attention_heads} heads; "
                "set head_dim or another width."
            )
        if not 0 <= self.dropout < 1:
            raise FormwrightError(f"dropout is a probability from 0 to below 1, got {self.dropout}.")
        if self.vocab_size < 1 and self.image_size < 1:
            raise FormwrightError("A Transformer reads ids or images: set vocab_size or image_size.")
        if self.class_token and (self.image_size < 1 or self.pooling != "first"):
            raise FormwrightError(
                'A class token stands in front of an image\'s patches and is what pooling="first" reads; '
                f"got image_size={self.image_size} and pooling={self.pooling!r}."
            )
        # `compare` hands none on as None
        self.embedding, self.sharing = self.embedding or "none", self.sharing or "none"
        if parse_spec(self.embedding)["name"] != "none":
            if self.vocab_size < 1 or self.image_size:
                raise FormwrightError(
                    f"embedding={self.embedding!r} narrows a table of tokens and this model reads images: leave it out."
                )
            rank = parse_spec(self.embedding).get("rank")
            if not isinstance(rank, int) or rank < 1:
                raise FormwrightError(f"embedding={self.embedding!r} needs the width of its table: rank=1 or more.")
        self.is_encoder_decoder = self.architecture == "encoder-decoder"
        self.is_decoder = self.architecture == "decoder"
        super().__post_init__(**kwargs)

    @property
    def embedding_size(self) -> int:
        """The width of the token table."""
        return int(parse_spec(self.embedding).get("rank", self.hidden_size))

    def layer_spec(self, slot: str, layer: int) -> Spec:
        """The spec of one layer: a list repeats over the layers."""
        given = getattr(self, slot)
        if isinstance(given, list):
            if not given:
                raise FormwrightError(f"{slot} is an empty list; name at least one part.")
            return given[layer % len(given)]
        return given
