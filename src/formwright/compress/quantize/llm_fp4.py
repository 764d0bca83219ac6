"""LLM-FP4: weights and activations as 4-bit floats whose formats, biases and channel shifts are searched.

Paper    Liu, Liu, Huang, Dong, Cheng: LLM-FP4: 4-Bit Floating-Point Quantized Transformers (EMNLP 2023),
         arXiv:2310.16836.
Idea     A float with E exponent and M mantissa bits and a real-valued exponent bias b has its scale in b. For every
         layer the format and the biases are searched that keep its output, first the weights', then the activations',
         in turn. Activations differ from channel to channel: each gets a whole-numbered shift s_j of the tensor's bias,
         and the factors 2^(s_j) go into the neighbours, so that the product stays one of 4-bit numbers.

             q_b(x)    the nearest ExMy value with bias b                          (formwright.ops.minifloat)
             minimise  || q_(rho + s_j)(X) q_(b_o)(W)^T - X W^T ||^2               b_o: output channel, rho: tensor
             s_j       clamp(round(b^_j) - round(rho), 0, 2^E - 1)                 b^_j: bias of channel j's largest
             X W^T     = sum_j (2^(s_j) X_j) (2^(-s_j) W_:,j)

         "fpq-baseline" has no shifts. "minmax-fp" (E2M1) and "minmax-int" (E1M2) take the biases of the largest values.
Differs  The paper searches gamma b, gamma in [0.01, 1.2] (search="bias"); where b is near 0 that moves nothing, where
         it is negative it moves the wrong way. The default searches the largest value: b - log2 gamma, gamma in
         [0.5, 1.2]. The start is always among the candidates, and every format keeps its own best bias. The output
         error is measured on `tokens` of the samples' tokens. The release multiplies by unfolded weights with channel
         biases; fold=True quantizes the weights with the factors in them, as a kernel would hold them. Only the table
         of input embeddings is quantized, with one bias; a tied output layer keeps the old table in full precision.
         Attention's own products stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.modifier import Data, Modifier
from formwright.compress.structure import Rebuilt, replace
from formwright.errors import FormwrightError
from formwright.ops.minifloat import Minifloat, decode, encode, nearest, pack, quantise, unit, unpack

Method = Literal["fpq", "fpq-baseline", "minmax-fp", "minmax-int"]
Search = Literal["maxval", "bias"]


def formats(bits: int, method: Method) -> list[Minifloat]:
    """The formats a method chooses from, the middle one first."""
    if method == "minmax-int":
        return [Minifloat(1, bits - 2)]
    middle = (bits - 1) // 2
    found = [Minifloat(bits - 1 - middle, middle)]
    if method != "minmax-fp":
        mantissas = range(2, 7) if bits == 8 else range(bits - 1)
        found += [Minifloat(bits - 1 - m, m) for m in mantissas if m != middle]
    return found


def candidates(start: Float[Tensor, "*n"], count: int, search: Search) -> list[Float[Tensor, "*n"]]:
    """Biases to try, the start first."""
    if search == "bias":
        return [start, *(gamma * start for gamma in torch.linspace(0.01, 1.2, count, dtype=start.dtype))]
    return [start, *(start - gamma.log2() for gamma in torch.linspace(0.5, 1.2, count, dtype=start.dtype))]


def shifts(channels: Float[Tensor, " i"], rho: Float[Tensor, ""], form: Minifloat) -> Float[Tensor, " i"]:
    """s_j, whole numbers that the exponent field can take up."""
    return (channels.round() - rho.round()).clamp(0, 2**form.exponent - 1)


def quantise_shifted(
    x: Float[Tensor, "*n i"], form: Minifloat, rho: Float[Tensor, ""], shift: Float[Tensor, " i"]
) -> Float[Tensor, "*n i"]:
    """2^(-s_j) q_rho(2^(s_j) x_j): every channel with the bias rho + s_j."""
    factor = torch.exp2(shift).to(x.dtype)
    return quantise(x * factor, form, rho) / factor


class OutputError:
    """|| A d^T + E ||^2 for each row of d, less what does not depend on d; through A^T A where that is smaller."""

    def __init__(self, a: Float[Tensor, "m i"], e: Float[Tensor, "m n"]) -> None:
        self.gram = a.shape[0] > a.shape[1]
        self.a, self.e = (a.T @ a, (a.T @ e).T) if self.gram else (a, e)

    def __call__(self, d: Float[Tensor, "n i"]) -> Float[Tensor, " n"]:
        if self.gram:
            return ((d @ self.a + 2 * self.e) * d).sum(-1)
        return (self.a @ d.T + self.e).square().sum(0) - self.e.square().sum(0)


@dataclass
class Choice:
    """How one operand is quantized: the bias of every format, and the format."""

    biases: dict[Minifloat, Tensor]
    form: Minifloat

    @property
    def bias(self) -> Tensor:
        return self.biases[self.form]


@dataclass
class Searcher:
    """The search for one layer, x W^T.

    Args:
        x: calibration inputs.
        reach: the largest size of each input channel, over all calibration tokens.
        weight: by output channel.
    """

    x: Float[Tensor, "r i"]
    reach: Float[Tensor, " i"]
    weight: Float[Tensor, "o i"]
    weight_forms: Sequence[Minifloat]
    input_forms: Sequence[Minifloat]
    shifted: bool
    count: int
    search: Search

    def __post_init__(self) -> None:
        # Kept in float32, in which the biases are stored: what is searched is what will run.
        rows = self.weight.abs().amax(1, keepdim=True)
        self.weights = Choice({f: f.bias(rows).float() for f in self.weight_forms}, self.weight_forms[0])
        self.inputs = Choice({f: f.bias(self.reach.max()).float() for f in self.input_forms}, self.input_forms[0])
        self.start = {
            "weights": dict(self.weights.biases),
            "inputs": dict(self.inputs.biases),
        }

    def shift(self, form: Minifloat, rho: Float[Tensor, ""]) -> Float[Tensor, " i"]:
        return shifts(form.bias(self.reach).float(), rho, form) if self.shifted else torch.zeros_like(self.reach)

    def quantised_inputs(self, form: Minifloat, rho: Float[Tensor, ""]) -> Float[Tensor, "r i"]:
        return quantise_shifted(self.x, form, rho, self.shift(form, rho))

    def inputs_error(self) -> Callable[[Minifloat, Tensor], Tensor]:
        """Of all rows together, for an input format and bias, with the weights as chosen."""
        weight = quantise(self.weight, self.weights.form, self.weights.bias)
        error = OutputError(weight, (weight - self.weight) @ self.x.T)
        return lambda form, rho: error(self.quantised_inputs(form, rho) - self.x).sum()

    def weights_error(self) -> Callable[[Minifloat, Tensor], Tensor]:
        """Of each output channel, for a weight format and biases, with the inputs as chosen."""
        x = self.quantised_inputs(self.inputs.form, self.inputs.bias)
        error = OutputError(x, (x - self.x) @ self.weight.T)
        return lambda form, bias: error(quantise(self.weight, form, bias) - self.weight)[:, None]

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.search_biases("weights")
            self.search_biases("inputs")
            self.search_form("weights")
            self.search_form("inputs")

    def search_biases(self, which: Literal["weights", "inputs"]) -> None:
        choice, error = getattr(self, which), getattr(self, f"{which}_error")()
        for form, start in self.start[which].items():
            best, least = start, error(form, start)
            for bias in candidates(start, self.count, self.search)[1:]:
                found = error(form, bias)
                best, least = torch.where(found < least, bias, best), torch.minimum(found, least)
            choice.biases[form] = best

    def search_form(self, which: Literal["weights", "inputs"]) -> None:
        choice, error = getattr(self, which), getattr(self, f"{which}_error")()
        choice.form = min(choice.biases, key=lambda form: float(error(form, choice.biases[form]).sum()))

    def folded(self) -> "Searcher":
        """The same layer with 2^(s_j) in the inputs and 2^(-s_j) in the weights, and the weights searched again."""
        shift = self.shift(self.inputs.form, self.inputs.bias)
        factor = torch.exp2(shift).to(self.x.dtype)
        inputs = (self.x * factor, self.reach * factor, self.weight / factor)
        new = Searcher(*inputs, self.weight_forms, self.input_forms, False, self.count, self.search)
        new.inputs = self.inputs
        new.search_biases("weights")
        new.search_form("weights")
        return new


def search_table(
    table: Float[Tensor, "v d"], rows: Float[Tensor, "r d"], forms: Sequence[Minifloat], count: int, search: Search
) -> tuple[Minifloat, Float[Tensor, ""]]:
    """Format and bias of an embedding table, by the error of the rows that calibration read; a count of 0 searches
    nothing.
    """
    best: tuple[float, Minifloat, Tensor] | None = None
    for form in forms:
        start = form.bias(table.abs().max()).float()
        for bias in candidates(start, count, search) if count else [start]:
            error = float((quantise(rows, form, bias) - rows).square().sum())
            if best is None or error < best[0]:
                best = (error, form, bias)
    assert best is not None
    return best[1], best[2]


def as_bits(bias: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Biases as the bits of float32: model.bfloat16() would round a buffer of floats."""
    return bias.float().contiguous().view(torch.int32)


def stored(codes: Tensor, form: Minifloat) -> Tensor:
    return pack(codes) if form.bits <= 4 else codes


def width_stored(width: int, form: Minifloat) -> int:
    return (width + 1) // 2 if form.bits <= 4 else width


class FP4Linear(Rebuilt):
    """A linear layer on codes: quantizes its input with static biases and multiplies by its decoded weight.

    Buffers: codes (two a byte up to four bits), the biases as bits, the channels' shifts.
    """

    kind: ClassVar[str] = "fp4-linear"
    codes: Tensor
    weight_bias: Tensor
    input_bias: Tensor
    shift: Tensor
    one: Tensor

    def __init__(
        self,
        *,
        inputs: int,
        outputs: int,
        bias: bool,
        weight_form: Sequence[int],
        input_form: Sequence[int],
        fold: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.fold = inputs, outputs, fold
        self.weight_form, self.input_form = Minifloat(*weight_form), Minifloat(*input_form)
        self.register_buffer("codes", torch.empty(outputs, width_stored(inputs, self.weight_form), dtype=torch.uint8))
        self.register_buffer("weight_bias", torch.empty(outputs, 1, dtype=torch.int32))
        self.register_buffer("input_bias", torch.empty((), dtype=torch.int32))
        self.register_buffer("shift", torch.empty(inputs, dtype=torch.uint8))
        self.register_buffer("one", torch.ones(()))  # has the model's dtype
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def structure(self) -> dict[str, Any]:
        return {
            "inputs": self.in_features,
            "outputs": self.out_features,
            "bias": self.bias is not None,
            "weight_form": [self.weight_form.exponent, self.weight_form.mantissa],
            "input_form": [self.input_form.exponent, self.input_form.mantissa],
            "fold": self.fold,
        }

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "FP4Linear":  # noqa: ARG003 - it stands alone
        return cls(**structure)

    @classmethod
    def of(cls, old: nn.Linear | Conv1D, found: Searcher, *, fold: bool) -> "FP4Linear":
        """A Linear or Conv1D with what was searched for it."""
        outputs, inputs = found.weight.shape
        shift = found.shift(found.inputs.form, found.inputs.bias)
        found = found.folded() if fold else found
        new = cls(
            inputs=inputs,
            outputs=outputs,
            bias=old.bias is not None,
            weight_form=(found.weights.form.exponent, found.weights.form.mantissa),
            input_form=(found.inputs.form.exponent, found.inputs.form.mantissa),
            fold=fold,
        ).to(found.weight.device)
        new.one = torch.ones_like(old.weight[0, 0])
        new.codes = stored(encode(found.weight, new.weight_form, found.weights.bias), new.weight_form)
        new.weight_bias, new.input_bias = as_bits(found.weights.bias), as_bits(found.inputs.bias)
        new.shift = shift.to(torch.uint8)
        new.bias = old.bias
        return new

    def decoded(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        codes = unpack(self.codes, self.in_features) if self.weight_form.bits <= 4 else self.codes
        return decode(codes, self.weight_form, unit(self.weight_bias.view(torch.float32), dtype))

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """What the codes stand for; families ask for its dtype."""
        return self.decoded(torch.promote_types(self.one.dtype, torch.float32)).to(self.one.dtype)

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        working = torch.promote_types(x.dtype, torch.float32)
        factor = torch.exp2(self.shift.to(working))
        scale = unit(self.input_bias.view(torch.float32), working)
        quantised = nearest(x.to(working) * factor / scale, self.input_form) * scale
        if not self.fold:
            quantised = quantised / factor
        return F.linear(quantised.to(x.dtype), self.decoded(working).to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight {self.weight_form}, input {self.input_form}"


class FP4Embedding(Rebuilt):
    """A table of embeddings as codes, one bias for all."""

    kind: ClassVar[str] = "fp4-embedding"
    codes: Tensor
    table_bias: Tensor
    one: Tensor

    def __init__(self, *, rows: int, width: int, form: Sequence[int]) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.form = rows, width, Minifloat(*form)
        self.register_buffer("codes", torch.empty(rows, width_stored(width, self.form), dtype=torch.uint8))
        self.register_buffer("table_bias", torch.empty((), dtype=torch.int32))
        self.register_buffer("one", torch.ones(()))  # has the model's dtype

    def structure(self) -> dict[str, Any]:
        form = [self.form.exponent, self.form.mantissa]
        return {"rows": self.num_embeddings, "width": self.embedding_dim, "form": form}

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "FP4Embedding":  # noqa: ARG003 - it stands alone
        return cls(**structure)

    @classmethod
    def of(cls, table: Float[Tensor, "v d"], form: Minifloat, bias: Float[Tensor, ""]) -> "FP4Embedding":
        new = cls(rows=table.shape[0], width=table.shape[1], form=(form.exponent, form.mantissa)).to(table.device)
        new.one = torch.ones_like(table[0, 0])
        new.codes, new.table_bias = stored(encode(table, form, bias), form), as_bits(bias)
        return new

    def decoded(self, codes: Tensor) -> Tensor:
        codes = unpack(codes, self.embedding_dim) if self.form.bits <= 4 else codes
        working = torch.promote_types(self.one.dtype, torch.float32)
        return decode(codes, self.form, unit(self.table_bias.view(torch.float32), working)).to(self.one.dtype)

    @property
    def weight(self) -> Float[Tensor, "v d"]:
        return self.decoded(self.codes)

    def forward(self, ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        return self.decoded(self.codes[ids])


class LLMFP4(Modifier):
    """Quantize every linear layer (but the output layer of a language model) and the input embeddings.

    Args:
        weight_bits: 3 to 8, of weights and embeddings; up to 4, two codes share a byte.
        activation_bits: 3 to 8, of the inputs of every layer.
        method: "fpq" (searched, with channel shifts), "fpq-baseline" (searched) or the largest values alone,
            "minmax-fp" and "minmax-int", which search nothing.
        rounds: of the search, weights and activations in turn; none = 3, as in the paper.
        candidates: biases tried for a format; none = 100, as in the paper.
        search: what the candidates are multiples of: the largest value, "maxval" (none = this), or the paper's "bias".
        fold: quantize weights with the shifts' factors in them; "fpq" alone has any.
        samples: calibration rows (32 in the paper).
        tokens: how many of the samples' tokens the output error is measured on, evenly spread.
    """

    simulated: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weight_bits: int = 4,
        activation_bits: int = 4,
        method: Method = "fpq",
        rounds: int | None = None,
        candidates: int | None = None,
        search: Search | None = None,
        fold: bool = False,
        samples: int = 32,
        tokens: int = 1024,
    ) -> None:
        for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if not 3 <= bits <= 8:
                raise FormwrightError(f"{name} is {bits}, but it must be from 3 to 8.")
        searched = {"rounds": rounds, "candidates": candidates, "search": search}
        idle = [name for name, value in searched.items() if value is not None]
        if idle and method in ("minmax-fp", "minmax-int"):
            raise FormwrightError(f"method={method!r} searches nothing: leave {idle[0]} out, or use fpq.")
        rounds = 3 if rounds is None else rounds
        candidates = 100 if candidates is None else candidates
        search = "maxval" if search is None else search
        for name, choice, choices in (("method", method, Method), ("search", search, Search)):
            if choice not in get_args(choices):
                raise FormwrightError(f"{name} is {choice!r}, but it must be one of {', '.join(get_args(choices))}.")
        for name, least, value in (
            ("rounds", 1, rounds),
            ("candidates", 2, candidates),
            ("samples", 1, samples),
            ("tokens", 1, tokens),
        ):
            if value < least:
                raise FormwrightError(f"{name} is {value}, but it must be at least {least}.")
        if fold and method != "fpq":
            raise FormwrightError(f"fold=True moves channel shifts, which method={method!r} does not have: use fpq.")
        self.weight_bits, self.activation_bits, self.method, self.fold = weight_bits, activation_bits, method, fold
        self.rounds, self.candidates, self.search = rounds, candidates, search
        self.samples, self.tokens = samples, tokens
        self.batches: list[dict[str, Tensor]] = []

    @property
    def searches(self) -> bool:
        return self.method in ("fpq", "fpq-baseline")

    def check(self, model: PreTrainedModel) -> None:
        found = [one for one in self.layers(model).values() if not isinstance(one, nn.Embedding)]
        if not found:
            raise FormwrightError(f"{type(model).__name__} has no linear layer in floating point left to quantize.")
        module: Any
        for module in found:
            if not module.weight.isfinite().all():
                raise FormwrightError("A weight of this model is infinite or no number: repair or retrain it first.")

    def layers(self, model: PreTrainedModel) -> dict[str, nn.Module]:
        """What can be quantized, by path: the input embeddings and all linear layers but the output layer."""
        head: Any = model.get_output_embeddings()
        table: Any = model.get_input_embeddings()
        if type(table) is nn.Embedding:
            every = model.named_modules(remove_duplicate=False)
            holders = [one for _, one in every if getattr(one, "weight", None) is table.weight and one is not head]
            table = table if len(holders) == 1 else None  # T5's two stacks read one table: it stays
        return {
            path: module
            for path, module in model.named_modules()
            if module is not head
            and (type(module) in (nn.Linear, Conv1D) or (module is table and type(module) is nn.Embedding))
        }

    def calibrate(self, model: PreTrainedModel, data: Data) -> None:  # noqa: ARG002 - apply runs the model
        size = min(8, self.samples)
        batches = list(data.batches(-(-self.samples // size), batch_size=size))
        extra = sum(len(next(iter(batch.values()))) for batch in batches) - self.samples
        if extra > 0:  # the last batch holds more than was asked for
            batches[-1] = {name: value[:-extra] for name, value in batches[-1].items()}
        self.batches = batches

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        """Layer by layer in the order they run, each on what the layers before it now give."""
        if not self.batches:
            raise FormwrightError("llm-fp4 needs calibration rows: call calibrate with data first.")
        for path in self.order(model):
            module: Any = model.get_submodule(path)
            x = self.read(model, module)
            new = self.table(module, x) if isinstance(module, nn.Embedding) else self.linear(module, x)
            tied = isinstance(module, nn.Embedding) and _tied(model, module)
            replace(model, path, new)
            if tied:
                untie(model)
        self.batches = []

    def order(self, model: PreTrainedModel) -> list[str]:
        """Paths of the layers that calibration runs through, in the order of their first call."""
        found: dict[str, None] = {}

        def note(path: str) -> Callable[..., None]:
            return lambda *_: found.setdefault(path)

        self.run(model, {module: note(path) for path, module in self.layers(model).items()})
        return list(found)

    def read(self, model: PreTrainedModel, module: nn.Module) -> Tensor:
        """The inputs of a layer, tokens first, padding left out: ids of an embedding, else one row a token."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            real = x[mask] if mask is not None and mask.shape == x.shape[:2] else x
            seen.append(real.flatten() if isinstance(module, nn.Embedding) else real.reshape(-1, x.shape[-1]))

        self.run(model, {module: note})
        return torch.cat(seen)

    def run(self, model: PreTrainedModel, notes: dict[nn.Module, Callable[..., None]]) -> None:
        """The samples through the model; a module's note is called with module, args, kwargs and padding mask."""
        mask: Tensor | None = None
        hooks = [
            module.register_forward_pre_hook(lambda *call, note=note: note(*call, mask), with_kwargs=True)
            for module, note in notes.items()
        ]
        device = next(model.parameters()).device
        try:
            for batch in self.batches:
                inputs = {name: value.to(device) for name, value in batch.items()}
                mask = inputs.get("attention_mask")
                mask = mask.bool() if mask is not None and mask.ndim == 2 else None
                model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def spread(self, x: Tensor) -> Tensor:
        """`tokens` of the rows, evenly."""
        if len(x) <= self.tokens:
            return x
        return x[torch.linspace(0, len(x) - 1, self.tokens, device=x.device).long()]

    def table(self, module: nn.Embedding, ids: Int[Tensor, " n"]) -> FP4Embedding:
        table = _working(module.weight)
        forms, count = formats(self.weight_bits, self.method), self.candidates if self.searches else 0
        form, bias = search_table(table, table[self.spread(ids)], forms, count, self.search)
        return FP4Embedding.of(module.weight.detach(), form, bias)

    def linear(self, module: nn.Linear | Conv1D, x: Float[Tensor, "n i"]) -> FP4Linear:
        weight = _working(module.weight.T if isinstance(module, Conv1D) else module.weight)
        x = x.to(weight.dtype)
        searcher = Searcher(
            self.spread(x),
            x.abs().amax(0),
            weight,
            formats(self.weight_bits, self.method),
            formats(self.activation_bits, self.method),
            self.method == "fpq",
            self.candidates,
            self.search,
        )
        if self.searches:
            searcher.run(self.rounds)
        return FP4Linear.of(module, searcher, fold=self.fold)


def untie(model: PreTrainedModel) -> None:
    """The output layer keeps the table, and what else was tied to the body, for itself."""
    for name in model.all_tied_weights_keys:
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        shared = getattr(owner, last)
        setattr(owner, last, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def _working(weight: Tensor) -> Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _tied(model: PreTrainedModel, module: nn.Embedding) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is module.weight
