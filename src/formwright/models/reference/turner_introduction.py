"""The Transformer as its introduction defines it, in NumPy: the twin our fast one is tested against.

Paper    Turner: An Introduction to Transformers (2023), arXiv:2304.10557.
Idea     Two stages take turns on X, one column a token: one mixes across the sequence, one across the features.

             A[m, n]  = exp(k_m . q_n / sqrt(K)) / sum_m' exp(k_m' . q_n / sqrt(K))       q_n = U_q x_n, k_n = U_k x_n
             MHSA(X)  = sum_h V_h X A_h                                                   V_h = W_o,h W_v,h
             pre-norm    Y = X + MHSA(norm(X))          X' = Y + MLP(norm(Y))             token by token
             post-norm   Y = norm(X + MHSA(X))          X' = norm(Y + MLP(Y))

         Every column of A sums to 1. A causal A has 0 where m > n.
Differs  Scores are divided by sqrt(K) and linear maps have biases, as in practice; the note leaves both out. A token
         that may see none gets 0. Nothing here is trained or batched: see `formwright.models.transformer` for that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from formwright.errors import FormwrightError
from formwright.models.body import Stack, TransformerModel

Array = np.ndarray


@dataclass(frozen=True)
class Affine:
    """x -> W x + b."""

    weight: Float[Array, "out in"]
    bias: Float[Array, " out"]

    def __call__(self, x: Float[Array, "in n"]) -> Float[Array, "out n"]:
        return self.weight @ x + self.bias[:, None]


@dataclass(frozen=True)
class TokenNorm:
    """Every token to mean 0 and variance 1 over its features, then scaled and shifted."""

    gain: Float[Array, " d"]
    shift: Float[Array, " d"]
    eps: float

    def __call__(self, x: Float[Array, "d n"]) -> Float[Array, "d n"]:
        centred = x - x.mean(0)
        return self.gain[:, None] * centred / np.sqrt((centred**2).mean(0) + self.eps) + self.shift[:, None]


@dataclass(frozen=True)
class Head:
    """One attention head: what it asks for, what it offers, and what it passes on."""

    query: Affine
    key: Affine
    value: Affine
    out: Float[Array, "d k"]

    def attention(self, x: Float[Array, "d n"], seen: Bool[Array, "n n"]) -> Float[Array, "n n"]:
        """A[m, n]: the weight that token n puts on token m."""
        q, k = self.query(x), self.key(x)
        scores = np.where(seen, k.T @ q / math.sqrt(len(q)), -np.inf)
        top = scores.max(0, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = weights.sum(0)
        return weights / np.where(total > 0, total, 1)

    def __call__(self, x: Float[Array, "d n"], seen: Bool[Array, "n n"]) -> Float[Array, "d n"]:
        return self.out @ self.value(x) @ self.attention(x, seen)


@dataclass(frozen=True)
class Layer:
    """Stage one across the sequence, stage two across the features."""

    heads: Sequence[Head]
    attention_bias: Float[Array, " d"]
    attention_norm: TokenNorm
    up: Affine
    down: Affine
    mlp_norm: TokenNorm
    activation: Literal["gelu", "relu"]
    order: Literal["pre", "post"]

    def across_sequence(self, x: Float[Array, "d n"], seen: Bool[Array, "n n"]) -> Float[Array, "d n"]:
        return sum(head(x, seen) for head in self.heads) + self.attention_bias[:, None]

    def across_features(self, x: Float[Array, "d n"]) -> Float[Array, "d n"]:
        hidden = self.up(x)
        return self.down(gelu(hidden) if self.activation == "gelu" else np.maximum(hidden, 0))

    def __call__(self, x: Float[Array, "d n"], seen: Bool[Array, "n n"]) -> Float[Array, "d n"]:
        if self.order == "pre":
            y = x + self.across_sequence(self.attention_norm(x), seen)
            return y + self.across_features(self.mlp_norm(y))
        y = self.attention_norm(x + self.across_sequence(x, seen))
        return self.mlp_norm(y + self.across_features(y))


def gelu(x: Array) -> Array:
    """x times the Gaussian distribution function of x."""
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


@dataclass(frozen=True)
class TurnerTransformer:
    """The body of a Transformer in float64: embeddings, layers and the final norm.

    `TurnerTransformer.of(model)` copies the weights of a model of ours.
    """

    tokens: Float[Array, "vocab d"]
    places: Float[Array, "n d"]
    layers: Sequence[Layer]
    norm: TokenNorm | None
    causal: bool

    def __call__(self, ids: Int[Array, " n"], real: Bool[Array, " n"] | None = None) -> Float[Array, "n d"]:
        """The last hidden state of one sequence, a row a token as the fast model gives it.

        Args:
            ids: the tokens.
            real: False = a padding token nobody may see; none = all are real. A place counts real tokens only.
        """
        n = len(ids)
        real = np.ones(n, dtype=bool) if real is None else real
        places = np.maximum(np.cumsum(real) - 1, 0)
        x = (self.tokens[ids] + self.places[places]).T
        seen = np.tile(real[:, None], (1, n))
        if self.causal:
            seen &= np.arange(n)[:, None] <= np.arange(n)
        for layer in self.layers:
            x = layer(x, seen)
        return (x if self.norm is None else self.norm(x)).T

    @staticmethod
    def of(model: TransformerModel) -> "TurnerTransformer":
        """The same function as an encoder or decoder of ours made of what the note describes.

        Raises:
            FormwrightError: the model has a part that the note does not describe.
        """
        config = model.config
        wanted = {
            "mixer": ("softmax",),
            "position": ("sinusoidal", "learned", "none"),
            "feedforward": ("gelu", "relu"),
            "norm": ("layernorm",),
            "block": ("pre", "post"),
            "architecture": ("encoder", "decoder"),
        }
        for slot, names in wanted.items():
            if getattr(config, slot) not in names:
                raise FormwrightError(
                    f"The introduction describes {slot} {' or '.join(names)}, not {getattr(config, slot)!r}."
                )
        if config.embedding_norm or config.type_vocab_size or model.embeddings.tokens is None:
            raise FormwrightError("The introduction describes ids without token types or a norm on the embeddings.")
        stack = model.encoder if model.decoder is None else model.decoder
        return TurnerTransformer(
            tokens=_array(model.embeddings.tokens.weight),
            places=_places(config.position, stack, config.max_position_embeddings, config.hidden_size),
            layers=[_layer(layer.block, config.feedforward, config.block) for layer in stack.layers],
            norm=None if stack.norm is None else _norm(stack.norm),
            causal=model.decoder is not None,
        )


def sinusoids(length: int, dim: int) -> Float[Array, "n d"]:
    """p[n, 2i] = sin(n / 10000^(2i / d)), p[n, 2i + 1] = cos of the same."""
    angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, dim, 2) / dim)
    table = np.empty((length, dim))
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)[:, : dim // 2]
    return table


def _places(name: str, stack: Stack, length: int, dim: int) -> Array:
    if name == "learned":
        return _array(stack.position.weight)
    return sinusoids(length, dim) if name == "sinusoidal" else np.zeros((length, dim))


def _array(tensor: object) -> Array:
    return tensor.detach().cpu().double().numpy()


def _affine(linear: object) -> Affine:
    weight = _array(linear.weight)
    return Affine(weight, np.zeros(len(weight)) if linear.bias is None else _array(linear.bias))


def _norm(norm: object) -> TokenNorm:
    return TokenNorm(_array(norm.weight), _array(norm.bias), norm.eps)


def _layer(block: object, activation: str, order: str) -> Layer:
    mixer = block.mixer
    stacked, out, k = _affine(mixer.query_key_value), _affine(mixer.out), mixer.head_dim
    rows = [np.split(part, range(k, len(part), k)) for part in (stacked.weight, stacked.bias)]
    maps = [Affine(weight, bias) for weight, bias in zip(*rows, strict=True)]
    queries, keys, values = (
        maps[: mixer.heads],
        maps[mixer.heads : mixer.heads + mixer.kv_heads],
        maps[mixer.heads + mixer.kv_heads :],
    )
    shared = mixer.heads // mixer.kv_heads
    heads = [
        Head(queries[h], keys[h // shared], values[h // shared], out.weight[:, h * k : (h + 1) * k])
        for h in range(mixer.heads)
    ]
    return Layer(
        heads=heads,
        attention_bias=out.bias,
        attention_norm=_norm(block.mixer_norm),
        up=_affine(block.feedforward.up),
        down=_affine(block.feedforward.down),
        mlp_norm=_norm(block.feedforward_norm),
        activation=activation,
        order=order,
    )
