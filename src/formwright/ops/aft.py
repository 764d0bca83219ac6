"""Averages of values under exp(key + bias), one average a channel: the sums of the attention-free Transformer.

    Y[t, c] = sum_t' exp(K[t', c] + w[t, t']) V[t', c] / sum_t' exp(K[t', c] + w[t, t'])        over the keys t' that
    t sees

exp(K) overflows, and one maximum for the whole sequence makes the rows before a large key underflow. Every partial
result is therefore a triple (top, num, den), the sums divided by exp(top), where top is the largest key *among those
the row sees*. Two triples of disjoint keys merge; a prefix is a parallel scan of merges, and a causal square is
halved until each piece is a rectangle whose rows all see the same keys, which is a matrix product:

    rows 0..7    A .        A: the same, halved          B: E @ exp(K - top)     E = exp(w - its row's largest)
    rows 8..15   B A

No (t, t', c) array exists, and a causal square costs half a full matrix product. A row loses its keys only if the
bias alone spreads over more than 80 within one rectangle, which a learned bias does not do.

Axes    t, q tokens or queries, k keys, c channels; anything in front is batch. A key of -inf is hidden.
Types   Sums are at least float32, whatever comes in.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def aft_reference(
    k: Float[Tensor, "b k #c"],
    v: Float[Tensor, "b k c"],
    w: Float[Tensor, "#b q k #c"],
    seen: Bool[Tensor, "#b q k"],
) -> Float[Tensor, "b q c"]:
    """The definition, with every weight (b, q, k, c) in memory. A row that sees nothing is 0."""
    scores = (k[:, None] + w).masked_fill(~seen[..., None], -torch.inf)
    blind = ~seen.any(-1)[..., None, None]
    weights = scores.masked_fill(blind, 0.0).softmax(2).masked_fill(blind, 0.0)
    return (weights * v[:, None]).sum(2)


class Sums(NamedTuple):
    """Weighted values and weights of some keys, both divided by exp(top)."""

    top: Float[Tensor, "*b t #c"]
    num: Float[Tensor, "*b t c"]
    den: Float[Tensor, "*b t #c"]

    def at(self, tokens: slice) -> "Sums":
        return Sums(*(part[..., tokens, :] for part in self))

    def mean(self) -> Float[Tensor, "*b t c"]:
        """The average; 0 where no key was seen."""
        return self.num / self.den.masked_fill(self.den == 0, 1.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _floor(top: Tensor) -> Tensor:
    """A finite top where all keys are hidden, so that no inf - inf appears. It cancels in the mean, hence no
    gradient.
    """
    return top.detach().clamp(min=torch.finfo(top.dtype).min)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums over the keys of both."""
    top = torch.maximum(a.top, b.top)
    left, right = (a.top - top).exp(), (b.top - top).exp()
    return Sums(top, left * a.num + right * b.num, left * a.den + right * b.den)


def each(k: Float[Tensor, "*b t #c"], v: Float[Tensor, "*b t c"]) -> Sums:
    """Every key alone."""
    k, v = _wide(k), _wide(v)
    top = _floor(k)
    den = (k - top).exp()
    return Sums(top, den * v, den)


def nothing(like: Sums, tokens: int = 1) -> Sums:
    """The sums of no key, in the shape of `like` but for the number of tokens."""
    top, num, den = (part.new_zeros(()).expand(*part.shape[:-2], tokens, part.shape[-1]) for part in like)
    return Sums(top + torch.finfo(top.dtype).min, num, den)


def total(k: Float[Tensor, "*b k #c"], v: Float[Tensor, "*b k c"]) -> Sums:
    """The sums over all keys, one row."""
    k, v = _wide(k), _wide(v)
    top = _floor(k.amax(-2, keepdim=True))
    weight = (k - top).exp()
    return Sums(top, (weight * v).sum(-2, keepdim=True), weight.sum(-2, keepdim=True))


def prefix(k: Float[Tensor, "*b t #c"], v: Float[Tensor, "*b t c"], start: Sums | None = None) -> Sums:
    """Row t has the sums over keys 0..t and those of `start`: a work-efficient scan, O(t c) time and memory, log2(t)
    steps.
    """
    sums = each(k, v)
    if start is None:
        return _scan(sums)
    return _scan(_join(start, sums)).at(slice(1, None))


def _join(*pieces: Sums) -> Sums:
    return Sums(*(torch.cat(parts, -2) for parts in zip(*pieces, strict=True)))


def _scan(sums: Sums) -> Sums:
    tokens = sums.num.shape[-2]
    if tokens == 1:
        return sums
    even, odd = sums.at(slice(0, None, 2)), sums.at(slice(1, None, 2))
    pairs = _scan(merge(even.at(slice(0, tokens // 2)), odd))  # row i: all up to token 2 i + 1
    inner = merge(pairs.at(slice(0, (tokens - 1) // 2)), even.at(slice(1, None)))
    even = _join(even.at(slice(0, 1)), inner)
    woven = []
    for first, second in zip(even, pairs, strict=True):
        last = first[..., second.shape[-2] :, :]
        both = torch.stack([first[..., : second.shape[-2], :], second], -2).flatten(-3, -2)
        woven.append(torch.cat([both, last], -2))
    return Sums(*woven)


def rectangle(k: Float[Tensor, "*b k c"], v: Float[Tensor, "*b k c"], w: Float[Tensor, "*w q k"]) -> Sums:
    """Every row sees every key: row q has sum exp(K + w[q]). Time q k c, memory (q + k) c + q k."""
    k, v, w = _wide(k), _wide(v), _wide(w)
    top = _floor(k.amax(-2, keepdim=True))
    weight = (k - top).exp()
    most = w.detach().amax(-1, keepdim=True)
    sums = (w - most).exp() @ torch.cat([weight * v, weight], -1)
    num, den = sums.chunk(2, -1)
    return Sums((top + most).clamp(min=torch.finfo(top.dtype).min), num, den)


def triangle(
    k: Float[Tensor, "*b t c"], v: Float[Tensor, "*b t c"], w: Float[Tensor, "*w t t"], *, strict: bool = False
) -> Sums:
    """Row t sees keys 0..t, or 0..t-1 when strict. Time t^2 c / 2, memory t c + t^2.

    Level by level: blocks of 2 h tokens, in each the second half looking at the first, h = 1, 2, 4 ..
    """
    tokens = k.shape[-2]
    sums = each(k, v)
    if strict:
        sums = nothing(sums, tokens)
    else:
        diagonal = _wide(w).diagonal(dim1=-2, dim2=-1)[..., None]
        sums = Sums((sums.top + diagonal.detach()).clamp(min=torch.finfo(sums.top.dtype).min), *_weigh(sums, diagonal))
    half = 1
    while half < tokens:
        sums = _level(sums, k, v, w, half)
        half *= 2
    return sums


def _weigh(sums: Sums, w: Tensor) -> tuple[Tensor, Tensor]:
    """exp(w) without its size, which went to the top, but with its gradient."""
    one = (w - w.detach()).exp()
    return sums.num * one, sums.den * one


def _level(sums: Sums, k: Tensor, v: Tensor, w: Tensor, half: int) -> Sums:
    tokens = k.shape[-2]
    blocks = (tokens + half - 1) // (2 * half)  # those with at least one row in their second half
    end = min(tokens, blocks * 2 * half)
    if blocks == 1:
        seen = rectangle(k[..., :half, :], v[..., :half, :], w[..., half:end, :half])
        return _join(sums.at(slice(0, half)), merge(sums.at(slice(half, end)), seen), sums.at(slice(end, None)))
    short = blocks * 2 * half - end

    def blocked(x: Tensor) -> Tensor:
        x = x[..., :end, :]
        return functional.pad(x, (0, 0, 0, short)).unflatten(-2, (blocks, 2, half))

    rows = functional.pad(w[..., :end, :end], (0, short, 0, short)) if short else w[..., :end, :end]
    rows = rows.unflatten(-2, (blocks, 2 * half)).unflatten(-1, (blocks, 2 * half))
    rows = rows.diagonal(dim1=-4, dim2=-2)  # (.., 2h rows, 2h columns, blocks)
    below = rows[..., half:, :half, :].movedim(-1, -3)
    seen = rectangle(blocked(k)[..., 0, :, :], blocked(v)[..., 0, :, :], below)
    old = Sums(*(blocked(part) for part in sums))
    lower = merge(Sums(*(part[..., 1, :, :] for part in old)), seen)
    new = (
        torch.stack([first[..., 0, :, :], second], -3).flatten(-4, -2)[..., :end, :]
        for first, second in zip(old, lower, strict=True)
    )
    return _join(Sums(*new), sums.at(slice(end, None)))


def full(
    k: Float[Tensor, "*b k c"], v: Float[Tensor, "*b k c"], w: Float[Tensor, "*w q k"], *, causal: bool
) -> Float[Tensor, "*b q c"]:
    """AFT-full: a bias for every pair. Causal: the queries are the last of the keys, each sees those up to itself."""
    if not causal or w.shape[-2] == 1:
        return rectangle(k, v, w).mean()
    past = k.shape[-2] - w.shape[-2]
    sums = triangle(k[..., past:, :], v[..., past:, :], w[..., past:])
    if past:
        sums = merge(sums, rectangle(k[..., :past, :], v[..., :past, :], w[..., :past]))
    return sums.mean()


def flip(sums: Sums) -> Sums:
    return Sums(*(part.flip(-2) for part in sums))


def window(
    k: Float[Tensor, "*b t c"],
    v: Float[Tensor, "*b t c"],
    band: Float[Tensor, "*w t lags"],
    *,
    reach: int,
    causal: bool,
) -> Sums:
    """Row t sees keys t - s + 1 .. t, or .. t + s - 1 when not causal, s = `reach`, under exp(K + band).

    `band[t, s - 1 + t' - t]` is the bias of the pair. Blocks of s tokens: the block itself, the part of the one
    before that lies above the diagonal, the part of the one behind that lies below. Time t s c, memory t (s + c).
    """
    tokens, s = k.shape[-2], reach
    short = -tokens % s
    blocks = (tokens + short) // s
    k = functional.pad(k, (0, 0, 0, short), value=-torch.inf).unflatten(-2, (blocks, s))
    v = functional.pad(v, (0, 0, 0, short)).unflatten(-2, (blocks, s))
    band = functional.pad(band, (0, 0, 0, short)).unflatten(-2, (blocks, s))
    r = torch.arange(s, device=k.device)
    lag = r - r[:, None]  # column - row

    def biases(shift: int) -> Tensor:
        index = (lag + shift + s - 1).clamp(0, band.shape[-1] - 1)
        return band.gather(-1, index.expand(*band.shape[:-1], s))

    sums = triangle(k, v, biases(0)) if causal else rectangle(k, v, biases(0))
    if blocks > 1:
        before = functional.pad(k[..., :-1, :, :], (0, 0, 0, 0, 1, 0), value=-torch.inf)
        values = functional.pad(v[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
        upper = triangle(before.flip(-2), values.flip(-2), biases(-s).flip(-2, -1), strict=True)
        sums = merge(sums, flip(upper))
        if not causal:
            behind = functional.pad(k[..., 1:, :, :], (0, 0, 0, 0, 0, 1), value=-torch.inf)
            values = functional.pad(v[..., 1:, :, :], (0, 0, 0, 0, 0, 1))
            sums = merge(sums, triangle(behind, values, biases(s), strict=True))
    return Sums(*(part.flatten(-3, -2)[..., :tokens, :] for part in sums))


def local(
    k: Float[Tensor, "*b t c"],
    v: Float[Tensor, "*b t c"],
    band: Float[Tensor, "*w q lags"],
    *,
    reach: int,
    causal: bool,
    start: Sums | None = None,
) -> tuple[Float[Tensor, "*b q c"], Sums]:
    """AFT-local: the bias within the window, 0 (not -inf) beyond it. The queries are the last of the keys.

    The sums outside and inside the window are added, which is the paper's sum over everything plus (e^w - 1) in the
    window without the cancellation of a negative e^w - 1.

    Args:
        band: `band[t, s - 1 + t' - t]` is the bias of the pair; s lags are enough when causal, 2 s - 1 go both ways.
        start: sums of keys that come before and are outside every window (causal only).

    Returns:
        The averages, and the sums of `start` and all but the last s - 1 keys: the next call's `start`.
    """
    tokens, queries = k.shape[-2], band.shape[-2]
    if causal and queries == 1:
        near = rectangle(k[..., -reach:, :], v[..., -reach:, :], band[..., max(0, reach - tokens) : reach])
        far = start if start is not None else nothing(near)
        if tokens > reach:
            far = merge(far, total(k[..., :-reach, :], v[..., :-reach, :]))
        return merge(near, far).mean(), _older(k, v, far, reach)
    near = window(k, v, functional.pad(band, (0, 0, tokens - queries, 0)), reach=reach, causal=causal)
    before = prefix(k, v, start)
    far = nothing(before, min(reach - (start is not None), tokens))
    if tokens >= reach:
        far = _join(far, *[] if start is None else [start], before.at(slice(0, tokens - reach)))
    sums = merge(near, far)
    if not causal:
        behind = flip(prefix(k.flip(-2), v.flip(-2)))
        sums = merge(sums, _join(behind.at(slice(reach, None)), nothing(behind, min(reach, tokens))))
    return sums.at(slice(tokens - queries, None)).mean(), _through(before, tokens - reach, start)


def _through(before: Sums, token: int, start: Sums | None) -> Sums:
    """The row of a prefix, or what came before the prefix."""
    if token >= 0:
        return before.at(slice(token, token + 1))
    return nothing(before) if start is None else start


def _older(k: Tensor, v: Tensor, far: Sums, reach: int) -> Sums:
    """`far` and the key that is about to leave a window that ends at the last key."""
    if k.shape[-2] < reach:
        return far
    leaving = slice(k.shape[-2] - reach, k.shape[-2] - reach + 1)
    return merge(far, each(k[..., leaving, :], v[..., leaving, :]))


def conv(
    k: Float[Tensor, "b h t"], v: Float[Tensor, "b h t c"], w: Float[Tensor, "h *s"], *, grid: tuple[int, ...]
) -> Float[Tensor, "b h t c"]:
    """AFT-conv in both directions: a bias set by the offset on a grid of 1 or 2 axes, 0 beyond the kernel, one key a
    head.

    Everything is seen, so one maximum a head is safe. The kernel's sides are odd; `grid` multiplies to t.
    """
    k, v, w = _wide(k), _wide(v), _wide(w)
    top = _floor(k.amax(-1, keepdim=True))
    weight = (k - top).exp()[..., None]
    both = torch.cat([weight * v, weight], -1)  # (b, h, t, c + 1)
    folded = both.movedim(-1, 1).flatten(0, 1).unflatten(-1, grid)
    near = (functional.conv1d, functional.conv2d)[len(grid) - 1](
        folded, torch.expm1(w)[:, None], padding=tuple(side // 2 for side in w.shape[1:]), groups=w.shape[0]
    )
    near = near.flatten(2).unflatten(0, (k.shape[0], -1)).movedim(1, -1)
    num, den = (both.sum(-2, keepdim=True) + near).split([v.shape[-1], 1], -1)
    return num / den.masked_fill(den == 0, 1.0)


def causal_conv(
    k: Float[Tensor, "b h t"],
    v: Float[Tensor, "b h t c"],
    w: Float[Tensor, "h s"],
    *,
    queries: int,
    start: Sums | None = None,
) -> tuple[Float[Tensor, "b h {queries} c"], Sums]:
    """AFT-conv along one axis, every token seeing those up to itself; w[:, -1] is the bias of the token itself.

    The queries are the last of the keys. One key a head makes the weights exp(K[t'] - top[t]) of a window cheap, (b,
    h, t, s): time t s c, memory t (s + c).

    Args:
        start: sums of keys that come before and are outside every window.

    Returns:
        The averages, and the sums of `start` and all but the last s - 1 keys: the next call's `start`.
    """
    k, v, w = _wide(k), _wide(v), _wide(w)
    tokens, s = k.shape[-1], w.shape[-1]
    if queries == 1:
        far = start if start is not None else nothing(each(k[..., :1, None], v[..., :1, :]))
        if tokens > s:
            far = merge(far, total(k[..., :-s, None], v[..., :-s, :]))
        k, v = k[..., -s:], v[..., -s:, :]
        sums = merge(far, total(k[..., None], v))
        weight = (k[..., None, :] - sums.top).exp() * torch.expm1(w)[:, None, max(0, s - tokens) :]
        following = _older(k[..., None], v, far, s)
        near = weight @ v, weight.sum(-1, keepdim=True)
    else:
        before = prefix(k[..., None], v, start)
        following = _through(before, tokens - s, start)
        near = _near(k, v, w, before.top[..., 0])
        sums = before
    sums = Sums(sums.top, sums.num + near[0], sums.den + near[1])
    return sums.at(slice(-queries, None)).mean(), following


def _near(k: Tensor, v: Tensor, w: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution with e^w - 1, blocks of s queries against 2 s keys."""
    tokens, s = k.shape[-1], w.shape[-1]
    short = -tokens % s
    top = functional.pad(top, (0, short), value=torch.inf).unflatten(-1, (-1, s))
    keys = functional.pad(k, (s, short), value=-torch.inf).unfold(-1, 2 * s, s)  # (b, h, blocks, 2 s)
    values = functional.pad(v, (0, 0, s, short)).unfold(-2, 2 * s, s).mT  # (b, h, blocks, 2 s, c)
    r = torch.arange(s, device=k.device)[:, None]
    lag = r + s - torch.arange(2 * s, device=k.device)  # (s, 2 s) how far back the key lies
    inside = (lag >= 0) & (lag < s)
    bias = torch.expm1(w)[:, (s - 1 - lag).clamp(0, s - 1)]
    weight = (keys[..., None, :] - top[..., None]).masked_fill(~inside, -torch.inf).exp() * bias[:, None]
    num, den = weight @ values, weight.sum(-1, keepdim=True)
    return num.flatten(-3, -2)[..., :tokens, :], den.flatten(-3, -2)[..., :tokens, :]
