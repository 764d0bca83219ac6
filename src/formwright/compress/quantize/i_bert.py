"""I-BERT: an encoder that computes in whole numbers from the embedding tables to the answer.

Paper    Kim et al.: I-BERT (ICML 2021), arXiv:2101.01321.
Idea     Weights, activations and all between are integers with scales fixed beforehand; GELU, softmax, tanh and
         LayerNorm are the integer functions of formwright.ops.integer. The scales come from running ranges on training
         rows, and the weights are then trained a little through the same program, carried in floats.

    weights      8 bits, a scale a row             biases       32 bits, scale S_w S_x
    embeddings   8 bits, a scale a table           their sum    16 bits
    products     int8 x int8 -> int32, then requantised to 8 bits
    functions    see scale 2^-12; residual sums have 22 bits; softmax gives 8, unsigned
    ranges       r <- 0.95 r + 0.05 (min, max) of the batch, while training; S = max |r| / (2^(b-1) - 1)

The program is `encode`, written once against an arithmetic: `Simulation` carries whole numbers in float64, has
gradients and finds the constants; `IntegerEncoder` holds the constants and computes on integer tensors alone. Both give
the same numbers. The answer is multiplied by its scale at the very end.
Differs  An accumulator is brought to one scale before a function, where the paper derives the function's constants from
         each row's scale. LayerNorm's bias is added in units of its requantisation, not as bias / weight: a weight of
         zero is no exception. Masked keys get exactly 0. Dropout is off in training.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from formwright.compress.finetune import Budget, trainable
from formwright.compress.modifier import Data, Modifier
from formwright.compress.quantize.integer_program import (
    FUNCTION,
    SCORES,
    WIDE,
    Plan,
    encode,
    inputs_of,
    merge_heads,
    names_of,
    plan_of,
    split_heads,
)
from formwright.compress.structure import Executor, Rebuilt, attach, replace
from formwright.errors import FormwrightError
from formwright.ops.integer import (
    dyadic,
    i_gelu,
    i_layernorm,
    i_softmax,
    i_tanh,
    int_matmul,
    quantise,
    requantise,
    scale_of,
    straight,
)
from formwright.training import fit

MOMENTUM = 0.95


def loss_of(model: PreTrainedModel, logits: Float[Tensor, "b c"], labels: Tensor) -> Float[Tensor, ""]:
    """As the sequence classifiers of transformers have it."""
    problem, count = model.config.problem_type, model.config.num_labels
    if problem == "regression" or (problem is None and count == 1):
        return F.mse_loss(logits.squeeze(-1) if count == 1 else logits, labels.to(logits.dtype))
    if problem == "multi_label_classification" or (problem is None and labels.is_floating_point()):
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


# In floats, with gradients


class Scaled(NamedTuple):
    """Whole numbers in float64, and their scale: one, or one for each place of the last axis."""

    q: Tensor
    scale: Tensor

    @property
    def real(self) -> Tensor:
        return self.q * self.scale


class Simulation(nn.Module):
    """The program on a model's own weights, quantised anew in every call. `constants` are those of the last call.

    Args:
        model: what is trained; its forward is not used.
    """

    def __init__(self, model: PreTrainedModel, *, weight_bits: int, activation_bits: int) -> None:
        super().__init__()
        self.model = model
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.plan, anatomy = plan_of(model)
        self.paths = names_of(model, anatomy, self.plan)
        self.ranges: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}  # of the states and of the answer

    def forward(self, labels: Tensor | None = None, **batch: Any) -> dict[str, Tensor]:
        states, answer = self.encoded(batch)
        self.scales = {"states": states.scale} if answer is None else {"states": states.scale, "answer": answer.scale}
        if answer is None:
            return {"states": states.real}
        logits = answer.real
        loss = {} if labels is None else {"loss": loss_of(self.model, logits, labels)}
        return {**loss, "logits": logits, "states": states.real}

    def encoded(self, batch: Mapping[str, Any]) -> tuple[Scaled, Scaled | None]:
        longest = self.module("position").weight.shape[0]
        return encode(self, self.plan, inputs_of(self.plan, batch, longest))

    def module(self, name: str) -> Any:
        return self.model.get_submodule(self.paths[name])

    def scale(self, name: str, real: Tensor, bits: int) -> Tensor:
        """From the running range, which follows while training."""
        if self.training or name not in self.ranges:
            seen = torch.stack(real.detach().double().aminmax())
            old = self.ranges.get(name, seen)
            self.ranges[name] = MOMENTUM * old + (1 - MOMENTUM) * seen
        return scale_of(self.ranges[name].abs().amax(), bits)

    def keep(self, name: str, **constants: Tensor) -> None:
        for what, value in constants.items():
            self.constants[f"{name}.{what}"] = value.detach()

    def move(self, name: str, x: Scaled, scale: Tensor | float, bits: int, digits: int = 31) -> Scaled:
        scale = torch.as_tensor(scale, dtype=torch.float64, device=x.q.device)
        m, e = dyadic(x.scale / scale, digits)
        self.keep(name, m=m, e=e)
        return Scaled(requantise(x.q, m, e, bits), scale)

    def embed(self, name: str, ids: Tensor) -> Scaled:
        weight = self.module(name).weight
        scale = scale_of(weight.abs().amax(), self.weight_bits)
        table = quantise(weight, scale, self.weight_bits)
        self.keep(name, table=table.to(torch.int8))
        return Scaled(F.embedding(ids, table), scale)

    def add(self, name: str, parts: list[Scaled], bits: int) -> Scaled:
        scale = self.scale(name, torch.stack([part.real for part in parts]).sum(0), bits)
        moved = [self.move(f"{name}.{i}", part, scale, bits).q for i, part in enumerate(parts)]
        return Scaled(torch.stack(moved).sum(0).clamp(*_limits(bits)), scale)

    def norm(self, name: str, x: Scaled) -> Scaled:
        module = self.module(name)
        y, unit = i_layernorm(x.q)
        weight, bias = module.weight.double(), module.bias.double()
        real = y * unit * weight + bias
        scale = self.scale(name, real, self.activation_bits)
        m, e = dyadic(unit * weight / scale)
        offset = (bias.detach() / scale * 2.0**e).round().clamp(-(2.0**60), 2.0**60).long()
        self.keep(name, m=m, e=e, offset=offset)
        low, high = _limits(self.activation_bits)
        value = requantise(y.detach(), m, e, self.activation_bits, offset)
        return Scaled(straight((real / scale).clamp(low, high), value), scale)

    def linear(self, name: str, x: Scaled) -> Scaled:
        module = self.module(name)
        scale = scale_of(module.weight.abs().amax(1), self.weight_bits)
        weight = quantise(module.weight, scale[:, None], self.weight_bits)
        scale = scale * x.scale
        q = F.linear(x.q, weight)
        bias = q.new_zeros(len(weight)) if module.bias is None else quantise(module.bias, scale, 31)
        self.keep(name, weight=weight.to(torch.int8), bias=bias.to(torch.int32))
        return Scaled(q + bias, scale)

    def rescale(self, name: str, x: Scaled) -> Scaled:
        return self.move(name, x, self.scale(name, x.real, self.activation_bits), self.activation_bits)

    def attend(self, name: str, query: Scaled, key: Scaled, value: Scaled, heads: int, mask: Tensor | None) -> Scaled:
        q, k, v = (split_heads(x.q, heads) for x in (query, key, value))
        scores = Scaled(q @ k.transpose(-1, -2), query.scale * key.scale * q.shape[-1] ** -0.5)
        scores = self.move(f"{name}.scores", scores, FUNCTION, SCORES)
        p = i_softmax(scores.q, FUNCTION, None if mask is None else mask[:, None, None])
        return self.rescale(name, Scaled(merge_heads(p @ v), value.scale / 256))

    def function(self, name: str, function: str, x: Scaled) -> Scaled:
        if function == "relu":
            return self.rescale(name, Scaled(x.q.clamp_min(0), x.scale))
        x = self.move(f"{name}.in", x, FUNCTION, WIDE)
        y, unit = _FUNCTIONS[function](x.q, FUNCTION)
        y = Scaled(y, torch.tensor(unit, dtype=torch.float64, device=y.device))
        return self.move(name, y, self.scale(name, y.real, self.activation_bits), self.activation_bits, DIGITS)

    def first(self, x: Scaled) -> Scaled:
        return Scaled(x.q[:, 0], x.scale)


DIGITS = 24  # of the factor after a function, whose result has up to 37 bits
_FUNCTIONS: dict[str, Callable[[Any, float], tuple[Any, float]]] = {"gelu": i_gelu, "tanh": i_tanh}


def _limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


# In integers


class IntegerEncoder(Executor):
    """The program on integer tensors; all it computes before the last scale is integer.

    Args:
        plan: what the model was.
        activation_bits: of what goes into a product.
        constants: weights, factors and offsets by name.
        scales: of the states and of the answer.
    """

    kind: ClassVar[str] = "i-bert"

    def __init__(
        self, *, plan: Plan, activation_bits: int, constants: Mapping[str, Tensor], scales: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.plan, self.activation_bits = plan, activation_bits
        for name, value in constants.items():
            self.register_buffer(_flat(name), value.clone())
        # Parameters, for a model has to have one to tell its device and dtype.
        self.scales = nn.ParameterDict(
            {name: nn.Parameter(value.float(), requires_grad=False) for name, value in scales.items()}
        )

    def structure(self) -> dict[str, Any]:
        return {
            "plan": self.plan._asdict(),
            "activation_bits": self.activation_bits,
            "constants": {
                name: [str(value.dtype).removeprefix("torch."), *value.shape]
                for name, value in self.named_buffers(recurse=False)
            },
            "scales": {name: list(value.shape) for name, value in self.scales.items()},
        }

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "IntegerEncoder":
        del old
        return cls(
            plan=Plan(**structure["plan"]),
            activation_bits=structure["activation_bits"],
            constants={
                name: torch.empty(shape, dtype=getattr(torch, dtype))
                for name, (dtype, *shape) in structure["constants"].items()
            },
            scales={name: torch.empty(shape) for name, shape in structure["scales"].items()},
        )

    def run(self, model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's output.

        Raises:
            FormwrightError: what integers do not give is asked for: hidden states, attentions, embeddings as input.
        """
        bound = _bind(forward, args, kwargs)
        known = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "return_dict")
        asked = [
            name for name, value in bound.items() if name not in known and value is not None and value is not False
        ]
        if asked:
            raise FormwrightError(f"An integer-only model does not take {asked[0]}: leave it out.")
        states, answer = self.encoded(bound)
        out: Any
        if self.plan.classifier:
            logits = answer * self.scales["answer"]
            labels = bound.get("labels")
            out = SequenceClassifierOutput(
                loss=None if labels is None else loss_of(model, logits, labels), logits=logits
            )
        else:
            out = BaseModelOutputWithPooling(
                last_hidden_state=states * self.scales["states"],
                pooler_output=None if answer is None else answer * self.scales["answer"],
            )
        given = bound.get("return_dict")
        return out if (model.config.return_dict if given is None else given) else out.to_tuple()

    @torch.no_grad()
    def encoded(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """States and answer as integers."""
        return encode(self, self.plan, inputs_of(self.plan, given, self.constant("position", "table").shape[0]))

    def constant(self, name: str, what: str) -> Tensor:
        return self._buffers[_flat(f"{name}.{what}")]  # type: ignore[return-value]

    def move(self, name: str, x: Tensor, bits: int) -> Tensor:
        return requantise(x, self.constant(name, "m"), self.constant(name, "e"), bits)

    def embed(self, name: str, ids: Tensor) -> Tensor:
        return self.constant(name, "table")[ids]

    def add(self, name: str, parts: list[Tensor], bits: int) -> Tensor:
        moved = [self.move(f"{name}.{i}", part, bits) for i, part in enumerate(parts)]
        return torch.stack(moved).sum(0).clamp(*_limits(bits))

    def norm(self, name: str, x: Tensor) -> Tensor:
        y, _ = i_layernorm(x)
        m, e, offset = (self.constant(name, what) for what in ("m", "e", "offset"))
        return requantise(y, m, e, self.activation_bits, offset).to(torch.int8)

    def linear(self, name: str, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        product = int_matmul(rows, self.constant(name, "weight").T) + self.constant(name, "bias")
        return product.view(*x.shape[:-1], -1)

    def rescale(self, name: str, x: Tensor) -> Tensor:
        return self.move(name, x, self.activation_bits).to(torch.int8)

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
        q, k, v = (split_heads(x, heads) for x in (query, key, value))
        scores = self.move(f"{name}.scores", _products(q, k.transpose(-1, -2)), SCORES)
        p = i_softmax(scores, FUNCTION, None if mask is None else mask[:, None, None])
        # p has no sign: 128 less of it fits int8, and 128 times the sum of the values makes up for that.
        mixed = _products((p - 128).to(torch.int8), v) + 128 * v.sum(-2, keepdim=True, dtype=torch.int32)
        return self.rescale(name, merge_heads(mixed))

    def function(self, name: str, function: str, x: Tensor) -> Tensor:
        if function == "relu":
            return self.rescale(name, x.clamp_min(0))
        y, _ = _FUNCTIONS[function](self.move(f"{name}.in", x, WIDE), FUNCTION)
        return self.rescale(name, y)

    def first(self, x: Tensor) -> Tensor:
        return x[:, 0]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Of every text and head."""
    pairs = zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)
    return torch.stack([int_matmul(one.contiguous(), other) for one, other in pairs]).unflatten(0, a.shape[:2])


def _bind(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    given = inspect.signature(forward).bind(*args, **kwargs).arguments
    rest = given.pop("kwargs", {})
    return {**given, **rest}


class Absent(Rebuilt):
    """Where a part of the model was that an executor has taken over, weights and all."""

    kind: ClassVar[str] = "absent"

    def structure(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "Absent":
        del old
        return cls(**structure)


class IBert(Modifier):
    """Turn an encoder into its integer program.

    Args:
        qat_steps: of training through the simulation; 0 calibrates only.
        learning_rate: of that training (1e-6 in the paper).
        samples: calibration rows.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8, of what goes into products.
    """

    trains: ClassVar[bool] = True

    def __init__(
        self,
        *,
        qat_steps: int = 200,
        learning_rate: float = 1e-6,
        samples: int = 256,
        weight_bits: int = 8,
        activation_bits: int = 8,
    ) -> None:
        if qat_steps < 0:
            raise FormwrightError(f"qat_steps is {qat_steps}, but it must be 0 or more.")
        if samples < 1:
            raise FormwrightError(f"samples is {samples}, but it must be at least 1.")
        for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if not 2 <= bits <= 8:
                raise FormwrightError(f"{name} is {bits}, but it must be from 2 to 8.")
        self.budget = Budget(steps=qat_steps or None, learning_rate=learning_rate)
        self.qat_steps, self.samples = qat_steps, samples
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.simulation: Simulation | None = None
        self.example: dict[str, Tensor] = {}

    def check(self, model: PreTrainedModel) -> None:
        plan, _ = plan_of(model)
        if self.qat_steps and not plan.classifier:
            raise FormwrightError("A bare encoder has no loss to train on: use i-bert(qat_steps=0).")
        if self.qat_steps:
            trainable(model, "i-bert")

    @torch.no_grad()
    def calibrate(self, model: PreTrainedModel, data: Data) -> None:
        self.simulation = Simulation(model, weight_bits=self.weight_bits, activation_bits=self.activation_bits)
        was = model.training
        self.simulation.train()
        size = min(16, self.samples)
        for batch in data.batches(-(-self.samples // size), batch_size=size):
            self.example = {name: value.to(model.device) for name, value in batch.items()}
            self.simulation(**self.example)
        self.simulation.train(was)

    def finetune(self, model: PreTrainedModel, data: Data) -> None:  # noqa: ARG002 - the simulation holds the model
        if self.qat_steps:
            fit(self._ready(), data.task, self.budget.settings(data))

    @torch.no_grad()
    def finalize(self, model: PreTrainedModel) -> None:
        simulation = self._ready().eval()
        simulation(**self.example)
        executor = IntegerEncoder(
            plan=simulation.plan,
            activation_bits=self.activation_bits,
            constants=simulation.constants,
            scales=simulation.scales,
        )
        self.simulation, self.example = None, {}
        attach(model, executor.eval())
        base = model.base_model
        outer = [] if base is model else [name for name, one in model.named_children() if one not in (base, executor)]
        inner = [name for name, one in base.named_children() if one is not executor]
        root = next(path for path, module in model.named_modules() if module is base)
        for path in [*outer, *(f"{root}.{name}" if root else name for name in inner)]:
            replace(model, path, Absent())
        if base is model and getattr(base, "pooler", base) is None:
            base.pooler = Absent()  # left out when the model was built, which a config does not tell

    def _ready(self) -> Simulation:
        if self.simulation is None:
            raise FormwrightError("i-bert needs ranges: call calibrate with data first.")
        return self.simulation
