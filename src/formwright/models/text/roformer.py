"""RoFormer: BERT with its learned positions taken out and RoPE put into every layer.

Paper    Su, Lu, Pan, Murtadha, Wen, Liu: RoFormer (2021), arXiv:2104.09864, section 4.2.
Idea         x = LayerNorm(W_token[id] + W_type[type])
             x = LayerNorm(x + Attention(x; q and k turned by RoPE))
             x = LayerNorm(x + GELU feed-forward(x))          LayerNorm eps = 1e-12

         No position is added to the tokens. There is no longest text: transformers' `max_position_embeddings` is the
         length of its table of angles, which here is made on demand.
Differs  In nothing; trained weights come over by `formwright.models.convert.from_transformers`.
"""

from formwright.models.transformer import TransformerConfig


def roformer_config(
    *,
    vocab_size: int = 50000,
    type_vocab_size: int = 2,
    hidden_size: int = 768,
    num_hidden_layers: int = 12,
    num_attention_heads: int = 12,
    intermediate_size: int = 3072,
    max_position_embeddings: int = 1536,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    pad_token_id: int | None = 0,
) -> TransformerConfig:
    """A RoFormer encoder for any of the heads; the defaults are RoFormer-base.

    Example:
        >>> from formwright.models.transformer import TransformerForMaskedLM
        >>> model = TransformerForMaskedLM(roformer_config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    """
    return TransformerConfig(
        architecture="encoder",
        vocab_size=vocab_size,
        type_vocab_size=type_vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        mixer={"name": "softmax", "dropout": attention_dropout},
        position={"name": "rope", "layout": "interleaved"},
        feedforward="gelu",
        norm={"name": "layernorm", "eps": 1e-12},
        block="post",
        embedding_norm=True,
        dropout=dropout,
        pooling="first",
        head_transform=True,
        lm_head_bias=True,
        pad_token_id=pad_token_id,
    )
