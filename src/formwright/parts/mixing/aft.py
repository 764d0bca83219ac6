"""AFT: tokens mixed by learned position biases and one softmax a channel, without products of queries and keys.

Paper    Zhai et al.: An Attention Free Transformer (2021), arXiv:2105.14103.
Idea     Every channel takes its own weighted mean of the values; the query only gates what comes out.

             Y_t = sigmoid(Q_t) * [sum_t' exp(K_t' + w_t,t') * V_t'] / [sum_t' exp(K_t' + w_t,t')]

         over all t', or t' <= t when causal.

         full    w of every pair of positions (T, T), the same for all channels, or w = u v^T of a small rank
         simple  w = 0: one mean for all, or the mean so far
         local   w learned for |t - t'| < s and 0 (not -inf) beyond, so that distant tokens still count
         conv    w set by t - t' within a kernel of side s, one a head, on a line or on a grid; K has one channel a
                 head. w = gamma (raw - mean) / std + beta, gamma and beta a head, both 0 at the start, which is
                 simple with shared keys

         Time T^2 D, T D, T s D, T s D (s^2 on a grid); memory T D beside w. Decoding keeps the keys and values (full)
         or a state of constant size (the others): the sums so far and the last s - 1 keys and values.
Differs  The sums outside and inside a window are added where the paper adds (e^w - 1) to the sum of everything; the
         same in exact arithmetic. A token's row and column of w are those of its position, so that padding on the left
         moves nothing; lags of local and conv count tokens. One matrix V and one Q with D channels, as in the paper;
         biases on the projections are an option.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import init

from formwright.contracts import SCORE_HOOKS, Context, Hook, hooks, refuse
from formwright.errors import FormwrightError
from formwright.ops import aft
from formwright.ops.aft import Sums


class AFT(nn.Module):
    """What the four share: projections, the gate and the refusals. A subclass mixes k and v.

    Args:
        dim: width D.
        keys: channels of K.
        bias: whether the projections have biases.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "state"
    hooks: ClassVar[frozenset[Hook]] = frozenset()
    crosses: ClassVar[bool] = False
    planar: ClassVar[bool] = False

    def __init__(self, *, dim: int, keys: int, bias: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, keys, bias=bias)
        self.value, self.out = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.inner_width = dim
        self.inner: nn.Module = nn.Identity()
        self.out.role = "out"

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        self.check(context)
        mean = self.mean(x if context.memory is None else context.memory, context)
        return self.out(self.inner(self.query(x).sigmoid() * mean.to(x.dtype)))

    def mean(self, source: Float[Tensor, "b k d"], context: Context) -> Float[Tensor, "b n d"]:
        """The weighted means, (b, 1, d) when all tokens have the same."""
        return self.mix(self.key(source), self.value(source), context)

    def check(self, context: Context) -> None:
        """Refuse before any work what cannot be honoured."""
        name = type(self).__name__
        if hooks(context.shared_position) & SCORE_HOOKS:
            raise refuse(
                name,
                asked="a position that acts on attention scores",
                because="it has none",
                instead="Choose a position that is added to the tokens, such as sinusoidal, or none.",
            )
        if context.attentions is not None:
            raise refuse(
                name,
                asked="output_attentions",
                because="its weights differ from channel to channel and are never formed",
                instead="Choose softmax to see weights.",
            )
        if context.grid is not None and not self.planar:
            raise refuse(
                name,
                asked=f"the grid {context.grid}",
                because="it knows places in one sequence",
                instead="Leave the grid out to go along the rows, or choose aft-conv.",
            )
        if context.memory is not None and not self.crosses:
            raise refuse(
                name,
                asked="cross-attention",
                because="its bias is set by the distance of two places in one sequence",
                instead="Choose aft-full, aft-simple or softmax for the cross-attention.",
            )
        if context.memory is None and context.cache is not None and not context.causal:
            raise refuse(
                name,
                asked="a cache without causality",
                because="earlier tokens would see later ones",
                instead="Pass use_cache=False.",
            )

    def mix(self, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """(b, k, keys), (b, k, d) -> the means (b, n or 1, d), float32 or wider."""
        raise NotImplementedError


def hide(k: Float[Tensor, "b k c"], context: Context) -> Float[Tensor, "b k c"]:
    """Padded keys at -inf. The keys are the last of the context's."""
    if context.padding is None:
        return k
    return k.masked_fill(~context.padding[:, -k.shape[1] :, None], -torch.inf)


def places(context: Context, *, name: str, length: int) -> slice | Int[Tensor, "b k"]:
    """Where the keys stand: a slice when that is their order, else (1, k) or (b, k) positions.

    Without positions, rows padded on the left are counted by their real tokens; padding on the right moves none.

    Raises:
        FormwrightError: a position has no bias (while compiling it is the indexing that fails).
    """
    traced, padding = torch.compiler.is_compiling(), context.padding
    ordered = padding is None or (not traced and bool((padding[:, 1:] <= padding[:, :-1]).all()))
    if context.positions is None and ordered:
        at, last = slice(0, context.keys), context.keys - 1
    else:
        at = padding.cumsum(-1) - 1 if context.positions is None else context.positions
        at = at.clamp(min=0)
        last = 0 if traced else int(at.max())
    if last >= length:
        raise too_long(name, last, length)
    return at


def too_long(name: str, position: int, length: int) -> FormwrightError:
    return FormwrightError(
        f"{name} has biases for {length} positions and was given position {position}; "
        "build it with a larger length, or choose aft-simple or aft-conv, which have no longest length."
    )


def last(at: slice | Int[Tensor, "b k"], queries: int) -> slice | Int[Tensor, "b q"]:
    """The places of the queries, the last of the keys."""
    return slice(at.stop - queries, at.stop) if isinstance(at, slice) else at[:, -queries:]


class AFTFull(AFT):
    """A bias for every pair of positions.

    Args:
        dim: width D.
        length: longest sequence T.
        rank: columns of u and v in w = u v^T (2 T rank numbers); none = w itself (T^2).
        std: of the initial w, or u and v. Not 0, which would leave u and v without a gradient.
        bias: whether the projections have biases.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "keys"
    crosses: ClassVar[bool] = True

    def __init__(self, *, dim: int, length: int, rank: int | None = 128, std: float = 0.01, bias: bool = True) -> None:
        super().__init__(dim=dim, keys=dim, bias=bias)
        if length < 1 or (rank is not None and rank < 1) or std <= 0:
            raise FormwrightError(
                f"AFTFull needs length, rank and std above 0, got length={length}, rank={rank} and std={std}."
            )
        self.length, self.std = length, std
        if rank is None:
            self.pairs = nn.Parameter(torch.empty(length, length))
        else:
            self.rows, self.columns = nn.Parameter(torch.empty(length, rank)), nn.Parameter(torch.empty(length, rank))
        self.rank = rank
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in [self.pairs] if self.rank is None else [self.rows, self.columns]:
            init.normal_(parameter, std=self.std)

    def mean(self, source: Float[Tensor, "b k d"], context: Context) -> Float[Tensor, "b n d"]:
        if context.memory is None or context.cache is None:
            return super().mean(source, context)
        return self.mix(*self._stored(source, context), context)

    def _stored(self, memory: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """K and V of the memory, made once. Behind them the cache has one empty slot for every query that has passed,
        which is how the next step knows its row of w.
        """
        stored = context.cache.stored()
        if stored is None:
            stored = context.cache.update(self.key(memory)[:, None], self.value(memory)[:, None])
        return stored[0][:, 0], stored[1][:, 0]

    def mix(self, k: Tensor, v: Tensor, context: Context) -> Tensor:
        columns = places(context, name="AFTFull", length=self.length)
        if context.memory is None:
            rows = last(columns, context.queries)
            if context.cache is not None:
                k, v = (x[:, 0] for x in context.cache.update(k[:, None], v[:, None]))
        else:
            past = k.shape[1] - context.keys
            k, v = k[:, : context.keys], v[:, : context.keys]
            if context.cache is not None:
                slots = k.new_zeros(len(k), 1, context.queries, k.shape[-1])
                context.cache.update(slots, slots)
            rows = slice(past, past + context.queries)
            if rows.stop > self.length:
                raise too_long("AFTFull", rows.stop - 1, self.length)
        return aft.full(hide(k, context), v, self.biases(rows, columns), causal=context.causal)

    def biases(
        self, rows: slice | Int[Tensor, "r q"], columns: slice | Int[Tensor, "c k"]
    ) -> Float[Tensor, "q k"] | Float[Tensor, "b q k"]:
        """w at these positions, one for all rows of the batch when they agree."""
        if self.rank is not None:
            return self.rows[rows] @ self.columns[columns].mT
        if isinstance(columns, slice):
            return self.pairs[rows, columns]
        if isinstance(rows, slice):
            return self.pairs[rows][:, columns].transpose(0, 1)
        if columns.shape[0] == 1:
            return self.pairs[rows].index_select(-1, columns[0])
        return self.pairs[rows[:, :, None], columns[:, None, :]]


class AFTSimple(AFT):
    """No bias: the mean of all values under exp(K), or of those so far. No position but what the tokens carry.

    Args:
        dim: width D.
        bias: whether the projections have biases.
    """

    crosses: ClassVar[bool] = True

    def __init__(self, *, dim: int, bias: bool = True) -> None:
        super().__init__(dim=dim, keys=dim, bias=bias)

    def mean(self, source: Float[Tensor, "b k d"], context: Context) -> Float[Tensor, "b n d"]:
        if context.memory is None or context.cache is None:
            return super().mean(source, context)
        if context.cache.state is None:  # the memory does not change between decoding steps
            context.cache.write(*aft.total(hide(self.key(source), context), self.value(source)), tokens=0)
        return Sums(*context.cache.state).mean()

    def mix(self, k: Tensor, v: Tensor, context: Context) -> Tensor:
        k = hide(k, context)
        if not context.causal or context.memory is not None:
            return aft.total(k, v).mean()
        if context.cache is None:
            return aft.prefix(k, v).mean()
        start = None if context.cache.state is None else Sums(*context.cache.state)
        sums = aft.prefix(k, v, start)
        context.cache.write(*sums.at(slice(-1, None)), tokens=context.queries)
        return sums.mean()


class AFTLocal(AFT):
    """A bias within a window; beyond it the bias is 0, not -inf.

    Args:
        dim: width D.
        length: longest sequence T.
        window: s; keys with |t - t'| < s have a bias (32 in the paper's text model, 256 in its image model).
        causal: whether it only ever looks back, which halves the biases.
        std: of the initial biases.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        *,
        dim: int,
        length: int,
        window: int = 32,
        causal: bool = False,
        std: float = 0.01,
        bias: bool = True,
    ) -> None:
        super().__init__(dim=dim, keys=dim, bias=bias)
        if length < 1 or window < 1 or std < 0:
            raise FormwrightError(
                f"AFTLocal needs length and window above 0 and std from 0, got length={length}, window={window} and "
                f"std={std}."
            )
        self.length, self.std, self.causal = length, std, causal
        self.window = min(window, length)
        self.band = nn.Parameter(torch.empty(length, self.window if causal else 2 * self.window - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.band, std=self.std)

    def check(self, context: Context) -> None:
        super().check(context)
        if self.causal and not context.causal:
            raise refuse(
                "AFTLocal",
                asked="a bidirectional sequence",
                because="it was built with causal=True and has no bias for later tokens",
                instead="Build it with causal=False.",
            )

    def mix(self, k: Tensor, v: Tensor, context: Context) -> Tensor:
        at = last(places(context, name="AFTLocal", length=self.length), context.queries)
        k, band, s = hide(k, context), self.band[at], self.window
        if context.cache is None:
            return aft.local(k, v, band, reach=s, causal=context.causal)[0]
        start = None
        if context.cache.state is not None:
            *sums, keys, values = context.cache.state
            start, k, v = Sums(*sums), torch.cat([keys, k], 1), torch.cat([values, v], 1)
        mean, start = aft.local(k, v, band, reach=s, causal=True, start=start)
        context.cache.write(*start, *tail(k, v, s - 1), tokens=context.queries)
        return mean


def tail(k: Tensor, v: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The last keys and values (.., tokens, c), hidden ones in front when there are fewer."""
    short, first = max(0, tokens - k.shape[-2]), max(0, k.shape[-2] - tokens)
    pad = nn.functional.pad
    return pad(k[..., first:, :], (0, 0, short, 0), value=-torch.inf), pad(v[..., first:, :], (0, 0, short, 0))


class AFTConv(AFT):
    """A bias set by the offset, one kernel a head, on a line or (both ways only) on a grid. No longest length.

    Args:
        dim: width D.
        heads: keys, each shared by D / heads channels (AFT-conv-384-11 has 384).
        grid: axes of the grid the tokens lie on; two make the kernel square.
        kernel: side s, odd. Causal calls read it as the s last tokens.
        bias: whether the projections have biases.
    """

    planar: ClassVar[bool] = True

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        grid: tuple[int, ...] | None = None,
        kernel: int = 11,
        bias: bool = True,
    ) -> None:
        super().__init__(dim=dim, keys=heads, bias=bias)
        axes = 1 if grid is None else len(grid)
        if heads < 1 or dim % heads:
            raise FormwrightError(f"A width of {dim} does not split into {heads} heads; choose a divisor.")
        if axes not in (1, 2):
            raise FormwrightError(f"AFTConv knows lines and planes, but the grid {grid} has {axes} axes.")
        if kernel < 3 or kernel % 2 == 0:
            raise FormwrightError(f"AFTConv needs an odd kernel from 3, got {kernel}.")
        self.heads, self.kernel, self.axes = heads, kernel, axes
        self.raw = nn.Parameter(torch.empty(heads, *[kernel] * axes))
        self.gamma, self.beta = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.raw)
        init.zeros_(self.gamma)
        init.zeros_(self.beta)

    def weight(self) -> Float[Tensor, "h *s"]:
        """The kernels w."""
        raw = self.raw.flatten(1)
        spread = (raw - raw.mean(1, keepdim=True)) / raw.std(1, correction=0, keepdim=True)
        return (self.gamma[:, None] * spread + self.beta[:, None]).view_as(self.raw)

    def check(self, context: Context) -> None:
        super().check(context)
        if self.axes == 2 and context.causal:
            raise refuse(
                "AFTConv",
                asked="a causal grid",
                because="a plane has no order of its tokens",
                instead="Build it without a grid to go along the rows.",
            )
        tokens = context.queries
        if self.axes == 2 and (context.grid is None or math.prod(context.grid) != tokens or len(context.grid) != 2):
            raise refuse(
                "AFTConv",
                asked=f"{tokens} tokens on the grid {context.grid}",
                because="its kernels have two axes and need a plane that holds every token",
                instead="Leave out extra tokens such as a class token (pooling='mean'), or build it without a grid.",
            )
        if self.axes == 1 and context.grid is not None and len(context.grid) > 1:
            raise refuse(
                "AFTConv",
                asked=f"the grid {context.grid}",
                because="its kernels have one axis",
                instead="Build it with that grid.",
            )

    def mix(self, k: Tensor, v: Tensor, context: Context) -> Tensor:
        k, v = hide(k, context).mT, v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        tokens, w = context.queries, self.weight()
        if not context.causal:
            grid = (tokens,) if self.axes == 1 else context.grid
            mean = aft.conv(k, v, w, grid=grid)
        elif context.cache is None:
            mean, _ = aft.causal_conv(k, v, w, queries=tokens)
        else:
            start = None
            if context.cache.state is not None:
                *sums, keys, values = context.cache.state
                start, k, v = Sums(*sums), torch.cat([keys, k], -1), torch.cat([values, v], -2)
            mean, start = aft.causal_conv(k, v, w, queries=tokens, start=start)
            keys, values = tail(k[..., None], v, self.kernel - 1)
            context.cache.write(*start, keys[..., 0], values, tokens=tokens)
        return mean.transpose(1, 2).flatten(2)
