"""Parts with one deliberate fault each, beside the right part they were made from.

Every wrong part names the check that must catch it. `RIGHT` are the parts that every check must pass.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.conformance import Subject
from formwright.contracts import Context, Mask, Structured, Toeplitz, refuse
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.norm.init import Normal

ATTENDING = frozenset({"causal", "bidirectional", "cross", "padding", "cache", "compile", "export"})
RUNNING = frozenset({"causal", "padding", "cache", "compile", "export"})


class Mean(nn.Module):
    """A right mixer: each token gets the mean of the real tokens up to it, by a running sum. Causal, linear, with a
    state.
    """

    cache_kind: ClassVar[Literal["keys", "state"] | None] = "state"
    hooks: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__()
        self.value, self.out, self.gain = nn.Linear(dim, dim), nn.Linear(dim, dim), gain

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self.refusals(context)
        real = x.new_ones(x.shape[:2]) if context.real is None else context.real.to(x.dtype)
        total = self.values(x, context) * real[..., None]
        before, count = self.before(x, context)
        running, seen = self.sums(total, before), count + real.cumsum(1)
        if context.cache is not None:
            context.cache.write(running[:, -1:], seen[:, -1:], tokens=x.shape[1])
        return self.out(self.gain * running / seen.clamp(min=1)[..., None])

    def refusals(self, context: Context) -> None:
        if not context.causal and context.queries > 1:
            raise refuse("Mean", asked="both directions", because="it only looks back", instead="Choose softmax.")
        if context.memory is not None or context.grid is not None:
            raise refuse("Mean", asked="that", because="it runs along one sequence", instead="Choose softmax.")
        if context.shared_position is not None or context.attentions is not None:
            raise refuse("Mean", asked="that", because="it has no scores", instead="Choose softmax.")

    def values(self, x: Tensor, context: Context) -> Tensor:
        return self.value(x)

    def before(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if context.cache is None or context.cache.state is None:
            return x.new_zeros(x.shape[0], 1, x.shape[2]), x.new_zeros(x.shape[0], 1)
        return context.cache.state

    def sums(self, total: Tensor, before: Tensor) -> Tensor:
        return (
            before + total.float().cumsum(1).to(total.dtype)
            if total.dtype == torch.bfloat16
            else before + total.cumsum(1)
        )


class LeaksTheFuture(Mean):
    def values(self, x, context):
        return self.value(x) + 0.1 * x.roll(-1, 1)


class BlindToTheLast(Mean):
    def values(self, x, context):
        return self.value(x) * torch.cat([x.new_ones(x.shape[1] - 1), x.new_zeros(1)])[None, :, None]


class MixesRows(Mean):
    def values(self, x, context):
        return self.value(x) + 0.1 * x.mean(0, keepdim=True)


class KnowsItsRow(Mean):
    def values(self, x, context):
        return self.value(x) * (1 + torch.arange(len(x), device=x.device, dtype=x.dtype))[:, None, None]


class IgnoresPadding(Mean):
    def forward(self, x, context):
        return super().forward(
            x, Context.of(x, causal=context.causal, cache=context.cache) if context.memory is None else context
        )


class CountsPads(Mean):
    """Pads are zeroed but still counted: their content has no influence, their number has."""

    def forward(self, x, context):
        if context.real is None:
            return super().forward(x, context)
        real = context.real.to(x.dtype)[..., None]
        running = (self.value(x) * real).cumsum(1)
        return self.out(running / torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None])


class NaNOnPads(Mean):
    def forward(self, x, context):
        y = super().forward(x, context)
        return y if context.real is None else y / context.real.to(x.dtype)[..., None]


class MaskOfOnesMatters(Mean):
    def forward(self, x, context):
        return super().forward(x, context) * (1 if context.padding is None else 1.1)


class GradientToPads(Mean):
    """The value of the pads is subtracted again, their gradient is not."""

    def values(self, x, context):
        values = self.value(x)
        if context.real is None:
            return values
        pads = (x * ~context.real[..., None]).sum(1, keepdim=True)
        return values + pads - pads.detach()


class DeadParameter(Mean):
    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        self.unused = nn.Parameter(torch.zeros(dim))


class DetachesInput(Mean):
    def values(self, x, context):
        return self.value(x.detach())


class RandomInEvaluation(Mean):
    def values(self, x, context):
        return F.dropout(self.value(x), 0.1)


class RandomInTraining(Mean):
    def values(self, x, context):
        return F.dropout(self.value(x), 0.1, self.training)


class OwnRandomness(Mean):
    def values(self, x, context):
        generator = torch.Generator()
        generator.seed()
        return self.value(x) * (1 + self.training * torch.rand(1, generator=generator).to(x))


class OwnSeedInWeights(Mean):
    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        generator = torch.Generator()
        generator.seed()
        nn.init.normal_(self.value.weight, generator=generator)


class WritesItsInput(Mean):
    def values(self, x, context):
        x.mul_(1.0).add_(0.5)
        return self.value(x)


class WrongShape(Mean):
    def forward(self, x, context):
        y = super().forward(x, context)
        return y[:, :62] if y.shape[1] == 63 else y


class InfiniteAlone(Mean):
    def forward(self, x, context):
        return super().forward(x, context) / (x.shape[1] - 1)


class ForgetsTheCache(Mean):
    def before(self, x, context):
        return x.new_zeros(x.shape[0], 1, x.shape[2]), x.new_zeros(x.shape[0], 1)


class ForgetsPadsInTheCache(Mean):
    """The state is right for whole rows, but padding of a later step is taken from the wrong end."""

    def forward(self, x, context):
        if context.cache is not None and context.padding is not None:
            x = x * context.padding[:, : x.shape[1], None]
        return super().forward(x, context)


class KeepsOldRows(Mean):
    """The sum lives beside the cache, where reordering does not reach it."""

    def forward(self, x, context):
        if context.cache is not None and context.cache.state is not None:
            context.cache.state = context.cache.aside
        y = super().forward(x, context)
        if context.cache is not None:
            context.cache.aside = context.cache.state
        return y


class GrowingState(Mean):
    def forward(self, x, context):
        y = super().forward(x, context)
        if context.cache is not None:
            context.cache.state = (*context.cache.state, x)
        return y


class QuadraticMemory(Mean):
    def sums(self, total, before):
        return before + torch.ones(total.shape[1], total.shape[1], dtype=total.dtype).tril() @ total


class QuadraticWork(Mean):
    """Row by row, so that memory stays linear."""

    def sums(self, total, before):
        lower = torch.arange(total.shape[1])
        steps = [(total * (lower <= t)[None, :, None]).sum(1, keepdim=True) for t in lower]
        return before + torch.cat(steps, dim=1)


class BreaksTheGraph(Mean):
    def values(self, x, context):
        return self.value(x) * (2.0 if x.sum().item() > 0 else 1.0)


class FixedLength(Mean):
    def values(self, x, context):
        return self.value(x) * torch.ones(int(str(x.shape[1])), dtype=x.dtype)[None, :, None]


class RoundedConstant(Mean):
    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        self.register_buffer("rates", torch.linspace(0.11, 0.97, dim))

    def values(self, x, context):
        return self.value(x) * self.rates


class LosesItsBuffer(Mean):
    """A buffer that is not saved and that nobody refills after loading through the meta device."""

    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        self.register_buffer("rates", torch.full((dim,), 0.5), persistent=False)

    def values(self, x, context):
        return self.value(x) * self.rates


class UnsavedState(Mean):
    """A list no file holds."""

    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        self.rates = torch.rand(dim).tolist()

    def values(self, x, context):
        return self.value(x) * torch.tensor(self.rates, dtype=x.dtype)


class OverwritesLoaded(Mean):
    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        self.rates, self.shifts = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.rates.data.fill_(0.5)
        self.shifts.data.fill_(0.25)

    def values(self, x, context):
        return self.value(x) * self.rates + self.shifts


class Overflows(Mean):
    """exp without subtracting the largest: bfloat16 and float32 end at 3e38."""

    def values(self, x, context):
        return torch.log1p(torch.exp(self.value(x)))


class LosesDigits(Mean):
    """A sum that grows far beyond what it stands for keeps few of its digits in bfloat16."""

    def sums(self, total, before):
        rows = [before]
        for t in range(total.shape[1]):
            rows.append(rows[-1] + total[:, t : t + 1] + 100)
        return torch.cat(rows[1:], dim=1) - 100 * torch.arange(1, total.shape[1] + 1, dtype=total.dtype)[:, None]


class ChangesTheDtype(Mean):
    def forward(self, x, context):
        return super().forward(x, context).float()


class NeedsFloat32(Mean):
    """Under autocast the matrix comes in bfloat16; written into a float32 buffer with too few digits."""

    def values(self, x, context):
        values = self.value(x)
        return values * 0 if values.dtype != x.dtype else values


class SwallowsOptions(Mean):
    def __init__(self, *, dim: int, gain: float = 1.0, **options: float) -> None:
        super().__init__(dim=dim, gain=gain)
        self.options = options


class DropsAnOption(Mean):
    def __init__(self, *, dim: int, gain: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        self.temperature = temperature


class DropsAChoice(Mean):
    def __init__(self, *, dim: int, gain: float = 1.0, form: Literal["one", "two", "three"] = "one") -> None:
        super().__init__(dim=dim, gain=gain)
        self.factor = 2 if form == "two" else 1

    def values(self, x, context):
        return self.value(x) * self.factor


class LooksBothWaysUndeclared(Mean):
    def refusals(self, context):
        if context.causal or context.queries == 1:
            super().refusals(context)


class DropsTheMemory(Mean):
    def refusals(self, context):
        pass


class DropsPadding(Mean):
    def forward(self, x, context):
        return super().forward(x, Context.of(x, causal=context.causal))


class DropsAPosition(Mean):
    def refusals(self, context):
        if context.shared_position is None:
            super().refusals(context)


class DropsAttentions(Mean):
    def refusals(self, context):
        if context.attentions is None:
            super().refusals(context)


class NamesNoCache(Mean):
    cache_kind = None


class ClaimsAHook(Mean):
    hooks = frozenset({"bias"})

    def refusals(self, context):
        if context.shared_position is None or not hasattr(context.shared_position, "bias"):
            super().refusals(context)


class IgnoresPositions(Mean):
    """Reads positions, but only when they are handed in."""

    def values(self, x, context):
        return self.value(x) * (1 if context.positions is None else 0.5)


class TwoFaults(RandomInTraining):
    def __init__(self, *, dim: int, gain: float = 1.0) -> None:
        super().__init__(dim=dim, gain=gain)
        self.unused = nn.Parameter(torch.zeros(dim))


class StaleMemory(MultiHeadAttention):
    """Cross-attention that gives something else when it keeps the memory's keys."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__(dim=dim, heads=heads, attention=SoftmaxAttention())

    def forward(self, x, context):
        y = super().forward(x, context)
        return y if context.memory is None or context.cache is None else 1.1 * y


class Attend(SoftmaxAttention):
    """A right attention function: softmax's."""

    def __init__(self) -> None:
        super().__init__()


class SeesThePast(Attend):
    """Always causal, though its card says bidirectional."""

    def forward(self, q, k, v, *, mask: Mask, bias: Structured | None = None, scale=None, scaling=None):
        hidden = Mask(queries=mask.queries, keys=mask.keys, causal=True, padding=mask.padding)
        return super().forward(q, k, v, mask=hidden, bias=bias, scale=scale, scaling=scaling)


class ReadsMemoryPads(Attend):
    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        if mask.queries != mask.keys and not mask.causal:
            mask = Mask(queries=mask.queries, keys=mask.keys)
        return super().forward(q, k, v, mask=mask, bias=bias, scale=scale, scaling=scaling)


class SquareOnly(Attend):
    """Reads only as many memory tokens as it has queries."""

    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        if not mask.causal and mask.queries < mask.keys and mask.padding is None:
            k, v = k[:, :, : mask.queries], v[:, :, : mask.queries]
            mask = Mask(queries=mask.queries, keys=mask.queries)
        return super().forward(q, k, v, mask=mask, bias=bias, scale=scale, scaling=scaling)


class NoPadsInBFloat16(Attend):
    """Adds a number that is large in float32 but not large enough beside scores in bfloat16."""

    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        if q.dtype == torch.bfloat16 and mask.padding is not None:
            mask = Mask(queries=mask.queries, keys=mask.keys, causal=mask.causal)
        return super().forward(q, k, v, mask=mask, bias=bias, scale=scale, scaling=scaling)


class DropsScaling(Attend):
    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        return super().forward(q, k, v, mask=mask, bias=bias, scale=scale)


class MisreadsToeplitz(Attend):
    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        if isinstance(bias, Toeplitz):
            bias = Toeplitz(bias.diagonals.flip(-1), bias.keys)
        return super().forward(q, k, v, mask=mask, bias=bias, scale=scale, scaling=scaling)


class MisplacesGroups(Attend):
    """Repeats the keys in turn instead of side by side."""

    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        times = q.shape[1] // k.shape[1]
        return super().forward(
            q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), mask=mask, bias=bias, scale=scale, scaling=scaling
        )


class ShowsOtherWeights(Attend):
    def weights(self, q, k, *, mask: Mask, bias=None, scale=None, scaling=None):
        return super().weights(q, k, mask=mask, bias=bias, scale=scale, scaling=0.1)


class NaNWithoutKeys(Attend):
    """The textbook softmax: a row that sees nothing is 0 / 0."""

    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        y = super().forward(q, k, v, mask=mask, bias=bias, scale=scale, scaling=scaling)
        seen = mask.dense()
        return y if seen is None else y + torch.where(seen.any(-1, keepdim=True), 0.0, math.nan).to(y)


class CrossHasItsOwn(Attend):
    """A parameter that only self-attention uses."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, q, k, v, *, mask: Mask, bias=None, scale=None, scaling=None):
        y = super().forward(q, k, v, mask=mask, bias=bias, scale=scale, scaling=scaling)
        return y * self.gain if mask.queries == mask.keys else y


class Place(nn.Module):
    """A right position: a wave added to the tokens."""

    def __init__(self) -> None:
        super().__init__()

    def embed(self, x: Tensor, context: Context) -> Tensor:
        if context.memory is not None or context.grid is not None:
            raise refuse("Place", asked="that", because="it counts along one sequence", instead="Choose another.")
        return x + self.wave(self.places(x, context), x.dtype)[..., None]

    def places(self, x: Tensor, context: Context) -> Tensor:
        return context.query_positions()

    def wave(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        return (places.double() * 0.7).sin().to(dtype)


class CountsForItself(Place):
    """Its own count of the tokens in this call: wrong with a cache and with left padding."""

    def places(self, x, context):
        return torch.arange(x.shape[1])[None]


class SameEverywhere(Place):
    def wave(self, places, dtype):
        return super().wave(places * 0 + 1, dtype)


class CountsInBFloat16(Place):
    """Whole numbers above 256 are not all there in bfloat16."""

    def wave(self, places, dtype):
        return (places.to(dtype) * 0.7).sin()


class Double(nn.Module):
    """A right feed-forward layer."""

    def __init__(self, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return self.down(self.hidden(self.up(x)))

    def hidden(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class TokensMeet(Double):
    def hidden(self, x):
        return F.gelu(x) - x.mean(1, keepdim=True)


class FullGrid(Mean):
    """Takes square grids only, without saying so."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.grid is not None and context.grid[0] != context.grid[1]:
            raise FormwrightError("FullGrid needs as many rows as columns, got another grid; crop the image.")
        return super().forward(x, Context.of(x, causal=True))


class LeavesEmbeddings(Normal):
    def __call__(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.Embedding):
            super().__call__(layer)


class OneDraw(Normal):
    """The same seed whatever the user's."""

    def __call__(self, layer: nn.Module) -> None:
        torch.manual_seed(0)
        super().__call__(layer)


class WritesData(Normal):
    def __call__(self, layer: nn.Module) -> None:
        super().__call__(layer)
        if isinstance(layer, nn.Linear):
            layer.weight.data.mul_(0.5)


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A part and the check that must catch it."""

    part: type
    check: str
    slot: str = "mixer"
    capabilities: frozenset[str] = RUNNING
    growth: tuple[float | None, float | None] = (1.0, 1.0)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> Subject:
        time, memory = self.growth
        return Subject(
            slot=self.slot,
            name=self.part.__name__,
            target=self.part,
            capabilities=self.capabilities,
            time=time,
            memory=memory,
        )


def _attention(part: type, check: str) -> Wrong:
    return Wrong(part=part, check=check, slot="attention", capabilities=ATTENDING, growth=(2.0, 1.0))


def _position(part: type, check: str) -> Wrong:
    return Wrong(part=part, check=check, slot="position", capabilities=ATTENDING - {"cross"})


RIGHT = (
    Wrong(part=Mean, check=""),
    _attention(Attend, ""),
    _position(Place, ""),
    Wrong(part=Double, check="", slot="feedforward", capabilities=frozenset({"compile", "export"})),
    Wrong(part=Normal, check="", slot="init", capabilities=frozenset()),
)

WRONG = (
    Wrong(part=WrongShape, check="shape_is_kept"),
    Wrong(part=InfiniteAlone, check="shape_is_kept"),
    Wrong(part=WritesItsInput, check="input_is_left_alone"),
    Wrong(part=KnowsItsRow, check="batch_order_does_not_matter"),
    Wrong(part=MixesRows, check="batch_equals_one_by_one"),
    Wrong(part=TokensMeet, check="every_token_is_alone", slot="feedforward", capabilities=frozenset()),
    Wrong(part=FullGrid, check="grid_is_taken", capabilities=RUNNING | {"grid"}),
    Wrong(part=OwnSeedInWeights, check="same_seed_same_weights"),
    Wrong(part=RandomInEvaluation, check="evaluation_draws_nothing"),
    Wrong(part=OwnRandomness, check="training_follows_the_seed"),
    Wrong(part=RandomInTraining, check="training_follows_the_seed"),
    Wrong(part=DeadParameter, check="every_parameter_gets_a_gradient"),
    _attention(CrossHasItsOwn, "every_parameter_gets_a_gradient_in_cross_attention"),
    Wrong(part=DetachesInput, check="input_gets_a_gradient"),
    Wrong(part=GradientToPads, check="pads_get_no_gradient"),
    Wrong(part=LeaksTheFuture, check="causal_never_sees_the_future"),
    Wrong(part=BlindToTheLast, check="causal_never_sees_the_future"),
    _attention(SeesThePast, "bidirectional_sees_the_future"),
    Wrong(part=IgnoresPadding, check="content_of_pads_is_never_read"),
    Wrong(part=NaNOnPads, check="content_of_pads_is_never_read"),
    Wrong(part=CountsPads, check="padded_row_equals_the_row_alone"),
    Wrong(part=MaskOfOnesMatters, check="padding_that_hides_nothing_changes_nothing"),
    _attention(NaNWithoutKeys, "row_of_pads_alone_is_finite"),
    Wrong(part=IgnoresPositions, check="positions_counted_from_zero_are_the_default"),
    _position(CountsForItself, "positions_are_read"),
    _position(SameEverywhere, "positions_are_read"),
    _position(CountsForItself, "decoding_equals_the_full_forward"),
    _position(CountsForItself, "padded_row_equals_the_row_alone"),
    Wrong(part=ForgetsTheCache, check="decoding_equals_the_full_forward"),
    Wrong(part=ForgetsPadsInTheCache, check="decoding_with_left_padding_equals_the_row_alone"),
    Wrong(part=KeepsOldRows, check="cache_follows_reordered_rows"),
    Wrong(part=GrowingState, check="state_does_not_grow"),
    _attention(SquareOnly, "cross_attention_takes_other_lengths"),
    _attention(ReadsMemoryPads, "padding_of_the_memory_is_never_read"),
    Wrong(part=StaleMemory, check="cached_memory_equals_the_memory", capabilities=ATTENDING, growth=(2.0, 1.0)),
    Wrong(part=LosesDigits, check="precisions_agree"),
    Wrong(part=ChangesTheDtype, check="precisions_agree"),
    Wrong(part=Overflows, check="large_inputs_stay_finite"),
    Wrong(part=NeedsFloat32, check="autocast_is_taken"),
    Wrong(part=RoundedConstant, check="moving_keeps_constants"),
    _attention(NoPadsInBFloat16, "bfloat16_honours_padding"),
    _position(CountsInBFloat16, "far_positions_keep_their_digits"),
    Wrong(part=BreaksTheGraph, check="compiles_without_graph_breaks"),
    Wrong(part=FixedLength, check="exports_with_free_sizes"),
    Wrong(part=UnsavedState, check="safetensors_hold_everything"),
    Wrong(part=LosesItsBuffer, check="from_pretrained_gives_it_back"),
    Wrong(part=OverwritesLoaded, check="loading_keeps_what_was_loaded"),
    Wrong(part=QuadraticMemory, check="cost_grows_as_declared"),
    Wrong(part=QuadraticWork, check="cost_grows_as_declared"),
    Wrong(part=Mean, check="cost_grows_as_declared", growth=(None, None)),
    Wrong(part=LooksBothWaysUndeclared, check="refuses_the_other_direction"),
    Wrong(part=DropsTheMemory, check="refuses_cross_attention"),
    Wrong(part=DropsTheMemory, check="refuses_a_grid"),
    Wrong(part=DropsPadding, check="refuses_padding", capabilities=frozenset({"causal"})),
    Wrong(part=DropsPadding, check="refuses_a_cache", capabilities=frozenset({"causal"})),
    Wrong(part=DropsAPosition, check="position_hooks_are_honoured_or_refused"),
    Wrong(part=ClaimsAHook, check="position_hooks_are_honoured_or_refused"),
    Wrong(part=DropsAttentions, check="weights_are_shown_or_refused"),
    Wrong(part=NamesNoCache, check="cache_kind_agrees_with_the_card"),
    _attention(DropsScaling, "attention_keywords_are_honoured_or_refused"),
    _attention(MisreadsToeplitz, "attention_keywords_are_honoured_or_refused"),
    _attention(MisplacesGroups, "grouped_keys_equal_repeated_ones"),
    _attention(ShowsOtherWeights, "shown_weights_are_the_ones_used"),
    Wrong(part=SwallowsOptions, check="options_are_typed_keywords"),
    Wrong(part=DropsAnOption, check="no_option_is_dropped"),
    Wrong(part=DropsAChoice, check="no_option_is_dropped"),
    Wrong(part=LeavesEmbeddings, check="scheme_sets_everything", slot="init", capabilities=frozenset()),
    Wrong(part=OneDraw, check="scheme_follows_the_seed", slot="init", capabilities=frozenset()),
    Wrong(part=WritesData, check="scheme_spares_loaded_weights", slot="init", capabilities=frozenset()),
)
