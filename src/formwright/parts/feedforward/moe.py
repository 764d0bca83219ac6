"""Mixture of experts: a router sends every token to a few of several feed-forward layers.

Paper    Shazeer et al.: Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer (ICLR 2017),
         arXiv:1701.06538; Fedus, Zoph, Shazeer: Switch Transformers (JMLR 2022), arXiv:2101.03961 (balance loss);
         Zoph et al.: ST-MoE (2022), arXiv:2202.08906 (router z loss); Zhou et al.: Mixture-of-Experts with Expert
         Choice Routing (NeurIPS 2022), arXiv:2202.09368; Dai et al.: DeepSeekMoE (2024), arXiv:2401.06066 (shared
         experts).
Idea     Parameters grow with the number of experts E, the work of a token with the number k that it meets.

             p = softmax(W_r x)                          y = sum over the chosen e of g_e FFN_e(x) (+ FFN_shared(x))

             renormalized    each token takes its k most probable experts, g = p / sum of the k p    (GShard, Mixtral)
             plain           the same with g = p                                                     (Switch, OLMoE)
             expert-choice   each expert takes the ceil(k n / E) tokens of a sequence with the largest p_e, g = p;
                             a token meets k experts on average and may meet none

             balance   b E sum over e of f_e P_e         f_e share of the choices, P_e mean of p_e; b at perfect balance
             z         z mean of (log sum over e of exp((W_r x)_e))^2

         No expert has a capacity, so no token is dropped: tokens are sorted by expert, and each expert multiplies its
         own. Pads go to no expert and count in no loss.
Differs  The balance loss of transformers' Mixtral is k times ours. Switch's capacity, which drops tokens, and Shazeer's
         noise on the router are left out. Expert choice picks within a sequence, the paper within a batch. Experts have
         no biases.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.build import build
from formwright.contracts import Context, refuse
from formwright.errors import FormwrightError
from formwright.ops.linear import linear
from formwright.parts.feedforward import Usage

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "swiglu": F.silu, "geglu": F.gelu}
FEW = 16  # tokens an expert, below which one product of all groups is quicker than one for each


def balance_loss(
    p: Float[Tensor, "t experts"], chosen: Bool[Tensor, "t experts"], weight: Float[Tensor, " t"]
) -> Float[Tensor, ""]:
    """E times the sum of f_e P_e: 1 when the experts are chosen equally often.

    Args:
        p: probabilities of the router.
        chosen: which experts a token takes.
        weight: of the tokens in the mean, in sum 1.
    """
    share = chosen.sum(0) / chosen.sum().clamp(min=1)
    return p.shape[1] * (share * (weight @ p)).sum()


def router_z_loss(logits: Float[Tensor, "t experts"], weight: Float[Tensor, " t"]) -> Float[Tensor, ""]:
    """The mean square of the logarithm of the router's partition function."""
    return weight @ logits.logsumexp(-1).square()


class MoE(nn.Module):
    """(b, n, d) -> (b, n, d); every token alone, but for expert choice. `usage` counts how often experts are chosen.

    Compiled or exported it gives the same values but computes every expert for every token.

    Args:
        dim: width d.
        hidden: width of the hidden layer of one expert.
        experts: how many there are, besides the shared ones.
        active: experts a token meets, with expert choice on average.
        routing: who chooses, and how the chosen are weighted; see the module.
        expert: what an expert is.
        shared: experts that every token meets in addition, unweighted, as one layer `shared` times as wide.
        balance: weight of the balance loss; none = 0.01 where tokens choose. Expert choice is balanced and has none.
        z: weight of the router z loss.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden: int,
        experts: int = 8,
        active: int = 2,
        routing: Literal["renormalized", "plain", "expert-choice"] = "renormalized",
        expert: Literal["gelu", "relu", "swiglu", "geglu"] = "gelu",
        shared: int = 0,
        balance: float | None = None,
        z: float = 0.001,
    ) -> None:
        super().__init__()
        if routing not in ("renormalized", "plain", "expert-choice"):
            raise FormwrightError(f"MoE has routing renormalized, plain or expert-choice, got {routing!r}.")
        if expert not in ACTIVATIONS:
            raise FormwrightError(f"MoE's expert is one of {', '.join(ACTIVATIONS)}, got {expert!r}.")
        if hidden < 1:
            raise FormwrightError(f"An expert needs a hidden width of at least 1, got {hidden}.")
        by_experts = routing == "expert-choice"
        if not 1 <= active <= experts or shared < 0:
            raise FormwrightError(
                f"MoE needs from 1 to all of its experts active and shared >= 0; got experts={experts}, "
                f"active={active} and shared={shared}."
            )
        if routing == "renormalized" and active == 1:
            raise FormwrightError(
                'One active expert, renormalized, has the gate 1, and its router learns nothing: set routing="plain".'
            )
        balance = (0.0 if by_experts else 0.01) if balance is None else balance
        if balance < 0 or z < 0 or (by_experts and balance > 0):
            raise FormwrightError(
                f"MoE needs balance >= 0 and z >= 0, and expert choice, which is balanced by itself, balance=0; got "
                f"routing={routing!r}, balance={balance} and z={z}."
            )
        self.active, self.routing, self.balance, self.z = active, routing, balance, z
        self.gated = expert in ("swiglu", "geglu")
        self.activation = ACTIVATIONS[expert]
        self.router = nn.Parameter(torch.empty(experts, dim))
        self.up = nn.Parameter(torch.empty(experts, (1 + self.gated) * hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))
        wide = build("feedforward", expert, dim=dim, hidden=shared * hidden, bias=False) if shared else None
        self.shared: nn.Module | None = wide
        self.usage = Usage(experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts uniform, as far as one over the square root of what each neuron reads; the shared one is not set."""
        nn.init.normal_(self.router, std=0.02)
        for weight in (self.up, self.down):
            nn.init.uniform_(weight, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)

    def forward(self, x: Float[Tensor, "b n d"], context: Context | None = None) -> Float[Tensor, "b n d"]:
        if self.routing == "expert-choice" and context is not None and context.causal:
            raise refuse(
                "MoE with expert choice",
                asked="a causal model",
                because="whether an expert takes a token depends on the tokens after it",
                instead='Set routing="renormalized" or "plain".',
            )
        tokens = x.flatten(0, 1)
        real = None if context is None or context.real is None else context.real.flatten()
        logits = self.logits(tokens)
        p = logits.softmax(-1)
        if self.routing == "expert-choice":
            gates, chosen = self._by_experts(
                p.view(*x.shape[:2], p.shape[1]), None if real is None else real.view(x.shape[:2])
            )
        else:
            gates, chosen = self._by_tokens(p, real)
        if self.training and context is not None:
            weight = p.new_ones(p.shape[0]) if real is None else real.to(p.dtype)
            weight = weight / weight.sum().clamp(min=1)
            if self.balance > 0:
                context.add_loss("balance", self.balance * balance_loss(p, chosen, weight))
            if self.z > 0:
                context.add_loss("router z", self.z * router_z_loss(logits, weight))
        if torch.compiler.is_compiling():
            weights = zip(gates.unbind(1), self.up.unbind(), self.down.unbind(), strict=True)
            parts = [gate[:, None] * self._expert(tokens, up, down) for gate, up, down in weights]
            y = torch.stack(parts).sum(0)
        else:
            y = self._grouped(tokens, gates, chosen)
        y = y.to(x.dtype).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def logits(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t experts"]:
        """In float32 at least: rounded scores would choose other experts."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.router.to(wide))

    def _by_tokens(
        self, p: Float[Tensor, "t experts"], real: Bool[Tensor, " t"] | None
    ) -> tuple[Float[Tensor, "t experts"], Bool[Tensor, "t experts"]]:
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(self.active).indices, True)
        gates = p * chosen
        if self.routing == "renormalized":
            gates = gates / gates.sum(-1, keepdim=True)
        if real is None:
            return gates, chosen
        return gates * real[:, None], chosen & real[:, None]

    def _by_experts(
        self, p: Float[Tensor, "b n experts"], real: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "t experts"], Bool[Tensor, "t experts"]]:
        """A row takes as many tokens an expert as it would alone, without its pads."""
        n, experts = p.shape[1:]
        each = (self.active * n + experts - 1) // experts
        if real is None:
            places, taken = p.topk(each, dim=1).indices, torch.ones_like(p[:, :each], dtype=torch.bool)
        else:
            places = p.masked_fill(~real[..., None], -1).topk(each, dim=1).indices
            room = (self.active * real.sum(1) + experts - 1) // experts
            rank = torch.arange(each, device=p.device)
            taken = (rank < room[:, None])[..., None].expand_as(places)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, places, taken)
        return (p * chosen).flatten(0, 1), chosen.flatten(0, 1)

    def _grouped(
        self, x: Float[Tensor, "t d"], gates: Float[Tensor, "t experts"], chosen: Bool[Tensor, "t experts"]
    ) -> Float[Tensor, "t d"]:
        """Each expert multiplies the tokens that chose it, or that it chose."""
        expert, token = chosen.T.nonzero(as_tuple=True)
        self.usage.add(expert)
        rows, counts = x.index_select(0, token), chosen.sum(0)
        if self._are_few(rows):
            ends = counts.cumsum(0, dtype=torch.int32)
            neurons = self._active(F.grouped_mm(rows, self.up.mT, offs=ends))
            y = F.grouped_mm(neurons, self.down.mT, offs=ends)
        else:
            groups = zip(rows.split(counts.tolist()), self.up.unbind(), self.down.unbind(), strict=True)
            y = torch.cat([self._expert(group, up, down) for group, up, down in groups if len(group)] or [rows])
        y = y * gates.T.masked_select(chosen.T)[:, None]
        return y.new_zeros(x.shape).index_add(0, token, y)

    def _expert(
        self, x: Float[Tensor, "r d"], up: Float[Tensor, "u d"], down: Float[Tensor, "d h"]
    ) -> Float[Tensor, "r d"]:
        return linear(self._active(linear(x, up)), down)

    def _active(self, neurons: Float[Tensor, "r u"]) -> Float[Tensor, "r h"]:
        if not self.gated:
            return self.activation(neurons)
        gate, value = neurons.chunk(2, dim=-1)
        return self.activation(gate) * value

    def _are_few(self, rows: Float[Tensor, "r d"]) -> bool:
        """Whether a call for every expert costs more than it saves, and torch's product of groups takes the sizes."""
        return (
            len(rows) < FEW * len(self.up)
            and rows.device.type == "cpu"
            and rows.dtype == self.up.dtype
            and rows.dtype in (torch.float32, torch.bfloat16)
            and all(size % 8 == 0 for size in (*self.up.shape[1:], self.down.shape[2]))
            and not torch.is_autocast_enabled("cpu")
        )
