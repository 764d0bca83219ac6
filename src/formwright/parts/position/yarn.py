"""RoPE beyond the length it was trained at: four ways to change its frequencies, YaRN the last.

Paper    Peng, Quesnelle, Fan, Shippole: YaRN (2023), arXiv:2309.00071, sections 2 and 3. Interpolation: Chen et al.
         (2023), arXiv:2306.15595; NTK-aware and dynamic: bloc97 and emozilla, published as posts.
Idea     Angles beyond the training length are new to a model; slower turns bring them back among the known ones.

             rope-linear    f_i / s                                      s = factor: every pair s times slower
             rope-ntk       b' = b s^(r / (r - 2)), f_i = b'^(-2i/r)     the slowest s times slower, the fastest kept
             rope-dynamic   the same with s l / L - (s - 1) for s once the length l is beyond L = trained
             rope-yarn      f_i (1 - g_i) / s + f_i g_i, q and k times 0.1 ln s + 1 (on their turned channels)

             g_i = 1 where a pair turns `fast` times or more within L, 0 where it turns `slow` times or fewer, a line
             over i between; both ends rounded to whole pairs, outwards

         No training is needed for any of them; YaRN is best after a little. On a grid L and l are an axis's.
Differs  In nothing that is computed. With rope-dynamic a length changes all angles: a cache keeps the keys unturned and
         every step turns them anew as its own query, where transformers keeps turned ones of many lengths. What earlier
         tokens became stays, so that beyond L, from the second layer on, decoding with a cache is near a forward pass
         over all tokens so far and not equal to it; use_cache=False is that pass. l is each row's own, where
         transformers takes the longest of the batch.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from formwright.contracts import Context, refuse
from formwright.errors import FormwrightError
from formwright.ops.rotary import Layout
from formwright.parts.position.roformer import RoPE
from formwright.parts.position.rotary import frequencies


class LinearRoPE(RoPE):
    """Position interpolation: RoPE that goes `factor` times slower.

    Args:
        head_dim: channels of a head.
        factor: how many times longer than in training sequences may be, 1 or more.
        base: as in RoPE.
        layout: as in RoPE.
        fraction: the share of the channels that turns.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        factor: float = 4.0,
        base: float = 10000.0,
        layout: Layout = "interleaved",
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim=head_dim, base=base, layout=layout, fraction=fraction)
        if factor < 1:
            raise FormwrightError(f"A scaled RoPE needs factor >= 1, got factor={factor}.")
        self.factor = factor

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, factor={self.factor}"

    def rates(self, channels: int, length: Float[Tensor, "rows 1 1"]) -> Float[Tensor, "*rows half"]:
        return super().rates(channels, length) / self.factor


class NTKRoPE(LinearRoPE):
    """NTK-aware RoPE: a larger base, by which fast pairs keep their speed. Options as in LinearRoPE."""

    def rates(self, channels: int, length: Float[Tensor, "rows 1 1"]) -> Float[Tensor, "*rows half"]:
        base = self.base * self.factor ** _exponent(channels)
        return length.new_tensor(frequencies(channels, base))


class DynamicRoPE(LinearRoPE):
    """NTK-aware RoPE whose base follows the length; RoPE itself up to `trained` tokens.

    Args:
        head_dim: channels of a head.
        factor: how fast the base grows beyond; 1 = as the length itself asks.
        trained: the length L in training.
        base: as in RoPE.
        layout: as in RoPE.
        fraction: the share of the channels that turns.
    """

    turns_stored = True  # the cache keeps keys unturned: each step turns them all by angles of its own

    def __init__(
        self,
        *,
        head_dim: int,
        factor: float = 1.0,
        trained: int = 2048,
        base: float = 10000.0,
        layout: Layout = "interleaved",
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim=head_dim, factor=factor, base=base, layout=layout, fraction=fraction)
        self.trained = _checked(trained)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trained={self.trained}"

    def rotate(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], context: Context
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b g k d"]]:
        if k.shape[2] != context.keys and context.memory is None:
            raise refuse(
                "rope-dynamic",
                asked=f"{k.shape[2]} of {context.keys} keys",
                because="a longer sequence turns all of them anew",
                instead="Take a mixer whose cache keeps keys unturned (`turns_stored`), or rope-ntk or rope-yarn.",
            )
        return super().rotate(q, k, context)

    def rates(self, channels: int, length: Float[Tensor, "rows 1 1"]) -> Float[Tensor, "*rows half"]:
        plain = RoPE.rates(self, channels, length)
        growth = self.factor * length.clamp(min=self.trained) / self.trained - (self.factor - 1)
        steps = torch.arange(0, channels, 2, dtype=length.dtype, device=length.device) / channels
        return plain * growth ** (-_exponent(channels) * steps)


class YaRN(LinearRoPE):
    """NTK by parts: fast pairs as they were, slow ones interpolated, and sharper attention.

    Args:
        head_dim: channels of a head.
        factor: how many times longer than in training sequences may be, 1 or more.
        trained: the length L in training.
        fast: turns within L from which a pair stays as it was (the paper's beta).
        slow: turns within L up to which a pair is interpolated whole (its alpha).
        temperature: what turned queries and keys are multiplied by; none = 0.1 ln factor + 1.
        base: as in RoPE.
        layout: as in RoPE.
        fraction: the share of the channels that turns.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        factor: float = 4.0,
        trained: int = 2048,
        fast: float = 32.0,
        slow: float = 1.0,
        temperature: float | None = None,
        base: float = 10000.0,
        layout: Layout = "interleaved",
        fraction: float = 1.0,
    ) -> None:
        super().__init__(head_dim=head_dim, factor=factor, base=base, layout=layout, fraction=fraction)
        if not 0 < slow < fast or base <= 1 or (temperature is not None and temperature <= 0):
            raise FormwrightError(
                "YaRN needs 0 < slow < fast, base > 1 and a temperature above 0, "
                f"got slow={slow}, fast={fast}, base={base} and temperature={temperature}."
            )
        self.trained, self.fast, self.slow = _checked(trained), fast, slow
        self.gain = 0.1 * math.log(factor) + 1 if temperature is None else temperature

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trained={self.trained}, turns={self.slow} to {self.fast}, gain={self.gain}"

    def rates(self, channels: int, length: Float[Tensor, "rows 1 1"]) -> Float[Tensor, "*rows half"]:
        low = min(max(math.floor(self._pair(self.fast, channels)), 0), channels - 1)
        high = min(max(math.ceil(self._pair(self.slow, channels)), low), channels - 1)
        pairs = torch.arange(channels // 2, dtype=length.dtype, device=length.device)
        slowed = ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
        plain = RoPE.rates(self, channels, length)
        return plain * (1 - slowed) + plain / self.factor * slowed

    def _pair(self, turns: float, channels: int) -> float:
        """Which pair turns so often within the trained length."""
        return channels * math.log(self.trained / (2 * math.pi * turns)) / (2 * math.log(self.base))


def _exponent(channels: int) -> float:
    """The base is multiplied by the factor to this power, which makes the slowest pair `factor` times slower. The first
    pair, the only one of two channels, turns by 1 whatever the base.
    """
    return channels / (channels - 2) if channels > 2 else 0.0


def _checked(trained: int) -> int:
    if trained < 1:
        raise FormwrightError(f"The trained length is a whole number of tokens from 1, got trained={trained}.")
    return trained
