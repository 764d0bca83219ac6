"""Moments through a whole Transformer: predicted from its config and the spread of its matrices, and measured.

Paper    Kedia et al.: Transformers Get Stable (DeepScaleLM; ICML 2024), arXiv:2403.09635.
Idea     The formulas of the components (`formwright.ops.moments`), one after the other along the wiring of the blocks,
         give the variance of the stream and of what every sub-layer adds, and backwards the mean square of the gradient
         at every layer, for a gradient of 1 behind the last one. One training step of random weights shows how near
         they are.
Differs  Any initialisation is followed, not DeepScaleLM's alone: matrices are known by their mean square. Of positions,
         those added to the tokens and those that bias the scores are counted; rotations are not.

    formwright moments block=post init=xavier num_hidden_layers=24
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formwright.contracts import Context, dense, hooks
from formwright.errors import FormwrightError
from formwright.models.body import Stack, TransformerModel
from formwright.ops import moments
from formwright.ops.moments import Moments, moments_of
from formwright.parts.attention.softmax import SoftmaxAttention, softmax_or_zero
from formwright.parts.block.postnorm import PostNorm
from formwright.parts.block.prenorm import PreNorm
from formwright.parts.feedforward.glu import GLU
from formwright.parts.feedforward.mlp import MLP
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.norm.deepscalelm import share_alike

Back = Callable[[Moments], tuple[Moments, Moments | None]]  # by what it read, and by the memory


@dataclass(frozen=True, kw_only=True)
class Row:
    """One place of a model.

    Attributes:
        stack: "encoder" or "decoder".
        layer: from 0; the gradient is that at its input, the stream that behind it.
        what: "attention", "cross", "feedforward" (what they give, before dropout), "stream" or "gradient".
    """

    stack: str
    layer: int
    what: str
    predicted: Moments
    measured: Moments

    @property
    def error(self) -> float:
        """Of the mean square, as a share of the measured one."""
        return abs(self.predicted.second - self.measured.second) / self.measured.second


def errors(rows: Sequence[Row]) -> dict[str, float]:
    """Median, ninth decile and largest of the rows' errors."""
    found = sorted(row.error for row in rows)
    return {"median": statistics.median(found), "90 %": found[int(0.9 * (len(found) - 1))], "largest": found[-1]}


def texts(vocabulary: int, *, batch: int, length: int, seed: int) -> Int[Tensor, "b n"]:
    """Ids drawn by Zipf's law, so that tokens come again as in texts."""
    odds = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(odds.expand(batch, -1), length, replacement=True, generator=generator)


def compare(model: TransformerModel, inputs: dict[str, Tensor], *, seed: int = 0) -> list[Row]:
    """Predicted and measured moments at every layer of a model in training.

    Args:
        model: the body of a Transformer of ours; its gradients and mode are left as they were.
        inputs: of its forward, without padding: input_ids or pixel_values, and decoder_input_ids of an encoder-decoder.
        seed: of dropout and of the gradient behind the last layer.

    Raises:
        FormwrightError: a part whose moments are not known: a mixer other than softmax attention, a feed-forward layer
            whose activation does not act element by element, a block or norm of another kind.
    """
    predicted, measured = predict(model, inputs), measure(model, inputs, seed=seed)
    return [Row(stack=k[0], layer=k[1], what=k[2], predicted=predicted[k], measured=measured[k]) for k in measured]


# Measured


def measure(
    model: TransformerModel, inputs: dict[str, Tensor], *, seed: int = 0
) -> dict[tuple[str, int, str], Moments]:
    """By (stack, layer, what). The gradient behind the last layer is random, of variance 1."""
    outputs: dict[tuple[str, int, str], Tensor] = {}
    handles = []

    def watch(module: nn.Module, key: tuple[str, int, str]) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, y: outputs.__setitem__(key, y)))

    def before(key: tuple[str, int, str]) -> Callable[..., None]:
        def keep(_module: nn.Module, given: tuple[Any, ...]) -> None:
            given[0].retain_grad()
            outputs[key] = given[0]

        return keep

    stacks = _stacks(model)
    for side, stack in stacks.items():
        for i, layer in enumerate(stack.layers):
            handles.append(layer.register_forward_pre_hook(before((side, i, "gradient"))))
            for what, part in _parts(layer.block):
                watch(part, (side, i, what))
            watch(layer, (side, i, "stream"))
    training, device = model.training, next(model.parameters()).device
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    try:
        model.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            y = model.train()(**{key: value.to(device) for key, value in inputs.items()}).last_hidden_state
            y.backward(torch.randn(y.shape, dtype=y.dtype).to(device))
        return {
            key: moments_of(x.grad if key[2] == "gradient" else x.detach())  # in the order of the model
            for key, x in sorted(outputs.items(), key=lambda item: (list(stacks).index(item[0][0]), item[0][1]))
        }
    finally:
        for handle in handles:
            handle.remove()
        for weight, gradient in gradients:
            weight.grad = gradient
        model.train(training)


def _stacks(model: TransformerModel) -> dict[str, Stack]:
    both = {"encoder": model.encoder, "decoder": model.decoder}
    return {side: stack for side, stack in both.items() if stack is not None}


def _parts(block: nn.Module) -> list[tuple[str, nn.Module]]:
    parts = (("attention", block.mixer), ("cross", block.cross), ("feedforward", block.feedforward))
    return [(what, part) for what, part in parts if part is not None]


# Predicted


class _Step(NamedTuple):
    """One sub-layer as it was gone through."""

    back: Callable[[Moments], tuple[Moments, Moments | None]]
    given: Moments
    what: str


@torch.no_grad()
def predict(model: TransformerModel, inputs: dict[str, Tensor]) -> dict[tuple[str, int, str], Moments]:
    """By (stack, layer, what), from the mean squares of the matrices and the ids' repetitions alone."""
    found: dict[tuple[str, int, str], Moments] = {}
    stacks, passed, memory, lengths = _stacks(model), {}, None, {}
    for side, stack in stacks.items():
        key = "decoder_input_ids" if side == "decoder" and "encoder" in stacks else model.main_input_name
        x, n = _embedded(model, stack, inputs[key], causal=side == "decoder")
        lengths[side] = n
        layers = []
        for i, layer in enumerate(stack.layers):
            x, steps = _forward(layer, stack, x, n, memory, lengths.get("encoder", n))
            found |= {(side, i, step.what): step.given for step in steps} | {(side, i, "stream"): x}
            layers.append(steps)
        last = None if stack.norm is None else _norm(stack.norm, x)
        passed[side], memory = (layers, last), x if last is None else last[0]
    towards_memory = None
    for side in reversed(stacks):
        layers, last = passed[side]
        g = Moments(variance=1.0) if towards_memory is None else towards_memory
        towards_memory = Moments(variance=0.0)
        g = g if last is None else last[1](g)
        for i in reversed(range(len(layers))):
            for step in reversed(layers[i]):
                g, more = step.back(g)
                towards_memory = towards_memory if more is None else towards_memory + more
            found[side, i, "gradient"] = g
    return found


def _square(weight: Tensor) -> float:
    return float(weight.double().square().mean())


def _embedded(model: TransformerModel, stack: Stack, given: Tensor, *, causal: bool) -> tuple[Moments, int]:
    """The tokens as the first block reads them, and how many there are."""
    embeddings = model.embeddings
    if given.is_floating_point():
        patches = embeddings.patches(given)
        x, n = moments_of(patches), patches.shape[1]
    else:
        tables, n = [(_square(embeddings.tokens.weight), share_alike(given))], given.shape[1]
        if embeddings.types is not None:
            tables.append((_square(embeddings.types.weight[0]), 1.0))  # one type unless others are given
        x = moments.embedded(*zip(*tables, strict=True))
    if "embed" in hooks(stack.position):
        device = next(model.parameters()).device
        grid = model.embeddings.patches.grid if model.config.use_grid and given.is_floating_point() else None
        context = Context(queries=n, keys=n, causal=causal, grid=grid, device=device)
        x = x + moments_of(stack.position.embed(torch.zeros(1, n, model.config.hidden_size, device=device), context))
    if stack.embedding_norm is not None:
        x = _norm(stack.embedding_norm, x)[0]
    return moments.dropped(x, stack.dropout), n


def _norm(norm: nn.Module, x: Moments) -> tuple[Moments, Callable[[Moments], Moments]]:
    """What a norm gives, and its backward pass."""
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        raise _unknown(norm, "norm", "layernorm or rmsnorm")
    centred, width = isinstance(norm, nn.LayerNorm), norm.normalized_shape[0]
    gain = 1.0 if norm.weight is None else math.sqrt(_square(norm.weight))

    def back(g: Moments) -> Moments:
        return moments.normed_back(g.times(gain), x, width=width, centred=centred)

    return moments.normed(x, centred=centred).times(gain), back


def _forward(
    layer: nn.Module, stack: Stack, x: Moments, n: int, memory: Moments | None, m: int
) -> tuple[Moments, list[_Step]]:
    block, steps = layer.block, []
    if not isinstance(block, PreNorm | PostNorm):
        raise _unknown(block, "block", "pre, post, sub-ln or deepscalelm")
    skip, branch, before = getattr(block, "skip", 1.0), getattr(block, "branch", 1.0), isinstance(block, PreNorm)
    norms = {"attention": block.mixer_norm, "cross": block.cross_norm, "feedforward": block.feedforward_norm}
    for what, part in _parts(block):
        read, norm_back = _norm(norms[what], x) if before else (x, None)
        if what == "feedforward":
            given, part_back = _feedforward(part, read)
        else:
            cross = what == "cross"
            shared = stack.cross_position if cross else stack.position if layer.uses_position else None
            causal = not cross and block.mixer is part and _is_causal(stack)
            weights = _weights(part, shared, n, m if cross else n, causal=causal)
            given, part_back = _attention(part, read, memory if cross else read, weights, cross=cross)
        total = x.times(skip) + moments.dropped(given.times(branch), block.dropout)
        x, sum_back = (total, None) if before else _norm(norms[what], total)

        def back(
            g: Moments, part_back: Back = part_back, norm_back: Any = norm_back, sum_back: Any = sum_back
        ) -> tuple[Moments, Moments | None]:
            g = g if sum_back is None else sum_back(g)
            to_read, to_memory = part_back(moments.dropped_back(g, block.dropout).times(branch))
            return g.times(skip) + (to_read if norm_back is None else norm_back(to_read)), to_memory

        steps.append(_Step(back, given, what))
    return x, steps


def _is_causal(stack: Stack) -> bool:
    return stack.stack == "decoder"


def _weights(mixer: nn.Module, shared: nn.Module | None, n: int, m: int, *, causal: bool) -> Float[Tensor, "h n m"]:
    """The weights of attention where queries and keys say nothing: the mask's and the bias's."""
    if type(mixer) is not MultiHeadAttention or type(mixer.attention) is not SoftmaxAttention:
        raise _unknown(getattr(mixer, "attention", mixer), "mixer", "softmax")
    position = shared if mixer.position is None else mixer.position
    used = hooks(position)
    if used & {"scale", "scores"} or ("bias" in used and getattr(position, "reads_tokens", False)):
        raise _unknown(position, "position", "none, learned, sinusoidal, rope, alibi or t5")
    device = mixer.out.weight.device
    context = Context(queries=n, keys=m, causal=causal, device=device)
    logits = torch.zeros(1, 1, n, m, device=device)
    if "bias" in used:
        logits = logits + dense(position.bias(context))
    seen = context.mask.dense()
    return softmax_or_zero(logits if seen is None else logits.masked_fill(~seen, -math.inf))[0].double()


def _attention(
    mixer: MultiHeadAttention, x: Moments, memory: Moments, weights: Float[Tensor, "h n m"], *, cross: bool
) -> tuple[Moments, Back]:
    projection, out = mixer.query_key_value, mixer.out
    spreads = [_square(matrix) for matrix in projection.weight.split(projection.splits)]
    q, k, v = (
        moments.linear(read, inputs=projection.in_features, weight=spread)
        for read, spread in zip((x, memory, memory), spreads, strict=True)
    )
    how = moments.mixing(q, k, weights, dropout=mixer.attention.dropout)
    mixed, inner_back = _inner(mixer.inner, moments.attended(v, how))
    given = moments.linear(mixed, inputs=out.in_features, weight=_square(out.weight))

    def back(g: Moments) -> tuple[Moments, Moments | None]:
        g = inner_back(moments.linear_back(g, outputs=out.out_features, weight=_square(out.weight)))
        to_q, to_k, to_v = moments.attended_back(g, q, k, v, how)
        sharing = math.sqrt(mixer.heads / mixer.kv_heads)  # query heads that share a key head add their gradients
        by_q, by_k, by_v = (
            moments.linear_back(one, outputs=width, weight=spread)
            for one, width, spread in zip(
                (to_q, to_k.times(sharing), to_v.times(sharing)), projection.splits, spreads, strict=True
            )
        )
        return (by_q, by_k + by_v) if cross else (by_q + by_k + by_v, None)

    return given, back


def _inner(inner: nn.Module, x: Moments) -> tuple[Moments, Callable[[Moments], Moments]]:
    return (x, lambda g: g) if isinstance(inner, nn.Identity) else _norm(inner, x)


def _feedforward(part: nn.Module, x: Moments) -> tuple[Moments, Back]:
    if not isinstance(part, MLP | GLU):
        raise _unknown(part, "feedforward", "relu, gelu, swiglu or geglu")
    act, slope = _pointwise(part)
    up, down = part.up, part.down
    first = moments.linear(x, inputs=up.in_features, weight=_square(up.weight))
    open_ = moments.activated(first, act)
    hidden = moments.product(open_, first) if isinstance(part, GLU) else open_
    read, inner_back = _inner(part.inner, hidden)
    given = moments.linear(read, inputs=down.in_features, weight=_square(down.weight))

    def back(g: Moments) -> tuple[Moments, None]:
        g = inner_back(moments.linear_back(g, outputs=down.out_features, weight=_square(down.weight)))
        if isinstance(part, GLU):
            to_gate = moments.activated_back(moments.product_back(g, first), first, slope)
            to_value = moments.product_back(g, open_)
            half = up.out_features // 2
            by_gate, by_value = (
                moments.linear_back(one, outputs=half, weight=_square(up.weight)) for one in (to_gate, to_value)
            )
            return by_gate + by_value, None
        g = moments.activated_back(g, first, slope)
        return moments.linear_back(g, outputs=up.out_features, weight=_square(up.weight)), None

    return given, back


def _pointwise(part: MLP | GLU) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The activation and its derivative, for tensors of any shape."""

    def act(z: Tensor) -> Tensor:
        return part.activation(z.reshape(1, 1, -1)).view_as(z)

    def slope(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(act(z).sum(), z)[0]

    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    if not torch.allclose(act(z)[2:3], act(z[2:3])):
        raise _unknown(part, "feedforward", "relu, gelu, swiglu or geglu")
    return act, slope


def _unknown(part: object, slot: str, known: str) -> FormwrightError:
    return FormwrightError(
        f"The moments of {type(part).__name__} are not known: choose a {slot} that can be predicted, such as {known}."
    )
