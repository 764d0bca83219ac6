"""A part under test, and the stand it is put on: whatever its slot, (x, context) -> y.

An attention function stands inside multi-head attention, a position inside softmax attention, a block around softmax
attention and a GELU layer. All sizes are tiny.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from formwright.build import build
from formwright.catalog import Provided, resolve
from formwright.contracts import SCORE_HOOKS, Context, hooks
from formwright.models.cache import KeyValues, State
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.feedforward.mlp import GELUMLP
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.norm.layernorm import LayerNorm

SLOTS = ("mixer", "attention", "position", "feedforward", "norm", "block")
MIXING = ("mixer", "attention", "position", "block")  # tokens meet
ALONE = ("feedforward", "norm")  # every token by itself

DIM, HEADS, HIDDEN, LENGTH = 16, 4, 32, 128


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One part as its card describes it."""

    slot: str
    name: str
    target: Callable[..., nn.Module]
    capabilities: frozenset[str] = frozenset()
    time: float | None = None
    memory: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    on_card: bool = False

    @staticmethod
    def of(provided: Provided) -> "Subject":
        """The part a catalog entry names, imported."""
        return Subject(
            slot=provided.slot,
            name=provided.name,
            target=resolve(provided.target),
            capabilities=frozenset(provided.capabilities),
            time=provided.time,
            memory=provided.memory,
            on_card=True,
        )

    def __str__(self) -> str:
        return f"{self.slot}/{self.name}"

    @property
    def causals(self) -> tuple[bool, ...]:
        """The settings of the causal flag it declares."""
        return tuple(flag for flag, name in ((True, "causal"), (False, "bidirectional")) if name in self.capabilities)

    def with_options(self, **options: Any) -> "Subject":
        return replace(self, options=options)

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.target).parameters

    def build(self, *, causal: bool, length: int = LENGTH, cross: bool = False, **dimensions: Any) -> nn.Module:
        """The bare part, from its own constructor (through its card's name, where it has one)."""
        known = {
            "dim": DIM,
            "heads": HEADS,
            "kv_heads": HEADS,
            "head_dim": DIM // HEADS,
            "hidden": HIDDEN,
            "length": length,
            "layers": 2,
            "layer": 0,
            "vocab": 32,
            "causal": causal,
            "grid": None,
        }
        if self.slot == "block":
            known |= {
                "mixer": _softmax(),
                "cross": _softmax() if cross else None,
                "feedforward": GELUMLP(dim=DIM, hidden=HIDDEN),
                "norm": _layernorm,
            }
        known |= dimensions
        if self.on_card:
            return build(self.slot, {"name": self.name, **self.options}, **known)
        return self.target(**{key: value for key, value in known.items() if key in self.parameters()}, **self.options)

    def stand(
        self,
        *,
        causal: bool | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        lively: bool = True,
        **dimensions: Any,
    ) -> "Stand":
        """The part at work, in evaluation mode.

        Args:
            causal: the model's kind, for constructors that ask; none = the first the card declares.
            lively: add noise to every parameter, so that nothing hides behind an initial 0 or a tiny weight.
        """
        causal = (self.causals or (False,))[0] if causal is None else causal
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            stand = Stand(self.slot, self.build(causal=causal, **dimensions))
            if lively:
                enliven(stand)
        return stand.to(dtype).eval()


class Stand(nn.Module):
    """(x (b, n, d), context) -> (b, n, d)."""

    def __init__(self, slot: str, part: nn.Module) -> None:
        super().__init__()
        self.slot = slot
        if slot == "attention":
            self.module: nn.Module = MultiHeadAttention(dim=DIM, heads=HEADS, attention=part)
        elif slot == "position" and hooks(part) & SCORE_HOOKS:
            self.module = MultiHeadAttention(dim=DIM, heads=HEADS, attention=SoftmaxAttention(), position=part)
        elif slot == "position":
            self.module = _Embedded(part)
        else:
            self.module = part

    @property
    def part(self) -> nn.Module:
        """The part under test itself."""
        if self.slot == "attention":
            return self.module.attention
        return self.module.position if self.slot == "position" else self.module

    def forward(self, x: Tensor, context: Context) -> Tensor:
        context = replace(context, carry={})  # one call, one forward of a model: nothing is carried over
        if self.slot == "norm":
            return self.module(x)
        if self.slot == "block":
            streams = getattr(self.module, "streams", 1)
            here, there = (context, None) if context.memory is None else (Context.of(x), context)
            x = self.module(torch.cat([x] * streams, -1), here, there)
            return torch.stack(x.chunk(streams, -1)).mean(0)
        if self.slot == "position" and hasattr(self.part, "embed"):
            x = self.part.embed(x, context)
        return self.module(x, context)

    def cache(self) -> Any:
        """An empty cache of one layer, of the kind the mixer asks for."""
        return State() if getattr(self.module, "cache_kind", "keys") == "state" else KeyValues()

    def twin(self, dtype: torch.dtype) -> "Stand":
        """A copy in another precision."""
        return copy.deepcopy(self).to(dtype)


class _Embedded(nn.Module):
    """Softmax attention after a position that is added to the tokens."""

    def __init__(self, position: nn.Module) -> None:
        super().__init__()
        self.position, self.mixer = position, _softmax()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.mixer(x, context)


def _softmax() -> MultiHeadAttention:
    return MultiHeadAttention(dim=DIM, heads=HEADS, attention=SoftmaxAttention())


def _layernorm(width: int) -> nn.Module:
    return LayerNorm(dim=width)


@torch.no_grad()
def enliven(module: nn.Module) -> None:
    """Noise of a tenth on every parameter."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def tokens(n: int, *, batch: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random tokens (batch, n, d)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, DIM, generator=generator, dtype=torch.float64).to(dtype)


def lengths_to_padding(lengths: Iterable[int], n: int, side: str) -> Tensor:
    """Padding (b, n), True = real, with pads on the side named."""
    place = torch.arange(n)
    rows = [place < length if side == "right" else place >= n - length for length in lengths]
    return torch.stack(rows)


def padding_to_positions(padding: Tensor) -> Tensor:
    """Positions as generate and our models count them: the real tokens 0, 1, 2, ..., pads 0 or the last."""
    return (padding.long().cumsum(-1) - 1).clamp(min=0)
