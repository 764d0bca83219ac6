"""SAQ: a key-value cache in stairs, whose bits a number fall with the age of the token.

Paper    Li: The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI (2024),
         arXiv:2410.18441, its algorithm for the keys; an extension of KIVI (Liu et al. 2024), arXiv:2402.02750.
Idea     New tokens are kept as they are until there are S of them. They then go down a stair to B_2 bits, the S tokens
         that had B_2 bits to B_3 and so on; all older ones share the last stair:

             newest  | < S tokens, as they are | S at B_2 bits | S at B_3 bits | .. | all others at B_q bits |  oldest

         A group x is stored as whole numbers with its smallest value and its step, in 16 bits each:

             c = round((x - z) / s)      z = min x,  s = (max x - min x) / (2^b - 1)      x^ = s c + z

         Keys: of every channel, G tokens a group. Values: of every token, G channels a group. A stair is made from the
         numbers of the one above. 255 = 17 x 15 and 15 = 5 x 3: the grids of 8, 4 and 2 bits lie in one another, so
         that going down is the same as going to 2 bits at once, but for ties and the rounding of s and z.
Differs  The half of the algorithm for the values could not be read: they follow the keys' schedule (our choice), as do
         S = 128, G = 32 and the bits. Any number of key heads, not one alone. Channels of keys stand out before they
         are turned and are smeared after: with `frequencies` keys are turned back by their place in the cache, stored,
         and turned again when read. Codes are packed; a step reads the layer's whole past as numbers again.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from formwright.contracts import UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerForCausalLM
from formwright.ops.rotary import Layout, rotate, rotation
from formwright.parts.position.generative_ai_math import HarmonicRoPE
from formwright.parts.position.roformer import RoPE

FULL = 16  # bits of a number as the model makes it
BITS = (16, 8, 4, 2, 1)


class Groups(NamedTuple):
    """Quantised numbers (b, h, n, d), grouped along tokens (keys) or channels (values)."""

    codes: UInt8[Tensor, "*groups bytes"]
    step: Float[Tensor, "*groups 1"]
    least: Float[Tensor, "*groups 1"]


def quantise(x: Float[Tensor, "b h n d"], bits: int, group: int, *, keys: bool, scales: torch.dtype) -> Groups:
    """x in groups of `group` tokens of a channel (keys) or channels of a token, each with its own grid."""
    grouped = x.mT.unflatten(-1, (-1, group)) if keys else x.unflatten(-1, (-1, group))
    grouped = grouped.to(torch.promote_types(x.dtype, torch.float32))
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    levels = 2**bits - 1
    # What is stored is what is used: codes fit the rounded step and smallest value.
    step, least = ((most - least) / levels).to(scales), least.to(scales)
    wide = step.to(grouped.dtype)
    codes = ((grouped - least.to(grouped.dtype)) / torch.where(wide == 0, 1.0, wide)).round().clamp(0, levels)
    return Groups(pack(codes.to(torch.uint8), bits), step, least)


def dequantise(x: Groups, bits: int, dtype: torch.dtype, *, keys: bool) -> Float[Tensor, "b h n d"]:
    wide = torch.promote_types(dtype, torch.float32)
    values = unpack(x.codes, bits).to(wide) * x.step.to(wide) + x.least.to(wide)
    values = values.flatten(-2).to(dtype)
    return values.mT if keys else values


def pack(codes: UInt8[Tensor, "*n g"], bits: int) -> UInt8[Tensor, "*n bytes"]:
    """8 / bits codes a byte, the first in the lowest bits."""
    each = 8 // bits
    shifts = torch.arange(each, device=codes.device, dtype=torch.uint8) * bits
    return (codes.unflatten(-1, (-1, each)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(codes: UInt8[Tensor, "*n bytes"], bits: int) -> UInt8[Tensor, "*n g"]:
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.uint8) * bits
    return ((codes[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


Stair = Groups | Tensor  # a Tensor where the bits are 16: as it came


class Stairs:
    """The numbers of keys, or of values: a Tensor of the newest and a Stair a level."""

    def __init__(self, *, width: int, bits: Sequence[int], group: int, keys: bool, scales: torch.dtype) -> None:
        self.width, self.bits, self.group, self.keys, self.scales = width, tuple(bits), group, keys, scales
        self.newest: Tensor | None = None
        self.levels: list[Stair | None] = [None] * (len(bits) - 1)

    def append(self, x: Float[Tensor, "b h n d"]) -> None:
        newest = x if self.newest is None else torch.cat((self.newest, x), -2)
        full = newest.shape[-2] // self.width * self.width
        self.newest = newest[..., full:, :].clone()
        incoming: Tensor | None = newest[..., :full, :] if full else None
        for level, bits in enumerate(self.bits[1:]):
            if incoming is None:
                return
            held, last = self.levels[level], level == len(self.levels) - 1
            joined = _joined(held, self._stored(incoming, bits), self.keys)
            over = 0 if last else self.tokens(joined) - self.width
            incoming = self._read(self._cut(joined, 0, over), bits, x.dtype) if over > 0 else None
            self.levels[level] = self._cut(joined, over, None) if over > 0 else joined

    def read(self) -> Float[Tensor, "b h n d"]:
        """All numbers, the oldest first."""
        assert self.newest is not None
        stairs = zip(self.levels[::-1], self.bits[:0:-1], strict=True)
        parts = [self._read(held, bits, self.newest.dtype) for held, bits in stairs if held is not None]
        return torch.cat((*parts, self.newest), -2)

    def tokens(self, stair: Stair | None) -> int:
        if stair is None:
            return 0
        if isinstance(stair, Tensor):
            return stair.shape[-2]
        return stair.step.shape[-2] * self.group if self.keys else stair.step.shape[-3]

    def tensors(self) -> list[Tensor]:
        held = [] if self.newest is None else [self.newest]
        for stair in self.levels:
            held += [stair] if isinstance(stair, Tensor) else list(stair or ())
        return held

    def each(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.newest is not None:
            self.newest = move(self.newest)
        for level, stair in enumerate(self.levels):
            if stair is not None:
                self.levels[level] = move(stair) if isinstance(stair, Tensor) else Groups(*map(move, stair))

    def _stored(self, x: Tensor, bits: int) -> Stair:
        return x if bits == FULL else quantise(x, bits, self.group, keys=self.keys, scales=self.scales)

    def _read(self, stair: Stair, bits: int, dtype: torch.dtype) -> Tensor:
        return stair if isinstance(stair, Tensor) else dequantise(stair, bits, dtype, keys=self.keys)

    def _cut(self, stair: Stair, start: int, end: int | None) -> Stair:
        """Some tokens; copied, so that the rest can be freed."""
        if isinstance(stair, Tensor):
            return stair[..., start:end, :].clone()
        if self.keys:
            start, end = start // self.group, None if end is None else end // self.group
            return Groups(*(x[..., start:end, :].clone() for x in stair))
        return Groups(*(x[..., start:end, :, :].clone() for x in stair))


def _joined(held: Stair | None, more: Stair, keys: bool) -> Stair:
    if held is None:
        return more
    if isinstance(held, Tensor) and isinstance(more, Tensor):
        return torch.cat((held, more), -2)
    return Groups(*(torch.cat(pair, -2 if keys else -3) for pair in zip(held, more, strict=True)))


class StaircaseLayer(CacheLayerMixin):
    """Keys and values of one layer in stairs, as a layer of a transformers Cache.

    Args:
        width: S, tokens of a stair and most tokens kept as they are; a multiple of `group`.
        group: G, numbers that share a grid, a multiple of 8; of a narrower head all its channels.
        bits: B_1 = 16 for the newest, then of every stair; 16 keeps a stair as it is.
        frequencies: radians a token by which the model turns each pair of channels of its keys; none = it does not.
        layout: which channels are a pair.
        scales: of steps and smallest values.
    """

    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        *,
        width: int = 128,
        group: int = 32,
        bits: Sequence[int] = (16, 8, 4, 2),
        frequencies: Sequence[float] | None = None,
        layout: Layout = "half",
        scales: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        if group < 8 or group % 8 or width < group or width % group:
            raise FormwrightError(
                f"Stairs need a group that is a multiple of 8 and a width that is a multiple of the group, got "
                f"group={group} and width={width}."
            )
        falls = all(high >= low for high, low in pairwise(bits))
        if len(bits) < 2 or bits[0] != FULL or not falls or not set(bits) <= set(BITS):
            raise FormwrightError(
                f"The bits of stairs begin with 16 and fall, all of {', '.join(map(str, BITS))}; got {tuple(bits)}."
            )
        if layout not in get_args(Layout):
            raise FormwrightError(f"A layout is one of {', '.join(get_args(Layout))}, got {layout!r}.")
        self.width, self.group, self.bits, self.scales = width, group, tuple(bits), scales
        self.frequencies, self.layout = None if frequencies is None else tuple(frequencies), layout
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        channels = math.gcd(value_states.shape[-1], self.group)
        if channels < min(8, self.group) or channels not in (self.group, value_states.shape[-1]):
            raise FormwrightError(
                f"Heads of {value_states.shape[-1]} channels do not split into groups of {self.group}: choose a group "
                "that divides them."
            )
        shared = {"width": self.width, "bits": self.bits, "scales": self.scales}
        self.key_stairs = Stairs(**shared, group=self.group, keys=True)
        self.value_stairs = Stairs(**shared, group=channels, keys=False)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append along axis -2 and give back all keys and values as they are now.

        Raises:
            UnsupportedContext: gradients are asked for, which rounding has none of.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UnsupportedContext(
                "A staircase cache rounds what it keeps and has no gradient: decode under torch.no_grad(), or take "
                "another cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.key_stairs.append(self._turned(key_states, self.length, -1))
        self.value_stairs.append(value_states)
        self.length += key_states.shape[-2]
        return self._turned(self.key_stairs.read(), 0, 1), self.value_stairs.read()

    def _turned(self, keys: Float[Tensor, "b h n d"], first: int, sign: int) -> Float[Tensor, "b h n d"]:
        """Turned as the model turns keys at places first, first + 1, ..., or with sign = -1 back."""
        if self.frequencies is None:
            return keys
        dtype = torch.promote_types(keys.dtype, torch.float32)
        places = torch.arange(first, first + keys.shape[-2], device=keys.device, dtype=dtype)
        angles = sign * places[None, :, None] * places.new_tensor(self.frequencies)
        return rotate(keys, rotation(angles, layout=self.layout))

    def stored(self) -> tuple[Tensor, Tensor] | None:
        if not self.is_initialized:
            return None
        return self._turned(self.key_stairs.read(), 0, 1), self.value_stairs.read()

    @property
    def nbytes(self) -> int:
        """What is kept, in bytes."""
        return sum(x.numel() * x.element_size() for x in self._tensors())

    @property
    def batch(self) -> int | None:
        return self.key_stairs.newest.shape[0] if self.is_initialized else None

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reset(self) -> None:
        self.key_stairs = self.value_stairs = None
        self.carried: Tensor | None = None
        self.length, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; only those that have not gone down a stair yet."""
        if not tokens_to_remove:
            return
        kept = self.length - abs(tokens_to_remove)
        left = self.key_stairs.newest.shape[-2] - abs(tokens_to_remove) if self.is_initialized else -1
        if left < 0 or self.carried is not None:
            raise UnsupportedContext(
                "A staircase cache cannot take back tokens that went down a stair; generate without assisted decoding."
            )
        for stairs in (self.key_stairs, self.value_stairs):
            stairs.newest = stairs.newest[..., :left, :].clone()
        self.length = kept

    def offload(self) -> None:
        self._each(lambda x: x.cpu())

    def prefetch(self) -> None:
        """It moves with its first use."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def _tensors(self) -> list[Tensor]:
        return [*self.key_stairs.tensors(), *self.value_stairs.tensors()] if self.is_initialized else []

    def _each(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.key_stairs.each(move)
            self.value_stairs.each(move)
        if self.carried is not None:
            self.carried = move(self.carried)


def staircase_cache(
    *,
    model: PreTrainedModel,
    width: int = 128,
    group: int = 32,
    bits: tuple[int, ...] = (16, 8, 4, 2),
    scales: torch.dtype = torch.float16,
) -> Cache:
    """An empty cache for `model.generate(..., past_key_values=cache)`, one layer in stairs for every layer.

    Args:
        model: a Formwright decoder, or a causal language model of transformers whose layers all attend to all tokens.
        width, group, bits, scales: see StaircaseLayer.

    Raises:
        FormwrightError: a model whose layers keep something else than keys and values, or turn keys in an unknown way.
    """
    options = {"width": width, "group": group, "bits": bits, "scales": scales}
    if isinstance(model, TransformerForCausalLM):
        stack = model.model.decoder
        kinds = {mixer.cache_kind for mixer in stack.mixers}
        if kinds != {"keys"}:
            raise FormwrightError(
                "A staircase cache keeps keys, and a mixer of this model has none: use its own cache."
            )
        turns = [_turns(getattr(mixer, "position", None) or stack.position) for mixer in stack.mixers]
        return Cache(layers=[StaircaseLayer(**options, **facts) for facts in turns])
    depth = getattr(model.config, "num_hidden_layers", None)
    if not model.can_generate() or depth is None or model.config.is_encoder_decoder:
        raise FormwrightError(f"A staircase cache serves causal language models; {type(model).__name__} is none.")
    if getattr(model, "_is_stateful", False) or set(getattr(model.config, "layer_types", None) or ()) - {
        "full_attention"
    }:
        raise FormwrightError(f"Some layers of {type(model).__name__} keep no keys of all tokens: use its own cache.")
    rotary = [module for module in model.modules() if hasattr(module, "inv_freq")]
    facts = {"frequencies": rotary[0].inv_freq.double().tolist()} if rotary else {}
    return Cache(layers=[StaircaseLayer(**options, **facts) for _ in range(depth)])


def _turns(position: nn.Module | None) -> dict[str, object]:
    """By which angles a position turns keys before they are kept; nothing where it does not."""
    if isinstance(position, HarmonicRoPE):
        position = position.rope
    if not hasattr(position, "rotate") or getattr(position, "turns_stored", False):
        return {}
    if type(position) is not RoPE:
        raise FormwrightError(
            f"{type(position).__name__} turns keys in a way that a staircase cache cannot take back: choose rope, "
            "rope-alibi or a position that turns none."
        )
    rates = position.rates(position.rotary_dim, torch.ones(1, 1, 1, dtype=torch.float64))
    return {"frequencies": rates.flatten().tolist(), "layout": position.layout}
