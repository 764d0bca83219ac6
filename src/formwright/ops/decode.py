"""One decoding step of a pre-norm attention block as a single native call: see native/decode.cpp.

`block_step_reference` is its plain twin. Decoding one token at a time does little arithmetic with much memory; called
operation by operation, most of the time goes into the calls.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from formwright.ops import native

Activation = Literal["relu", "gelu", "gelu-tanh"]
KINDS: tuple[Activation, ...] = ("relu", "gelu", "gelu-tanh")


class BlockWeights(NamedTuple):
    """What a block holds; every tensor float32 and contiguous. A bias may be none."""

    gain_1: Float[Tensor, " d"]
    shift_1: Float[Tensor, " d"]
    query_key_value: Float[Tensor, "r d"]
    query_key_value_bias: Float[Tensor, " r"] | None
    out: Float[Tensor, "d e"]
    out_bias: Float[Tensor, " d"] | None
    gain_2: Float[Tensor, " d"]
    shift_2: Float[Tensor, " d"]
    up: Float[Tensor, "f d"]
    up_bias: Float[Tensor, " f"] | None
    down: Float[Tensor, "d f"]
    down_bias: Float[Tensor, " d"] | None


@functools.cache
def kernel() -> Callable[..., int] | None:
    """The native call; none where the kernels are not built."""
    return native.function("formwright_block_step", tensors=18, numbers=10)


def block_step(
    x: Float[Tensor, "b 1 d"],
    weights: BlockWeights,
    keys: Float[Tensor, "b g room w"],
    values: Float[Tensor, "b g room w"],
    *,
    past: int,
    heads: int,
    eps: tuple[float, float],
    activation: Activation,
    seen: Bool[Tensor, "b kept"] | None = None,
) -> Float[Tensor, "b 1 d"]:
    """The block's output for one new token a sequence; its key and value are written at place `past` of the buffers.

    Args:
        x: the residual stream, float32 on the CPU, contiguous.
        weights: of the block.
        keys, values: contiguous buffers of which the first `past` tokens are kept.
        past: tokens kept before this one; there must be room for one more.
        heads: query heads.
        eps: of the two norms.
        activation: of the feed-forward layer.
        seen: (b, past + 1), False = a key that is hidden; none = all are seen.
    """
    batch, groups, room, width = keys.shape
    run = kernel()
    assert run is not None
    assert past < room
    y = torch.empty_like(x)
    constants = torch.tensor([*eps, width**-0.5], dtype=torch.float32)
    mask = None if seen is None else seen.to(torch.uint8).contiguous()
    failed = run(
        x.data_ptr(),
        y.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        None if mask is None else mask.data_ptr(),
        *(None if weight is None else weight.data_ptr() for weight in weights),
        constants.data_ptr(),
        batch,
        x.shape[-1],
        heads,
        groups,
        width,
        weights.up.shape[0],
        past,
        room,
        KINDS.index(activation),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("There was no memory for one decoding step.")
    return y


def block_step_reference(
    x: Float[Tensor, "b 1 d"],
    weights: BlockWeights,
    keys: Float[Tensor, "b g room w"],
    values: Float[Tensor, "b g room w"],
    *,
    past: int,
    heads: int,
    eps: tuple[float, float],
    activation: Activation,
    seen: Bool[Tensor, "b kept"] | None = None,
) -> Float[Tensor, "b 1 d"]:
    """The same in tensor operations, in any dtype and on any device."""
    batch, groups, _, width = keys.shape
    normal = F.layer_norm(x, x.shape[-1:], weights.gain_1, weights.shift_1, eps[0])
    projected = F.linear(normal, weights.query_key_value, weights.query_key_value_bias)
    q, k, v = projected.view(batch, 1, -1, width).transpose(1, 2).split([heads, groups, groups], dim=1)
    keys[:, :, past : past + 1], values[:, :, past : past + 1] = k, v
    k, v = (kept[:, :, : past + 1].repeat_interleave(heads // groups, dim=1) for kept in (keys, values))
    scores = q @ k.mT * width**-0.5
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    attended = (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).flatten(2)
    y = x + F.linear(attended, weights.out, weights.out_bias)
    normal = F.layer_norm(y, x.shape[-1:], weights.gain_2, weights.shift_2, eps[1])
    inner = F.linear(normal, weights.up, weights.up_bias)
    act = {"relu": F.relu, "gelu": F.gelu, "gelu-tanh": functools.partial(F.gelu, approximate="tanh")}[activation]
    return y + F.linear(act(inner), weights.down, weights.down_bias)
