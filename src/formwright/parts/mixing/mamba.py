"""Mamba: a recurrent mixer whose step size, input and output maps depend on the token.

Paper    Gu, Dao: Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023), arXiv:2312.00752.
Idea     Every channel carries a small linear state. How far a token moves it, what the token writes and what is read
         from it are functions of the token, so content can be kept or let go; a gate takes the place of an MLP.

             (x, z)     = in_proj(u)                                  two halves of expand * dim channels
             x          = SiLU(conv1d(x))                             causal, each channel by itself
             (dt, B, C) = x_proj(x)                                   dt_rank, state, state
             delta      = softplus(dt_proj(dt))
             h_t        = exp(delta_t A) h_{t-1} + Bbar_t x_t         A = -exp(A_log)
             y_t        = C_t . h_t + D x_t
             out        = out_proj(y * SiLU(z))

         Time and memory are linear in length; decoding keeps conv - 1 inputs and one state, whatever the length.
Differs  Bbar = delta B as in the released code; the text's zero-order hold is discretization="zoh" (Theorem 1 needs
         it). Parameters are named as in transformers' MambaMixer. A_log, D, softplus and scan run in float32 or
         wider whatever the model's dtype.
"""

import math
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from formwright.contracts import SCORE_HOOKS, Context, Hook, hooks, refuse
from formwright.ops.mamba import can_step, causal_conv_silu, mamba_step
from formwright.ops.selective_scan import Discretization, selective_scan
from formwright.parts.norm.init import is_loaded


class Mamba(nn.Module):
    """A selective state space between two projections. Causal only.

    Args:
        dim: width of a token.
        expand: inner channels over dim.
        state: states n of a channel.
        conv: taps of the causal convolution.
        dt_rank: rank of the map to the step sizes; none = dim / 16, rounded up.
        discretization: "euler", or "zoh" for the exact zero-order hold.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start; they are spread evenly in log space.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "state"
    hooks: ClassVar[frozenset[Hook]] = frozenset()
    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_log", "D")

    def __init__(
        self,
        *,
        dim: int,
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        dt_rank: int | None = None,
        discretization: Discretization = "euler",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        for name, value in (("dim", dim), ("expand", expand), ("state", state), ("conv", conv), ("dt_rank", rank)):
            if value < 1:
                raise ValueError(f"Mamba needs {name} of 1 or more, got {value}.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba needs 0 < dt_min <= dt_max, got dt_min={dt_min} and dt_max={dt_max}.")
        if discretization not in get_args(Discretization):
            raise ValueError(f'Mamba\'s discretization is "euler" or "zoh", got {discretization!r}.')
        self.discretization: Discretization = discretization
        self.rank, self.dt_min, self.dt_max = rank, dt_min, dt_max
        self.inner_width = inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.inner: nn.Module = nn.Identity()
        self.out_proj.role = "out"
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What a general scheme would spoil: decay rates 1, 2, .., n, steps from dt_min to dt_max, direct path 1."""
        init.ones_(self.D)
        init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        if not is_loaded(self.A_log):
            rates = torch.arange(1, self.A_log.shape[1] + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(rates.log().expand_as(self.A_log))
        if not is_loaded(self.dt_proj.bias):
            low, high = math.log(self.dt_min), math.log(self.dt_max)
            steps = torch.rand(self.dt_proj.bias.shape, device=self.dt_proj.bias.device).mul(high - low).add(low).exp()
            self.dt_proj.bias.copy_(steps + (-torch.expm1(-steps)).log())  # softplus of it is the step

    def forward(self, x: Float[Tensor, "b n d"], context: Context) -> Float[Tensor, "b n d"]:
        self.check(context)
        real, cache = context.real, context.cache
        # A padded token must reach neither the convolution's neighbours nor the state, which it neither feeds nor lets
        # decay: its input is zero before the convolution and its step is zero in the scan.
        xz = self.in_proj(x if real is None else x * real[..., None])  # (b, n, 2 c)
        window, h = (None, None) if cache is None or cache.state is None else cache.state
        if window is not None and self.can_step(xz, window, h) and (real is None or bool(real.all())):
            y, window, h = self.step(xz, window, h, real)
        else:
            x, z = xz.chunk(2, -1)
            seen = x if window is None else torch.cat([window.to(x.dtype), x], 1)
            x = causal_conv_silu(seen, self.conv1d.weight, self.conv1d.bias)[:, seen.shape[1] - x.shape[1] :]
            y, h = self.scan(x, h, real)
            y = y.to(z.dtype) * F.silu(z)
            window = None if cache is None else self.window(seen, real)
        if cache is not None:
            cache.write(window, h, tokens=xz.shape[1])
        return self.out_proj(self.inner(y))

    def can_step(self, xz: Float[Tensor, "b n two_c"], *state: Tensor) -> bool:
        """Whether one native call serves: it reads the weights, so no adapter or hook may stand on the projections."""
        return (
            self.discretization == "euler"
            and can_step(xz, self.A_log, *state)
            and all(len(part) == len(xz) for part in state)
            and type(self.x_proj) is type(self.dt_proj) is nn.Linear
            and not (self.x_proj._forward_hooks or self.x_proj._forward_pre_hooks)
        )

    def window(self, seen: Float[Tensor, "b l c"], real: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b kept c"]:
        """The inputs that the convolution of the next token reads: the last real ones, zeros before the first."""
        kept = self.conv1d.kernel_size[0] - 1
        if real is not None:  # padding goes to the front, where it is the zeros it was projected to
            before = real.new_ones(len(real), seen.shape[1] - real.shape[1])
            order = torch.cat([before, real], 1).long().argsort(dim=1, stable=True)
            seen = seen.gather(1, order[..., None].expand_as(seen))
        return F.pad(seen, (0, 0, kept, 0))[:, seen.shape[1] :].clone()

    def scan(
        self, x: Float[Tensor, "b n c"], state: Float[Tensor, "b c s"] | None, real: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b c s"]]:
        """The selective scan with its maps made from x, in float32 or wider: outputs, and the state after them."""
        wide = torch.promote_types(x.dtype, torch.float32)
        n = self.A_log.shape[1]
        dt, B, C = self.x_proj(x).split([self.rank, n, n], -1)
        if type(self.dt_proj) is nn.Linear:  # its bias in float32 or wider
            delta = F.softplus(F.linear(dt, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide))
        else:  # an adapter
            delta = F.softplus(self.dt_proj(dt).to(wide))
        if real is not None:
            delta = delta * real[..., None]
        A = -self.A_log.to(wide).exp()
        maps = (values.to(wide) for values in (B, C, self.D))
        return selective_scan(x.to(wide), delta, A, *maps, state=state, discretization=self.discretization)

    def step(
        self,
        xz: Float[Tensor, "b 1 two_c"],
        window: Float[Tensor, "b kept c"],
        state: Float[Tensor, "b c s"],
        real: Bool[Tensor, "b 1"] | None,
    ) -> tuple[Float[Tensor, "b 1 c"], Float[Tensor, "b kept c"], Float[Tensor, "b c s"]]:
        """All between the projections for one token, in one call."""
        return mamba_step(
            xz,
            window,
            state,
            conv_weight=self.conv1d.weight,
            conv_bias=self.conv1d.bias,
            x_weight=self.x_proj.weight,
            dt_weight=self.dt_proj.weight,
            dt_bias=self.dt_proj.bias,
            A_log=self.A_log,
            D=self.D,
            real=real,
        )

    def check(self, context: Context) -> None:
        """Refuse before any work what cannot be honoured."""
        if context.memory is not None:
            asked, because = "cross-attention", "it reads one sequence"
            instead = "Choose softmax for the cross-attention."
        elif not context.causal:
            asked, because = "a bidirectional sequence", "its state runs from the first token to the last"
            instead = "Choose a decoder (causal), or a mixer whose card lists bidirectional."
        elif context.grid is not None:
            asked, because = f"the grid {context.grid}", "it knows places in one sequence"
            instead = "Leave the grid out to go along the rows."
        elif context.attentions is not None:
            asked, because = "output_attentions", "it has no attention weights"
            instead = "Choose softmax to see weights."
        elif hooks(context.shared_position) & SCORE_HOOKS:
            asked, because = "a position that acts on attention scores", "it has none"
            instead = "Choose a position that is added to the tokens, such as sinusoidal, or none."
        else:
            return
        raise refuse("Mamba", asked=asked, because=because, instead=instead)
