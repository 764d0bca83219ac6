"""PEER: of very many experts of one neuron each, a token retrieves a few by product keys.

Paper    He: Mixture of A Million Experts (2024), arXiv:2407.04153.
Idea     The neurons of a feed-forward layer are kept in two tables of N rows. Each of h retrieval heads makes a query
         and takes the k experts whose keys have the largest products with it: the token assembles a layer of h k
         neurons from N. The key of expert i n + j is two of 2 n sub-keys, [c_i; c'_j], N = n^2, so that the best of N
         are found from 2 n products.

             q_a = norm(W_a x)                                 over the tokens of the batch (batch normalisation)
             I_a = the k largest of s_ij = q_a1 . c_i + q_a2 . c'_j        g_a = softmax of those k s

             y = sum over a of the sum over i in I_a of g_ai act(u_i . x) v_i

         All heads share keys and experts, an expert may be retrieved by several, and no balance loss is needed. A token
         costs d h c + 2 n c h for queries and keys of width c and 2 h k d for the experts: of order sqrt(N).
Differs  The paper has 1,024^2 experts; here the default is 128^2. Batch normalisation lets the tokens of a batch meet
         in training, the past and the future too; in evaluation, with the statistics that training gathered, it does
         not. Pads are left out of them. Tables start uniform with variance 1 / d, keys uniform up to 1 / sqrt(c / 2),
         as in product-key memories. The gradients of the tables are dense arrays: an optimizer step costs N.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.ops.linear import linear
from formwright.ops.peer import row_dots, row_sums, search
from formwright.parts.feedforward import Usage


class TokenNorm(nn.Module):
    """Batch normalisation of (t, c) over the real tokens, in the dtype of its input.

    Args:
        width: features c.
        momentum: share of a batch in the statistics that evaluation uses.
        eps: added to the variance.
    """

    mean: Float[Tensor, " c"]
    var: Float[Tensor, " c"]

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.register_buffer("mean", torch.empty(width))
        self.register_buffer("var", torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tensor in (self.weight, self.var):
            nn.init.ones_(tensor)
        for tensor in (self.bias, self.mean):
            nn.init.zeros_(tensor)

    def forward(self, x: Float[Tensor, "t c"], real: Bool[Tensor, " t"] | None = None) -> Float[Tensor, "t c"]:
        mean, var = self.mean.to(x.dtype), self.var.to(x.dtype)
        kept = x if real is None or not self.training else x[real]
        if self.training and kept.shape[0] > 1:  # one token alone has no spread
            var, mean = torch.var_mean(kept, 0, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
                self.var.lerp_((var * kept.shape[0] / (kept.shape[0] - 1)).to(self.var.dtype), self.momentum)
        scale = self.weight.to(x.dtype) * (var + self.eps).rsqrt()
        return torch.addcmul(self.bias.to(x.dtype) - mean * scale, x, scale)


class PEER(nn.Module):
    """(b, n, d) -> (b, n, d), every token alone in evaluation. `usage` counts how often experts are retrieved.

    Args:
        dim: width d.
        experts: N, a square.
        retrievals: heads h, each with a query of its own.
        active: experts k that each of them takes.
        key_dim: width c of a query and a key, halved for the sub-keys.
        activation: of the experts' neurons.
        gate: over the k scores of a head, or of each score alone.
        query_norm: whether queries are batch-normalised, which evens out the use of the experts.
    """

    def __init__(
        self,
        *,
        dim: int,
        experts: int = 16384,
        retrievals: int = 8,
        active: int = 16,
        key_dim: int = 128,
        activation: Literal["gelu", "relu"] = "gelu",
        gate: Literal["softmax", "sigmoid"] = "softmax",
        query_norm: bool = True,
    ) -> None:
        super().__init__()
        side = math.isqrt(max(0, experts))
        if experts < 1 or side * side != experts:
            raise FormwrightError(
                f"PEER finds its experts on a square of sub-keys: experts is {experts}, the next square is "
                f"{(side + 1) ** 2}."
            )
        if retrievals < 1 or not 1 <= active <= experts or key_dim < 2 or key_dim % 2:
            raise FormwrightError(
                f"PEER needs retrievals >= 1, from 1 to all experts active and an even key_dim; got "
                f"retrievals={retrievals}, active={active} of experts={experts} and key_dim={key_dim}."
            )
        for name, value, choices in (
            ("activation", activation, ("gelu", "relu")),
            ("gate", gate, ("softmax", "sigmoid")),
        ):
            if value not in choices:
                raise FormwrightError(f"PEER's {name} is {' or '.join(choices)}, got {value!r}.")
        self.retrievals, self.active, self.activation, self.gate = retrievals, active, activation, gate
        self.query = nn.Parameter(torch.empty(retrievals * key_dim, dim))
        self.keys = nn.Parameter(torch.empty(2, side, key_dim // 2))
        self.up, self.down = (nn.Parameter(torch.empty(experts, dim)) for _ in range(2))
        self.norm = TokenNorm(retrievals * key_dim) if query_norm else None
        self.usage = Usage(experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for table in (self.query, self.up, self.down):
            nn.init.uniform_(table, -((3 / table.shape[1]) ** 0.5), (3 / table.shape[1]) ** 0.5)
        nn.init.uniform_(self.keys, -(self.keys.shape[2] ** -0.5), self.keys.shape[2] ** -0.5)

    def forward(self, x: Float[Tensor, "b n d"], context: Context | None = None) -> Float[Tensor, "b n d"]:
        real = None if context is None or context.real is None else context.real.flatten()
        tokens = x.flatten(0, 1).to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):  # rounded scores would retrieve other experts
            index, gates = self.retrieve(tokens, real)
            self.usage.add(index if real is None else index[real])
            neurons = row_dots(tokens, self.up, index)
            active = F.gelu(neurons) if self.activation == "gelu" else F.relu(neurons)
            y = row_sums(active * gates, self.down, index)
        return y.to(x.dtype).view_as(x)

    def retrieve(
        self, x: Float[Tensor, "t d"], real: Bool[Tensor, " t"] | None = None
    ) -> tuple[Tensor, Float[Tensor, "t m"]]:
        """The experts of every token, head after head, and their gates."""
        q = linear(x, self.query.to(x.dtype))
        q = q if self.norm is None else self.norm(q, real)
        keys = self.keys.to(x.dtype)
        halves = q.view(-1, 2, keys.shape[2])  # of all heads of all tokens
        found = search(halves.detach(), keys.detach(), self.active)
        n = keys.shape[1]
        scores = row_dots(halves[:, 0], keys[0], found // n) + row_dots(halves[:, 1], keys[1], found % n)
        gates = scores.softmax(-1) if self.gate == "softmax" else scores.sigmoid()
        chosen = self.retrievals * self.active
        return found.view(x.shape[0], chosen), gates.view(x.shape[0], chosen)
