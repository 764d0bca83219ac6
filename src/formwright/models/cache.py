"""What a model of ours keeps between decoding steps, as layers of a transformers Cache.

`KeyValues` holds keys and values in buffers that double when full, so that a step copies one token instead of the whole
past; `State` holds the tuple of a recurrent mixer. `new_cache(mixers)` makes one layer a mixer by its `cache_kind`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from formwright.contracts import Mixer, UnsupportedContext

SMALLEST = 64  # tokens of the first buffer


class KeyValues(CacheLayerMixin):
    """Keys and values (b, h, tokens, d), appended in place, and what the layer's position carries on.

    Args:
        capacity: tokens to make room for at once; more are taken when needed.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int = SMALLEST) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0
        self.carried: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        tokens = key_states.shape[-2]
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return self._joined(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(self._room(key_states, tokens), self._room(value_states, tokens))
        start = self.claim(tokens)
        end = self.length
        self.keys[..., start:end, :] = key_states
        self.values[..., start:end, :] = value_states
        return self.keys[..., :end, :], self.values[..., :end, :]

    def _joined(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appended out of place: the backward still needs what was kept before."""
        kept = self.stored()
        if kept is not None:
            key_states, value_states = (
                torch.cat(pair, dim=-2) for pair in zip(kept, (key_states, value_states), strict=True)
            )
        self.lazy_initialization(key_states, value_states)
        self.length = key_states.shape[-2]
        return key_states, value_states

    def claim(self, tokens: int) -> int | None:
        """Room in the buffers for tokens that the caller writes itself, and the place of the first; none before any
        update.
        """
        if not self.is_initialized:
            return None
        start, end = self.length, self.length + tokens
        if end > self.keys.shape[-2]:
            self.keys, self.values = self._moved(self.keys, 2 * end), self._moved(self.values, 2 * end)
        self.length = end
        return start

    def _room(self, like: Tensor, tokens: int) -> Tensor:
        return like.new_empty(*like.shape[:-2], max(tokens, self.capacity), like.shape[-1])

    def _moved(self, buffer: Tensor, tokens: int) -> Tensor:
        larger = buffer.new_empty(*buffer.shape[:-2], tokens, buffer.shape[-1])
        larger[..., : self.length, :] = buffer[..., : self.length, :]
        return larger

    def stored(self) -> tuple[Tensor, Tensor] | None:
        return (self.keys[..., : self.length, :], self.values[..., : self.length, :]) if self.length else None

    @property
    def batch(self) -> int | None:
        """How many sequences are kept; none before any."""
        return self.keys.shape[0] if self.is_initialized else None

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def _each(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = move(self.keys), move(self.values)
        if self.carried is not None:
            self.carried = move(self.carried)

    def reset(self) -> None:
        self.keys = self.values = self.carried = None
        self.length, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is negative, as transformers passes it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}.")
        if tokens_to_remove and self.carried is not None:
            raise UnsupportedContext(
                "This model's position sums over all tokens so far and cannot be rolled back; generate without "
                "assisted decoding, or choose another position."
            )
        self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])


class State(CacheLayerMixin):
    """The state of a recurrent mixer: a tuple of tensors, batch first, of a size that does not grow."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: tuple[Tensor, ...] | None = None
        self.length = 0

    def write(self, *state: Tensor, tokens: int) -> None:
        self.state, self.length, self.is_initialized = state, self.length + tokens, True

    def lazy_initialization(self, *_keys_and_values: Tensor) -> None:
        raise TypeError("A recurrent layer keeps a state, not keys and values.")

    def update(self, *_keys_and_values: Tensor, **_kwargs: object) -> tuple[Tensor, Tensor]:
        raise TypeError("A recurrent layer keeps a state, not keys and values.")

    def stored(self) -> None:
        return None

    @property
    def batch(self) -> int | None:
        """How many sequences are kept; none before any."""
        return None if self.state is None else self.state[0].shape[0]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def _each(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = tuple(move(part) for part in self.state)

    def offload(self) -> None:
        self._each(lambda t: t.cpu())

    def prefetch(self) -> None:
        """The state is small and moves with its first use."""

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UnsupportedContext(
                "A recurrent state cannot be rolled back; generate without assisted decoding, or choose a mixer that "
                "keeps keys."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices])


def refuse_other_caches(cache: Cache, mixers: Sequence[Mixer], *, batch: int) -> None:
    """A cache that was made for other layers or another batch is refused before anything is written into it.

    Raises:
        UnsupportedContext: what the cache holds does not fit.
    """
    states = [isinstance(layer, State) for layer in cache.layers]
    if states != [mixer.cache_kind == "state" for mixer in mixers]:
        raise UnsupportedContext(
            f"past_key_values is a {type(cache).__name__} of {len(cache.layers)} layers that was not made for this "
            f"model of {len(mixers)}: leave it out, or take the one that TransformerModel.new_cache() makes."
        )
    held = next((layer.batch for layer in cache.layers if getattr(layer, "batch", None) is not None), batch)
    if held != batch:
        raise UnsupportedContext(
            f"past_key_values holds {held} sequences, but {batch} go on: repeat or select its rows first with its "
            "batch_repeat_interleave or batch_select_indices."
        )


def new_cache(mixers: Iterable[Mixer], *, capacity: int = SMALLEST) -> Cache:
    """An empty cache with one layer for every mixer.

    Raises:
        UnsupportedContext: a mixer keeps nothing and so cannot decode step by step.
    """
    kinds = {"keys": lambda: KeyValues(capacity), "state": State}
    layers = []
    for mixer in mixers:
        if mixer.cache_kind not in kinds:
            raise UnsupportedContext(
                f"{type(mixer).__name__} has no cache to decode with; pass use_cache=False, which recomputes the past "
                "at every step."
            )
        layers.append(kinds[mixer.cache_kind]())
    return Cache(layers=layers)
