"""Attention inside each text of a packed batch, and residual sum with norm: see native/varlen.cpp.

Texts lie one after the other in rows, text s from cu_seqlens[s] to cu_seqlens[s + 1]. The `*_reference` twins are plain
tensor operations, for any dtype and device; the others choose.
"""

import functools
from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from formwright.ops import native

Rotation = tuple[Float[Tensor, "positions c"], Float[Tensor, "positions c"]]  # cosines and sines
NATIVE = (torch.float32, torch.bfloat16)


@functools.cache
def _attention() -> Callable[..., int] | None:
    return native.function("formwright_varlen_attention", tensors=10, numbers=10)


@functools.cache
def _norm() -> Callable[..., int] | None:
    return native.function("formwright_add_norm", tensors=7, numbers=5)


@functools.lru_cache(maxsize=64)
def _number(value: float) -> Tensor:
    """Where a kernel reads it."""
    return torch.tensor([value], dtype=torch.float32, device="cpu")


def _served(kernel: Callable[..., int] | None, *tensors: Tensor) -> bool:
    return kernel is not None and all(x.device.type == "cpu" and x.dtype in NATIVE for x in tensors)


def varlen_attention(
    qkv: Float[Tensor, "t qkv"],
    cu_seqlens: Int[Tensor, " s"],
    *,
    heads: int,
    scaling: float,
    bias: Float[Tensor, "h n n"] | None = None,
    rotation: Rotation | None = None,
    window: int | None = None,
    weigh: bool = False,
) -> tuple[Float[Tensor, "t e"], Float[Tensor, " t"] | None]:
    """Bidirectional softmax attention of every text within itself.

    Args:
        qkv: the queries of all heads, then the keys, then the values, a row for each token.
        cu_seqlens: where texts begin, from 0 to t; int64 on the CPU.
        heads: of queries, keys and values alike.
        scaling: factor on the scores.
        bias: added to the scores after it, for the longest text or longer.
        rotation: turns queries and keys by their place in the text, x cos + (-upper half, lower half) sin.
        window: a token sees others up to so many places away; none = all.
        weigh: also give the attention every token received, the mean over heads and the queries of its text.
    """
    kernel = _attention()
    if not _served(kernel, qkv):
        return varlen_attention_reference(
            qkv, cu_seqlens, heads=heads, scaling=scaling, bias=bias, rotation=rotation, window=window, weigh=weigh
        )
    assert kernel is not None
    tokens, width = len(qkv), qkv.shape[1] // (3 * heads)
    qkv, border = qkv.contiguous(), cu_seqlens.contiguous()
    lengths = border.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    mixed = qkv.new_empty(tokens, heads * width)
    received = torch.zeros(heads, tokens) if weigh else None
    table = None if bias is None else bias.float().contiguous()
    turn = None if rotation is None else [x.float().contiguous() for x in rotation]
    assert table is None or table.shape[-1] >= longest
    assert turn is None or len(turn[0]) >= longest
    size, start = qkv.element_size(), qkv.data_ptr()
    failed = kernel(
        start,
        start + size * heads * width,
        start + 2 * size * heads * width,
        mixed.data_ptr(),
        None if table is None else table.data_ptr(),
        *((None, None) if turn is None else (x.data_ptr() for x in turn)),
        None if received is None else received.data_ptr(),
        border.data_ptr(),
        _number(scaling).data_ptr(),
        qkv.dtype == torch.bfloat16,
        len(lengths),
        longest,
        heads,
        width,
        3 * heads * width,
        heads * width,
        0 if table is None else table.shape[-1],
        -1 if window is None else window,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"There was no memory for attention in a text of {longest} tokens.")
    if received is not None:
        received = received.mean(0) / lengths.repeat_interleave(lengths)
    return mixed, received


def varlen_attention_reference(
    qkv: Float[Tensor, "t qkv"],
    cu_seqlens: Int[Tensor, " s"],
    *,
    heads: int,
    scaling: float,
    bias: Float[Tensor, "h n n"] | None = None,
    rotation: Rotation | None = None,
    window: int | None = None,
    weigh: bool = False,
) -> tuple[Float[Tensor, "t e"], Float[Tensor, " t"] | None]:
    """The same as one call of PyTorch a text."""
    tokens, width = len(qkv), qkv.shape[1] // (3 * heads)
    mixed = qkv.new_empty(tokens, heads * width)
    received = qkv.new_zeros(tokens) if weigh else None
    for start, end in pairwise(cu_seqlens.tolist()):
        if start == end:
            continue
        n = end - start
        q, k, v = qkv[start:end].view(1, n, 3, heads, width).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            cosine, sine = (x[:n].to(q.dtype) for x in rotation)
            q, k = (x * cosine + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sine for x in (q, k))
        added = None if bias is None else bias[None, :, :n, :n].to(q.dtype)
        if window is not None:
            place = torch.arange(n, device=q.device)
            far = (place[:, None] - place).abs() > window
            hidden = q.new_zeros(n, n).masked_fill(far, -torch.inf)
            added = hidden if added is None else added + hidden
        one = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scaling)
        mixed[start:end] = one[0].transpose(0, 1).flatten(1)
        if received is not None:
            scores = q @ k.mT * scaling
            received[start:end] = (scores if added is None else scores + added).softmax(-1).mean((0, 1, 2))
    return mixed, received


def add_norm(
    x: Float[Tensor, "t d"],
    added: Float[Tensor, "t d"] | None,
    gain: Float[Tensor, " d"],
    shift: Float[Tensor, " d"] | None,
    *,
    eps: float,
    centred: bool = True,
    total: bool = False,
) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"] | None]:
    """The norm of x + added, and with `total` the sum itself. Sums are taken in float32.

    Args:
        x, added: of one dtype; none = x alone.
        gain, shift: of the norm; float32 saves a conversion.
        eps: added to the variance.
        centred: layer norm; otherwise the root mean square alone.
    """
    kernel = _norm()
    if not _served(kernel, x):
        return add_norm_reference(x, added, gain, shift, eps=eps, centred=centred, total=total)
    assert kernel is not None
    x, added = x.contiguous(), None if added is None else added.contiguous()
    gain, shift = gain.float().contiguous(), None if shift is None else shift.float().contiguous()
    normal, summed = torch.empty_like(x), torch.empty_like(x) if total else None
    failed = kernel(
        *(None if one is None else one.data_ptr() for one in (x, added, gain, shift, summed, normal)),
        _number(eps).data_ptr(),
        x.dtype == torch.bfloat16,
        len(x),
        x.shape[1],
        centred,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"There was no memory for a norm over {x.shape[1]} features.")
    return normal, summed


def add_norm_reference(
    x: Float[Tensor, "t d"],
    added: Float[Tensor, "t d"] | None,
    gain: Float[Tensor, " d"],
    shift: Float[Tensor, " d"] | None,
    *,
    eps: float,
    centred: bool = True,
    total: bool = False,
) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"] | None]:
    """The same in tensor operations."""
    summed = x if added is None else x + added
    gain, shift = gain.to(x.dtype), None if shift is None else shift.to(x.dtype)
    if centred:
        normal = F.layer_norm(summed, summed.shape[-1:], gain, shift, eps)
    else:
        normal = F.rms_norm(summed, summed.shape[-1:], gain, eps)
    return normal, summed if total else None
