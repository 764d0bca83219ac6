"""Initialisation schemes: what a model's matrices start as.

A scheme is called with every plain torch layer of a model. Parts mark their matrices by `role`: "query-key-value" (with
`splits`), "out", "up", "down"; the model marks each with its `stack`: "encoder", "decoder", "cross". Parts with a
`reset_parameters` of their own set themselves.

normal   N(0, std^2); what writes to the residual stream is divided by sqrt(2 layers).
         GPT-2 (Radford et al. 2019), section 2.3.
fan-in   N(0, 1 / fan_in), the same division; embeddings N(0, 1 / d).
         LeCun et al.: Efficient BackProp (1998), section 4.6.
xavier   U(+-gain sqrt(6 / (fan_in + fan_out))), gain 1 / sqrt(2) for queries, keys and values.
         Glorot, Bengio (2010).
magneto  xavier, then values, outputs and both feed-forward matrices times a gain derived for sub-LN.
         Wang et al.: Foundation Transformers (2022), arXiv:2210.06423.

             encoder of N layers   sqrt(ln 2N)           in an encoder-decoder   sqrt(ln 3M * ln 2N / 3)
             decoder of M layers   sqrt(ln 2M)           in an encoder-decoder   sqrt(ln 3M)

Differs  Biases start at 0 everywhere. Magneto leaves cross-attention at gain 1, as the released code does; the paper's
         figure shows it there.
"""

import math
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn
from torch.nn import init

from formwright.errors import FormwrightError

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Scheme(Protocol):
    def __call__(self, layer: nn.Module) -> None: ...


def is_loaded(tensor: Tensor) -> bool:
    """Whether Hugging Face has just read this weight from a file. Its guard does not see views, so in-place work on
    slices asks first.
    """
    return getattr(tensor, "_is_hf_initialized", False)


def slices(layer: nn.Linear) -> Iterator[tuple[str, Tensor]]:
    """The named matrices that a layer holds: one, or query, key and value one under the other."""
    role = getattr(layer, "role", "plain")
    if role != "query-key-value":
        yield role, layer.weight
        return
    yield from zip(("query", "key", "value"), layer.weight.split(layer.splits), strict=True)


def common(layer: nn.Module, *, embedding_std: float) -> bool:
    """Biases to 0, norms to 1, embeddings to N(0, std^2) with a zero row for the padding id. True when a matrix is left
    to set.
    """
    if isinstance(layer, nn.Embedding):
        if not is_loaded(layer.weight):
            init.normal_(layer.weight, std=embedding_std)
            if layer.padding_idx is not None:
                init.zeros_(layer.weight[layer.padding_idx])
        return False
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
        if layer.weight is not None:
            init.ones_(layer.weight)
        if getattr(layer, "bias", None) is not None:
            init.zeros_(layer.bias)
        return False
    if isinstance(layer, MATRICES):
        if layer.bias is not None:
            init.zeros_(layer.bias)
        return not is_loaded(layer.weight)
    return False


def fan_in(layer: nn.Module) -> int:
    return layer.weight[0].numel()


class Normal:
    """GPT-2's.

    Args:
        layers: depth of the stack.
        std: of every matrix and embedding.
    """

    def __init__(self, *, layers: int, std: float = 0.02) -> None:
        if std <= 0:
            raise FormwrightError(f"The standard deviation of initial weights must be above 0, got {std}.")
        self.std, self.residual = std, (2 * layers) ** -0.5

    def __call__(self, layer: nn.Module) -> None:
        if common(layer, embedding_std=self.std):
            residual = getattr(layer, "role", "plain") in ("out", "down")
            init.normal_(layer.weight, std=self.std * (self.residual if residual else 1))


class FanIn:
    """Every output starts with the variance of the inputs.

    Args:
        layers: depth of the stack.
        dim: width of the embeddings.
    """

    def __init__(self, *, layers: int, dim: int) -> None:
        self.residual, self.embedding_std = (2 * layers) ** -0.5, dim**-0.5

    def __call__(self, layer: nn.Module) -> None:
        if common(layer, embedding_std=self.embedding_std):
            residual = getattr(layer, "role", "plain") in ("out", "down")
            init.normal_(layer.weight, std=fan_in(layer) ** -0.5 * (self.residual if residual else 1))


class Xavier:
    """Glorot's uniform, each of query, key and value by its own shape.

    Args:
        dim: width of the embeddings, which start as N(0, 1 / d).
    """

    def __init__(self, *, dim: int) -> None:
        self.embedding_std = dim**-0.5

    def gain(self, _layer: nn.Module, name: str) -> float:
        return 0.5**0.5 if name in ("query", "key", "value") else 1.0

    def __call__(self, layer: nn.Module) -> None:
        if not common(layer, embedding_std=self.embedding_std):
            return
        named = slices(layer) if isinstance(layer, nn.Linear) else [("plain", layer.weight)]
        for name, matrix in named:
            init.xavier_uniform_(matrix, gain=self.gain(layer, name))


class Magneto(Xavier):
    """Xavier with the gains derived for sub-LN.

    Args:
        dim: width of the embeddings.
        encoder_layers: N, 0 in a decoder-only model.
        decoder_layers: M, 0 in an encoder-only model.
    """

    def __init__(self, *, dim: int, encoder_layers: int, decoder_layers: int) -> None:
        super().__init__(dim=dim)
        self.gains = magneto_gains(encoder_layers, decoder_layers)

    def gain(self, layer: nn.Module, name: str) -> float:
        scaled = name in ("value", "out", "up", "down")
        return super().gain(layer, name) * (self.gains.get(getattr(layer, "stack", ""), 1.0) if scaled else 1.0)


def magneto_gains(encoder_layers: int, decoder_layers: int) -> dict[str, float]:
    """The factor on values, outputs and feed-forward matrices of each stack; natural logarithms."""
    if encoder_layers < 0 or decoder_layers < 0 or encoder_layers + decoder_layers < 1:
        raise FormwrightError(f"Magneto needs at least one layer, got {encoder_layers} and {decoder_layers}.")
    n, m = encoder_layers, decoder_layers
    if m == 0:
        return {"encoder": math.sqrt(math.log(2 * n))}
    if n == 0:
        return {"decoder": math.sqrt(math.log(2 * m))}
    return {"encoder": math.sqrt(math.log(3 * m) * math.log(2 * n) / 3), "decoder": math.sqrt(math.log(3 * m))}
