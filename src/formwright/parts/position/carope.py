"""CARoPE: RoPE whose angles grow from token to token by amounts that the tokens choose.

Paper    Veisi, Fartoot, Amirzadeh: Context-aware Rotary Position Embedding (2025), arXiv:2507.23083.
Idea     RoPE's angle is a sum of equal steps, m f = f + f + .. + f. Here every token sets its step, by one number a
         head whose powers are the pairs' frequencies:

             f(x)_h = 1 / (1 + softplus((x W)_h + c_h))                          in (0, 1)
             phi_i(m) = sum over t <= m of f(x_t)^i                               i = 1 .. d/2

         A score knows phi(m) - phi(n), the length of the way between two tokens, measured by the tokens on it; what
         comes before both adds nothing. A cache keeps turned keys and the sum so far.
Differs  The paper has no c: start="rope" gives it a value at which, with W = 0, the steps are RoPE's; "random" has
         W from N(0, 0.02) and no c. x is what the layer's mixer reads, after its norm. A pad adds no step, and a token
         that stands p places after the one before it adds p. With fewer key than query heads there is one f for each
         key head, shared by its queries. Exponents start at 1 as in the paper; RoPE's own start at 0.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, refuse
from formwright.errors import FormwrightError
from formwright.ops.rotary import rotate, rotation
from formwright.parts.position import refuse_all_but_one_sequence
from formwright.parts.position.rotary import full_precision, turned_channels

Start = Literal["random", "rope"]


class CARoPE(nn.Module):
    """Rotary position by a path length that depends on content. One column of W for each key head of a layer.

    Args:
        dim: width of the tokens.
        heads: query heads.
        head_dim: channels of a head, even.
        kv_heads: key heads; none = as many as query heads.
        start: "random" as in the paper, or "rope" to start from RoPE's frequencies.
        base: of those frequencies, for start="rope".
    """

    scope = "layer"
    reads_tokens = True
    c: nn.Parameter | None

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        start: Start = "random",
        base: float | None = None,
    ) -> None:
        super().__init__()
        steps = heads if kv_heads is None else kv_heads
        if steps < 1 or heads % steps:
            raise FormwrightError(
                f"CARoPE needs kv_heads that divide the heads, got kv_heads={steps} and heads={heads}."
            )
        if start not in get_args(Start):
            raise FormwrightError(f'CARoPE has start="random" or "rope", got {start!r}.')
        if base is not None and (start == "random" or base <= 1):
            raise FormwrightError(
                f'CARoPE takes a base > 1 with start="rope" alone, got base={base} and start={start!r}.'
            )
        self.pairs = turned_channels("CARoPE", head_dim) // 2
        self.base = (10000.0 if base is None else base) if start == "rope" else None
        self.weight = nn.Parameter(torch.empty(steps, dim))
        self.register_parameter("c", None if self.base is None else nn.Parameter(torch.empty(steps)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.base is None:
            nn.init.normal_(self.weight, std=0.02)
        else:
            step = self.base ** (1 / self.pairs) - 1  # softplus(c) that makes f = base^(-2/d)
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.c, math.log(math.expm1(step)) if step < 30 else step)

    def frequency(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b g n"]:
        """f of every token, in fp32 (fp64 for fp64 parameters)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with full_precision(x.device):
            free = self.weight.to(dtype) @ x.to(dtype).mT
            return 1 / (1 + F.softplus(free if self.c is None else free + self.c.to(dtype)[:, None]))

    def rotate(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], context: Context
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b g k d"]]:
        """q and k of the new tokens, turned; the keys before they are cached, beside the sum of the steps.

        Raises:
            UnsupportedContext: cross-attention or a grid, where there is no way from token to token; a mixer that does
                not show what it reads.
        """
        refuse_all_but_one_sequence("CARoPE", context)
        if context.tokens is None:
            raise refuse(
                "CARoPE",
                asked="a mixer that does not show the tokens it reads",
                because="its angles are made of them",
                instead="Choose softmax attention, or set `tokens` in the context.",
            )
        phases = self._phases(context.tokens, context)
        by = rotation(phases)
        turned_k = rotate(k, by)
        if q.shape[1] != k.shape[1]:
            by = rotation(phases.repeat_interleave(q.shape[1] // k.shape[1], 1))
        return rotate(q, by), turned_k

    def _phases(self, x: Tensor, context: Context) -> Float[Tensor, "b g n half"]:
        """phi at the new tokens; the cache takes the last."""
        f = self.frequency(x)
        powers = torch.arange(1, self.pairs + 1, dtype=f.dtype, device=f.device)
        steps = torch.exp(powers * f.log()[..., None]) * self._places(context).to(f.dtype)[:, None, :, None]
        cache = context.cache
        if cache is not None and cache.carried is not None:
            steps = torch.cat((steps[:, :, :1] + cache.carried[:, :, None], steps[:, :, 1:]), 2)
        phases = steps.cumsum(2)
        if cache is not None:
            cache.carried = phases[:, :, -1]
        return phases

    def _places(self, context: Context) -> Tensor:
        """How many places each new token is from the one before it, (1 or b, n); the first of all is one from the
        start, pads are none.
        """
        n = context.queries
        if context.positions is None:
            places = torch.ones(1, n, dtype=torch.long, device=context.device)
        else:
            reached = context.positions
            if context.padding is not None:  # a pad stands where the last real token before it does
                reached = torch.where(context.padding, reached, -1).cummax(-1).values
            places = F.pad(reached, (1, 0), value=-1).diff(dim=-1)[:, -n:]
        return places if context.real is None else places * context.real
