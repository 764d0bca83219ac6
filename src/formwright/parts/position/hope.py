"""HoPE: rotary position with hyperbolic functions, by which the weight of every pair of channels decays with distance.

Paper    Dai, Shan, Song, Liang: HoPE: Hyperbolic Rotary Positional Encoding for Stable Long-Range Dependency Modeling
         in Large Language Models (2025), arXiv:2509.05218.
Idea     RoPE's angles make a score swing with distance. A Lorentz boost in place of each rotation, damped faster than
         it grows, makes it fall:

             B(p) = [[cosh p, sinh p], [sinh p, cosh p]],   B(p) B(r) = B(p + r),   B(-p) = B(p)^-1
             score[m, n] = sum over pairs of e^(-t k f) q^T B(t f) k / sqrt(d)     t = m - n >= 0, f as in RoPE, k >= 1

         In the basis x+ = (x1 + x2) / sqrt 2, x- = (x1 - x2) / sqrt 2 of a pair that is two plain decays:

             e^(-t k f) q^T B(t f) k = e^(-t (k - 1) f) q+ k+ + e^(-t (k + 1) f) q- k-

         For a key ahead of the query t stands for its size in the damping alone, so that the two rates change places.
         k (the paper's rate of damping over f) is a number a head, learned as 1 + softplus(rho).
Differs  The factors e^(-m ..) and e^(n ..) of the paper overflow within tens of tokens. Here the positions are halved
         again and again: between a later half of queries and an earlier half of keys both factors, counted from the
         border, are at most 1, and one matrix product gives the scores; what is left near the diagonal is formed pair
         by pair. O(N^2 d) work as any attention, no factor above 1. The cache keeps keys as they come. One k for all
         pairs of a head and its first value are our choice, both directions our extension.

Far scores go to 0, not to minus infinity: far tokens keep equal weights, unlike ALiBi's.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, refuse
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import repeat_heads
from formwright.parts.position import refuse_all_but_one_sequence
from formwright.parts.position.rotary import frequencies, full_precision, turned_channels

LEAF = 8  # tokens between which scores are formed pair by pair


class HoPE(nn.Module):
    """Scores whose every channel decays with distance. One parameter a head, no longest length.

    Args:
        heads: query heads.
        head_dim: channels of a head, even.
        damping: k at the start, how many times faster than the boost grows it is damped; 1 = half of the channels never
            decay.
        learned: whether every head of every layer learns its k.
        base: of the frequencies, as in RoPE.
    """

    scope = "layer"
    no_weight_decay = ("rho",)
    rho: nn.Parameter | None

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        damping: float = 1 + math.log(2),
        learned: bool = True,
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        if heads < 1 or base <= 0:
            raise FormwrightError(f"HoPE needs heads >= 1 and base > 0, got heads={heads} and base={base}.")
        if damping < 1 or (learned and damping == 1):
            raise FormwrightError(
                f"HoPE needs damping above 1, or 1 with learned=False: below it scores would grow; got {damping}."
            )
        self.channels, self.base = turned_channels("HoPE", head_dim), base
        self.heads, self.damping = heads, damping
        self.register_parameter("rho", nn.Parameter(torch.empty(heads)) if learned else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.rho is not None:
            beyond = self.damping - 1  # softplus(rho)
            nn.init.constant_(self.rho, math.log(math.expm1(beyond)) if beyond < 30 else beyond)

    def rates(self, like: Tensor) -> tuple[Float[Tensor, "h d"], Float[Tensor, "h d"]]:
        """How fast the channels x+, then x-, of every head decay: towards keys behind, and towards keys ahead."""
        f = like.new_tensor(frequencies(self.channels, self.base))
        k = like.new_full((self.heads,), self.damping) if self.rho is None else 1 + F.softplus(self.rho.to(like.dtype))
        slow, fast = (k - 1)[:, None] * f, (k + 1)[:, None] * f
        return torch.cat((slow, fast), -1), torch.cat((fast, slow), -1)

    def scores(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], context: Context
    ) -> Float[Tensor, "b h q k"]:
        """The products of the new queries and all keys, over sqrt(d), in fp32 (fp64 for fp64).

        Raises:
            UnsupportedContext: cross-attention or a grid, where m - n is no distance; positions that fall.
        """
        refuse_all_but_one_sequence("HoPE", context)
        at = _places(context)
        past = context.past
        with full_precision(q.device):
            q, k = _basis(q) * self.channels**-0.5, _basis(repeat_heads(k, self.heads))
            behind, ahead = self.rates(q)
            found = square(q, k[:, :, past:], at[:, past:], behind, None if context.causal else ahead)
            if past:
                old = between(q, k[:, :, :past], at[:, past:], at[:, :past], at[:, past : past + 1], behind)
                found = torch.cat((old, found), -1)
        return found


def _basis(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h n d"]:
    """x+ of all pairs, then x-; fp32 or wider."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((first + second, first - second), -1) / math.sqrt(2)


def _places(context: Context) -> Int[Tensor, "rows k"]:
    """Where the keys stand, in rising order.

    Raises:
        UnsupportedContext: a real token stands before the real one it follows (not asked while compiling).
    """
    at = context.positions
    if at is None:
        return torch.arange(context.keys, device=context.device)[None]
    if not torch.compiler.is_compiling():
        falls = at.diff(dim=-1) < 0
        if context.padding is not None:
            falls = falls & context.padding[:, 1:] & context.padding[:, :-1]
        if bool(falls.any()):
            raise refuse(
                "HoPE",
                asked="positions that fall from one token to the next",
                because="the order of the tokens says which of two is behind",
                instead="Give positions in rising order.",
            )
    return at


def between(
    q: Float[Tensor, "b h *c q d"],
    k: Float[Tensor, "b h *c k d"],
    at_q: Int[Tensor, "rows *c q"],
    at_k: Int[Tensor, "rows *c k"],
    border: Int[Tensor, "rows *c 1"],
    rates: Float[Tensor, "h d"],
) -> Float[Tensor, "b h *c q k"]:
    """Decayed products of queries on one side of a border and keys on the other."""
    return (q * decay(at_q - border, rates)) @ (k * decay(at_k - border, rates)).mT


def decay(steps: Int[Tensor, "rows *n"], rates: Float[Tensor, "h d"]) -> Float[Tensor, "rows h *n d"]:
    """e^(-|steps| rates) of every head."""
    shape = (rates.shape[0], *[1] * (steps.ndim - 1), rates.shape[1])
    return torch.exp(-steps.abs().to(rates.dtype)[:, None, ..., None] * rates.view(shape))


def square(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    at: Int[Tensor, "rows n"],
    behind: Float[Tensor, "h d"],
    ahead: Float[Tensor, "h d"] | None,
) -> Float[Tensor, "b h n n"]:
    """Decayed products of all queries and keys of one stretch; without `ahead`, those with keys ahead are 0.

    The stretch is filled up to 2^l leaves of at most LEAF tokens.
    """
    n = q.shape[2]
    leaves = 1 << max(0, math.ceil(math.log2(n / LEAF)))
    missing = -n % leaves
    q, k = (F.pad(x, (0, 0, 0, missing))[:, :, None] for x in (q, k))
    at = torch.cat((at, at[:, -1:].expand(-1, missing)), -1)[:, None]
    return _halved(q, k, at, behind, ahead, leaves)[:, :, 0, :n, :n]


def _halved(
    q: Float[Tensor, "b h c n d"],
    k: Float[Tensor, "b h c n d"],
    at: Int[Tensor, "rows c n"],
    behind: Float[Tensor, "h d"],
    ahead: Float[Tensor, "h d"] | None,
    leaves: int,
) -> Float[Tensor, "b h c n n"]:
    """`square` of c stretches at once: the two halves of each among themselves, and what lies across."""
    if leaves == 1:
        return _leaf(q, k, at, behind, ahead)
    (q1, q2), (k1, k2) = (x.unflatten(3, (2, -1)).unbind(3) for x in (q, k))
    at1, at2 = at.unflatten(2, (2, -1)).unbind(2)
    border = at2[..., :1]
    q, k = (torch.stack(pair, 3).flatten(2, 3) for pair in ((q1, q2), (k1, k2)))
    within = _halved(q, k, torch.stack((at1, at2), 2).flatten(1, 2), behind, ahead, leaves // 2)
    first, second = within.unflatten(2, (-1, 2)).unbind(3)
    back = between(q2, k1, at2, at1, border, behind)
    forth = torch.zeros_like(back) if ahead is None else between(q1, k2, at1, at2, border, ahead)
    return torch.cat((torch.cat((first, forth), -1), torch.cat((back, second), -1)), -2)


def _leaf(
    q: Float[Tensor, "b h c n d"],
    k: Float[Tensor, "b h c n d"],
    at: Int[Tensor, "rows c n"],
    behind: Float[Tensor, "h d"],
    ahead: Float[Tensor, "h d"] | None,
) -> Float[Tensor, "b h c n n"]:
    """Pair by pair, n x n x d numbers."""
    steps = at[..., :, None] - at[..., None, :]
    weights = decay(steps.clamp(min=0), behind)
    if ahead is None:
        n = q.shape[3]
        weights = weights * torch.ones(n, n, dtype=q.dtype, device=q.device).tril()[..., None]
    else:
        weights = weights * decay(steps.clamp(max=0), ahead)
    return (q[..., :, None, :] * k[..., None, :, :] * weights).sum(-1)
