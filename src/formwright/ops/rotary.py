"""Rotation of channel pairs by angles proportional to a position, and linear attention with it.

Su et al. 2021, arXiv:2104.09864:

    pair i of x at position p, with frequency f_i = base^(-2i/r), i = 0 .. r/2 - 1:

        (y, z) -> (y cos(p f_i) - z sin(p f_i),  z cos(p f_i) + y sin(p f_i))

    layout "interleaved"  pair i is channels 2i and 2i + 1        (the paper, RoFormer, GPT-J)
           "half"         pair i is channels i and i + r/2        (GPT-NeoX, LLaMA)

The two are one function up to a fixed permutation of the channels.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor
from torch.nn import functional as F

Layout = Literal["interleaved", "half"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Rotation(NamedTuple):
    """The angles of one forward pass, as they are multiplied: x' = x cos + swapped(x) sin."""

    layout: Layout
    cos: Float[Tensor, "b h n r"]  # h = 1 when all heads turn alike
    sin: Float[Tensor, "b h n r"]  # minus in the first channel of a pair
    pairs: Complex[Tensor, "b h n r//2"] | None  # cos + i sin: one complex product is the quickest for neighbours

    def last(self, tokens: int) -> "Rotation":
        """The same for the last tokens alone."""
        if tokens == self.cos.shape[2]:
            return self
        cos, sin, pairs = (None if x is None else x[:, :, -tokens:] for x in self[1:])
        return Rotation(self.layout, cos, sin, pairs)


def rotary_angles(
    positions: Int[Tensor, "b n"], *, dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b n {dim}//2"]:
    """p f_i in `dtype`, which half precision must never be: beyond a few hundred positions its angles are wrong."""
    frequencies = torch.tensor([base ** (-i / dim) for i in range(0, dim, 2)], dtype=dtype, device=positions.device)
    return positions.to(dtype)[..., None] * frequencies


def rotation(angles: Float[Tensor, "*rows n half"], *, layout: Layout = "interleaved", gain: float = 1.0) -> Rotation:
    """What `rotate` needs for queries and keys at these angles: (b, n, half) for all heads, or (b, h, n, half).

    Args:
        gain: what the turned channels are multiplied by besides.
    """
    angles = angles[:, None] if angles.ndim == 3 else angles
    cos, sin = angles.cos() * gain, angles.sin() * gain
    if layout == "half":
        return Rotation(layout, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1), None)
    # Compilers fuse the real form and do not generate code for complex numbers.
    pairs = None if torch.compiler.is_compiling() else torch.complex(cos, sin)
    return Rotation(layout, torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2), pairs)


def rotate(x: Float[Tensor, "b h n d"], by: Rotation) -> Float[Tensor, "b h n d"]:
    """The first r channels of x turned, the others as they are; computed in the dtype of the angles."""
    turned = by.cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], by), x[..., turned:]), -1)
    if by.pairs is None:
        return torch.addcmul(x * by.cos, _swapped(x, by.layout), by.sin).to(x.dtype)
    pairs = x.to(by.cos.dtype).unflatten(-1, (-1, 2))
    if any(stride % 2 for stride in pairs.stride()[:-2]) or pairs.stride()[-2:] != (2, 1) or pairs.storage_offset() % 2:
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_real(torch.view_as_complex(pairs) * by.pairs).flatten(-2).to(x.dtype)


def _swapped(x: Tensor, layout: Layout) -> Tensor:
    """The two channels of every pair exchanged."""
    if layout == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((second, first), -1)
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def rotate_reference(
    x: Float[Tensor, "b h n d"], angles: Float[Tensor, "rows n half"], *, layout: Layout = "interleaved"
) -> Float[Tensor, "b h n d"]:
    """`rotate` by d x d block-diagonal matrices, as the paper writes it."""
    half, d = angles.shape[-1], x.shape[-1]
    pairs = [(2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + half) for i in range(half)]
    matrices = torch.eye(d, dtype=x.dtype, device=x.device).repeat(*angles.shape[:2], 1, 1)
    for i, (first, second) in enumerate(pairs):
        cos, sin = angles[..., i].cos().to(x.dtype), angles[..., i].sin().to(x.dtype)
        matrices[..., first, first], matrices[..., first, second] = cos, -sin
        matrices[..., second, first], matrices[..., second, second] = sin, cos
    return torch.einsum("bnij,bhnj->bhni", matrices, x)


def rotary_linear_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    by: Rotation | None,
    *,
    causal: bool = False,
    padding: Bool[Tensor, "b n"] | None = None,
    chunk: int = 64,
) -> Float[Tensor, "b h n e"]:
    """Kernel attention with a rotated numerator (equation 19), O(n) in time and memory.

        out_m = sum_n (R_m phi(q_m)) . (R_n phi(k_n)) v_n / sum_n phi(q_m) . phi(k_n)        phi = elu + 1

    The rotation comes after phi and stays out of the denominator, which so cannot vanish; the weights may be negative.
    Without `by` it is linear attention as Katharopoulos et al. (2020) have it. A row that sees no real key gives 0.

    Args:
        causal: n runs to m: within a chunk by its own small score matrix, over earlier chunks by running sums.
        padding: True = a real key.
        chunk: queries that share a score matrix; it moves the time, not the result.
    """
    n, dtype = q.shape[2], torch.promote_types(v.dtype, torch.float32)
    q, k, values = (F.elu(q.to(dtype)) + 1, F.elu(k.to(dtype)) + 1, v.to(dtype))
    if padding is not None:
        k = k * padding[:, None, :, None]
    turned_q, turned_k = (q, k) if by is None else (rotate(q, by), rotate(k, by))
    if causal:
        mass = (q * k.cumsum(2)).sum(-1, keepdim=True)
        above = _causal_numerator(turned_q, turned_k, values, chunk)[:, :, :n]
    else:
        mass = q @ k.sum(2)[..., None]
        above = turned_q @ (turned_k.mT @ values)
    return (above / mass.clamp(min=torch.finfo(dtype).tiny)).to(v.dtype)


def _causal_numerator(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """sum over n <= m of (q_m . k_n) v_n, rounded up to whole chunks."""
    missing = -q.shape[2] % chunk
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    sums = (k.mT @ v).cumsum(2)
    before = torch.cat((torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]), 2)
    return ((q @ k.mT).tril() @ v + q @ before).flatten(2, 3)


def rotary_linear_attention_reference(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    angles: Float[Tensor, "rows n half"],
    *,
    causal: bool = False,
    padding: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b h n e"]:
    """`rotary_linear_attention` in the interleaved layout with all its n x n weights."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = rotate_reference(q, angles) @ rotate_reference(k, angles).mT
    mass = q @ k.mT
    if causal:
        weights, mass = weights.tril(), mass.tril()
    if padding is not None:
        weights, mass = weights * padding[:, None, None], mass * padding[:, None, None]
    return weights @ v / mass.sum(-1, keepdim=True)
