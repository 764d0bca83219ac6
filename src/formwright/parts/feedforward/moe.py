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

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.build import build
from formwright.contracts import Context, refuse
from formwright.errors import FormwrightError
from formwright.parts.feedforward import Usage


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
        by_experts = routing == "expert-choice"
        if not 1 <= active <= experts or shared < 0:
            raise FormwrightError(
                f"MoE needs from 1 to all of its experts active and shared >= 0; got experts={experts}, "
                f"active={active} and shared={shared}."
            )
        if routing == "renormalized" and active == 1:
            raise FormwrightError(
                'One active expert renormalized has the gate 1 always, and the router learns nothing: set routing="plain".'
            )
        balance = (0.0 if by_experts else 0.01) if balance is None else balance
        if balance < 0 or z < 0 or (by_experts and balance > 0):
            raise FormwrightError(
                f"MoE needs balance >= 0 and z >= 0, and expert choice, which is balanced by itself, balance=0; got "
                f"routing={routing!r}, balance={balance} and z={z}."
            )
        self.active, self.routing, self.balance, self.z = active, routing, balance, z
        self.router = nn.Parameter(torch.empty(experts, dim))
        self.experts = nn.ModuleList(
            build("feedforward", expert, dim=dim, hidden=hidden, bias=False) for _ in range(experts)
        )
        wide = build("feedforward", expert, dim=dim, hidden=shared * hidden, bias=False) if shared else None
        self.shared: nn.Module | None = wide
        self.usage = Usage(experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The router's; the experts have their own."""
        nn.init.normal_(self.router, std=0.02)

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
            gates, chosen = self._by_experts(p.view(*x.shape[:2], -1), None if real is None else real.view(x.shape[:2]))
        else:
            gates, chosen = self._by_tokens(p, real)
        if self.training and context is not None:
            weight = p.new_ones(len(p)) if real is None else real.to(p.dtype)
            weight = weight / weight.sum().clamp(min=1)
            if self.balance > 0:
                context.add_loss("balance", self.balance * balance_loss(p, chosen, weight))
            if self.z > 0:
                context.add_loss("router z", self.z * router_z_loss(logits, weight))
        if torch.compiler.is_compiling():
            y = sum(gates[:, e, None] * expert(x).flatten(0, 1) for e, expert in enumerate(self.experts))
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
        groups = x[token].split(chosen.sum(0).tolist())
        # In training an expert without tokens runs too: its gradient is 0, not absent.
        results = [
            one(rows[None])[0] for one, rows in zip(self.experts, groups, strict=True) if len(rows) or self.training
        ]
        weights = gates.T.masked_select(chosen.T)[:, None]
        y = torch.cat(results) * weights if results else weights * x[:0]
        return y.new_zeros(x.shape).index_add(0, token, y)
