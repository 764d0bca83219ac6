"""PERFT: small adapters beside a mixture of experts, with a router of their own or the model's.

Paper    Liu, Zhao, Huang, Liu, Wang, Chen, Xie: PERFT: Parameter-Efficient Routed Fine-Tuning for Mixture-of-Expert
         Model (2024), arXiv:2411.08212.
Idea     A token of a mixture of experts passes a few of many feed-forward layers. Fine-tuning follows: everything is
         frozen, and beside the experts stand bottlenecks of rank r, of which a token takes those a router chooses.

             Delta(h) = s act(h A^T) B      A, B (r, D), B = 0 at first;  LoRA: act = id, s = alpha / r

             routed    MoE(h) + sum over the K' best j of p~_j Delta_j(h)     p~ = softmax(h W~^T), W~ (M, D) new
             embedded  sum over the K best i of p_i (E_i(h) + Delta_i(h))      p = the model's own router's
             dense     MoE(h) + sum_j Delta_j(h)
             single    MoE(h) + Delta(h)

         Trained are A, B and W~. A trained router is kept from using few adapters only by Switch's loss, times the
         model's own coefficient:  M sum_j f_j P_j, f_j = share of tokens that take j, P_j = mean of p~_j.
Differs  All adapters of a layer read the same dropped-out input, and all of them run, as two products, a weight of 0
         standing for one that was not chosen: at small ranks this costs less than sorting the tokens. The paper's
         released code weighs a routed adapter by the model's router; here it is p~ as in the paper, so that W~ learns
         from the task. Weights of the chosen are normalised where the model's own router does so. The balancing loss
         is the mean over layers and of tokens that are no padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from formwright.errors import FormwrightError
from formwright.tuners.register import register

NAME = "formwright_perft"
Variant = Literal["routed", "embedded", "dense", "single"]


@dataclass
class PERFTConfig(PeftConfig):
    """Which adapters, and where.

    Args:
        variant: "routed" (PERFT-R), "embedded" (E), "dense" (D) or "single" (S).
        r: rank of an adapter.
        lora_alpha: s = lora_alpha / r; none = 2 r. Not with an activation.
        dropout: probability of dropping an entry of an adapter's input.
        activation: of a parallel adapter (a name of transformers', such as "relu"), for which s = 1; none = LoRA.
        adapters: M of routed (4 unless set) and dense (4) ones.
        top_k: K' of routed ones (2 unless set).
        balance: coefficient of the balancing loss of routed ones; none = the model's `router_aux_loss_coef`.
        target_modules: the mixtures of experts (of embedded ones, their `experts`); none = all of the model.
        exclude_modules: of these, those without adapters.
        modules_to_save: other modules to train and save as they are, such as a classifier.
    """

    variant: Variant = "routed"
    r: int = 16
    lora_alpha: float | None = None
    dropout: float = 0.05
    activation: str | None = None
    adapters: int | None = None
    top_k: int | None = None
    balance: float | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME.upper()]
        for name in ("target_modules", "exclude_modules"):  # PEFT reads a list as names only when it is a set
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.variant not in get_args(Variant):
            raise FormwrightError(f"variant is {self.variant!r}, but it must be one of {', '.join(get_args(Variant))}.")
        if self.r < 1 or not 0 <= self.dropout < 1:
            raise FormwrightError(
                f"PERFT needs r from 1 and a dropout from 0 to below 1, got r={self.r} and dropout={self.dropout}."
            )
        if self.activation is not None and self.activation not in ACT2FN:
            raise FormwrightError(f"{self.activation!r} is no activation of transformers: try relu, gelu or silu.")
        if self.activation is not None and self.lora_alpha is not None:
            raise FormwrightError("lora_alpha scales a LoRA; a parallel adapter has none: leave out one of the two.")
        routed = self.variant == "routed"
        if not routed and (self.top_k is not None or self.balance is not None):
            raise FormwrightError(f"top_k and balance are of routed adapters: leave them out of a {self.variant} one.")
        if self.variant in ("embedded", "single") and self.adapters is not None:
            many = "as many adapters as the model has experts" if self.variant == "embedded" else "one adapter"
            raise FormwrightError(f"A {self.variant} PERFT has {many}: leave adapters out.")
        if self.variant in ("routed", "dense") and self.adapters is None:
            self.adapters = 4
        if routed and self.top_k is None:
            self.top_k = min(2, self.adapters)
        chosen = 1 if self.top_k is None else self.top_k
        if chosen < 1 or (self.adapters is not None and self.adapters < chosen):
            raise FormwrightError(
                f"PERFT needs adapters and top_k from 1, and no more chosen than there are; got "
                f"adapters={self.adapters} and top_k={self.top_k}."
            )
        if self.balance is not None and self.balance < 0:
            raise FormwrightError(f"balance is the coefficient of a loss, from 0 on, got {self.balance}.")


class Routing(NamedTuple):
    """Where a router sent the tokens."""

    probabilities: Float[Tensor, "t m"]
    weights: Float[Tensor, "t m"]  # 0 for adapters that were not chosen
    chosen: Bool[Tensor, "t m"]


class Adapters(nn.Module):
    """M bottlenecks beside each other; PERFT-D, and with one PERFT-S.

    Args:
        count: M.
        dim: D.
        r: rank.
        alpha: over r the scaling; none = 1.
        activation: its name; none = linear.
        dropout: on the input.
    """

    def __init__(
        self, count: int, dim: int, *, r: int, alpha: float | None, activation: str | None, dropout: float
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(count, r, dim).uniform_(-(dim**-0.5), dim**-0.5))  # as nn.Linear's
        self.up = nn.Parameter(torch.zeros(count, r, dim))
        self.scaling = 1.0 if alpha is None else alpha / r
        self.activation = None if activation is None else ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        return self.mixed(x, None)

    def mixed(self, x: Float[Tensor, "*rows d"], weights: Float[Tensor, "t m"] | None) -> Float[Tensor, "*rows d"]:
        """The sum of all adapters' outputs, each times its weight for the token."""
        inner = F.linear(self.dropout(x.to(self.down.dtype)), self.down.flatten(0, 1)) * self.scaling
        if self.activation is not None:
            inner = self.activation(inner)
        if weights is not None:
            parts = inner.reshape(*weights.shape, -1) * weights[..., None].to(inner.dtype)
            inner = parts.reshape(inner.shape)
        return inner @ self.up.flatten(0, 1)


class Embedded(Adapters):
    """PERFT-E: one adapter an expert, chosen and weighted as the expert is."""

    def forward(
        self, x: Float[Tensor, "t d"], top_k_index: Int[Tensor, "t k"], top_k_weights: Float[Tensor, "t k"]
    ) -> Float[Tensor, "t d"]:
        weights = top_k_weights.new_zeros(len(x), len(self.down)).scatter(1, top_k_index, top_k_weights)
        return self.mixed(x, weights)


class Routed(Adapters):
    """PERFT-R: each token takes the `top_k` adapters that a router of its own likes best.

    Args:
        top_k: K'.
        normalise: the weights of those chosen sum to 1.
        balance: coefficient of the balancing loss.
        (others as above)
    """

    def __init__(self, count: int, dim: int, *, top_k: int, normalise: bool, balance: float, **rest: Any) -> None:
        super().__init__(count, dim, **rest)
        self.router = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))
        self.top_k, self.normalise, self.balance = top_k, normalise, balance
        self.last: Routing | None = None  # of this step, for the balancing loss

    def route(self, x: Float[Tensor, "*rows d"]) -> Routing:
        logits = F.linear(x.to(self.router.dtype).flatten(0, -2), self.router)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        best, index = probabilities.topk(self.top_k, -1)
        if self.normalise:
            best = best / best.sum(-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(1, index, best)
        return Routing(probabilities, weights, torch.zeros_like(weights, dtype=torch.bool).scatter(1, index, True))

    def __getstate__(self) -> dict[str, Any]:  # a copy starts without what belongs to a step of the original
        return {**self.__dict__, "last": None}

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        routing = self.route(x)
        if self.training and self.balance > 0 and self.router.requires_grad:
            self.last = routing
        return self.mixed(x, routing.weights)


def imbalance(routing: Routing, real: Bool[Tensor, " t"] | None = None) -> Float[Tensor, ""]:
    """M sum_j f_j P_j over the real tokens: K' where all adapters are used alike."""
    taken, probabilities = routing.chosen.to(routing.probabilities.dtype), routing.probabilities
    if real is not None:
        taken, probabilities = taken[real], probabilities[real]
    return probabilities.shape[1] * (taken.mean(0) * probabilities.mean(0)).sum()


class PERFTLayer(nn.Module, BaseTunerLayer):
    """A mixture of experts, or its experts, with adapters beside it."""

    adapter_layer_names = (f"{NAME}_adapters",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.formwright_perft_adapters = nn.ModuleDict()
        self._disable_adapters, self.merged_adapters = False, []

    def add(self, name: str, adapters: Adapters) -> None:
        weight = next(self.base_layer.parameters())
        self.formwright_perft_adapters[name] = adapters
        if not any(parameter.is_meta for parameter in adapters.parameters()):
            adapters.to(weight.device, weight.dtype)
        self.set_adapter(self.active_adapters)

    def active(self) -> list[Adapters]:
        names = [] if self.disable_adapters else self.active_adapters
        return [self.formwright_perft_adapters[name] for name in names if name in self.formwright_perft_adapters]

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """`routing` are the indices and weights that experts are given, (t, K) each."""
        mixed = self.base_layer(hidden_states, *routing)
        for adapters in self.active():
            mixed = mixed + adapters(hidden_states, *routing).to(mixed.dtype)
        return mixed

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:  # noqa: ARG002
        raise FormwrightError(
            "PERFT's adapters stand beside layers that are not linear and have no weights to be merged into: keep the "
            "adapter, or take it off with unload()."
        )


class PERFTModel(BaseTuner):
    """What PEFT builds for a PERFTConfig."""

    prefix, tuner_layer_cls, target_module_mapping = f"{NAME}_", PERFTLayer, {}

    def _check_new_adapter_config(self, config: PERFTConfig) -> None:
        super()._check_new_adapter_config(config)
        if len({one.variant == "embedded" for one in self.peft_config.values()}) > 1:
            raise FormwrightError(
                "Embedded adapters stand inside the mixture of experts and the others beside it: put them on two "
                "copies of the model, not on one."
            )

    def _prepare_adapter_config(self, peft_config: PERFTConfig, model_config: dict) -> PERFTConfig:  # noqa: ARG002
        return peft_config  # the modules are found by what they are, in _prepare_model

    def _prepare_model(self, peft_config: PERFTConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            inside = ".experts" if peft_config.variant == "embedded" else ""
            blocks = [name for name, module in model.named_modules() if is_mixture(module)]
            peft_config.target_modules = {name.replace(".base_layer", "") + inside for name in blocks}
        if not peft_config.target_modules:
            raise FormwrightError(
                "This model has no mixture of experts with a router of top-k and fused experts, as OLMoE and Mixtral "
                "have: PERFT has nothing to stand beside; take LoRA."
            )

    def _create_and_replace(
        self,
        peft_config: PERFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002 - PEFT's signature
    ) -> None:
        block = parent if peft_config.variant == "embedded" else target
        block = block.base_layer if isinstance(block, PERFTLayer) else block
        if not is_mixture(block) or (block is parent and target_name != "experts"):
            wanted = "the experts of a mixture" if peft_config.variant == "embedded" else "a mixture of experts"
            raise FormwrightError(f"{current_key} is not {wanted}: leave target_modules out, and all are found.")
        adapters = self._adapters(peft_config, block)
        if isinstance(target, PERFTLayer):
            target.add(adapter_name, adapters)
            return
        layer = PERFTLayer(target)
        layer.add(adapter_name, adapters)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:  # noqa: ARG002
        setattr(parent, child_name, new_module)  # PEFT's own would move `weight`, which a mixture does not have

    def _adapters(self, config: PERFTConfig, block: nn.Module) -> Adapters:
        alpha = 2.0 * config.r if config.lora_alpha is None else config.lora_alpha
        common = {
            "r": config.r,
            "alpha": None if config.activation else alpha,
            "activation": config.activation,
            "dropout": config.dropout,
        }
        dim = block.gate.hidden_dim
        if config.variant == "embedded":
            return Embedded(block.gate.num_experts, dim, **common)
        if config.variant != "routed":
            return Adapters(config.adapters or 1, dim, **common)
        normalise = getattr(block.gate, "norm_topk_prob", True)  # Mixtral's router always does, and has no such field
        if normalise and config.top_k == 1:
            raise FormwrightError(
                "This model's router normalises the weights of those chosen, which would be 1 for top_k=1, whatever "
                "the adapters' router says: choose a top_k from 2."
            )
        coefficient = config.balance
        if coefficient is None:
            coefficient = getattr(self.model.config, "router_aux_loss_coef", None)
        if coefficient is None:
            raise FormwrightError("This model has no router_aux_loss_coef: set balance, such as balance=0.01.")
        return Routed(
            config.adapters, dim, top_k=config.top_k, normalise=normalise, balance=float(coefficient), **common
        )

    def _pre_injection_hook(self, model: nn.Module, config: PERFTConfig, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.balancing = model.register_forward_hook(add_balance, with_kwargs=True)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        unloaded = super()._unload_and_optionally_merge(*args, **kwargs)
        self.balancing.remove()
        return unloaded


def is_mixture(module: nn.Module) -> bool:
    """Whether a module is a mixture of experts as transformers builds them now: a top-k router and fused experts."""
    gate = getattr(module, "gate", None)
    known = all(isinstance(getattr(gate, name, None), int) for name in ("top_k", "num_experts", "hidden_dim"))
    return known and isinstance(getattr(module, "experts", None), nn.Module)


def add_balance(model: nn.Module, given: tuple, named: Mapping[str, Any], output: Any) -> Any:  # noqa: ARG001
    """A hook on the model: the balancing losses of its routed adapters join the loss, where it has computed one."""
    routed = [
        adapters for layer in model.modules() if isinstance(layer, PERFTLayer) for adapters in layer.active()
        if isinstance(adapters, Routed) and adapters.last is not None
    ]  # fmt: skip
    steps = [(adapters.balance, adapters.last) for adapters in routed]
    for adapters in routed:
        adapters.last = None
    if not steps or named.get("labels") is None:
        return output
    if torch.is_grad_enabled() and not all(routing.probabilities.requires_grad for _, routing in steps):
        raise FormwrightError(
            "Gradient checkpointing with use_reentrant=True cuts the adapters' router off from its balancing loss: "
            "choose use_reentrant=False, or balance=0."
        )
    padding = named.get("attention_mask")
    tokens = len(steps[0][1].weights)
    real = None
    if padding is not None and padding.ndim == 2 and padding.numel() == tokens:
        real = padding.flatten().bool()
    layers = sum(isinstance(layer, PERFTLayer) for layer in model.modules())
    added = sum(coefficient * imbalance(routing, real) for coefficient, routing in steps) / layers
    if isinstance(output, tuple):
        return (output[0] + added.to(output[0].dtype), *output[1:])
    output["extra_losses"] = {**(output.get("extra_losses") or {}), "perft-balance": added}
    output.loss = output.loss + added.to(output.loss.dtype)
    return output


register(NAME, PERFTConfig, PERFTModel)
