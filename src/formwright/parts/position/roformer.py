"""RoPE: every pair of channels of q and k turns by an angle proportional to the token's position.

Paper    Su, Lu, Pan, Murtadha, Wen, Liu: RoFormer (2021), arXiv:2104.09864, equations 15, 16, 34 and 19.
Idea     Rotations compose: turning q by m f and k by n f leaves an inner product that knows only n - m.

             score[m, n] = (R_m q_m) . (R_n k_n) / sqrt(d) = q_m . R_(n - m) k_n / sqrt(d)

             R_p turns channels 2i, 2i + 1 by p base^(-2i/d)          base = 10000

         v is left alone, nothing is learned, no length is the longest. A cache keeps turned keys: a new token needs its
         own position only. The linear attention of equation 19 is `formwright.ops.rotary.rotary_linear_attention`.
         On a grid of two or three axes every axis turns an equal share of the channels by its own coordinate
         (`formwright.parts.position.rotary`), so that a score knows the offset along each.
Differs  In nothing by default. layout="half" (GPT-NeoX, LLaMA) pairs channel i with i + d/2, the same function of
         permuted weights; rotary_dim < head_dim (GPT-J) or fraction < 1 (GPT-NeoX) turns the first channels only. The
         release can turn v as well (rotary_value); that is off in every published checkpoint and not here. Grids are
         not in the paper; the shares are those of axial RoPE in vision models.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.ops.rotary import LAYOUTS, Layout, Rotation, rotate, rotation
from formwright.parts.position.rotary import (
    along_axes,
    channels_by_axis,
    frequencies,
    length_along,
    refuse_cross_attention,
    turned_channels,
)


class RoPE(nn.Module):
    """Relative position by rotation of queries and keys. No parameters, no longest length.

    Args:
        head_dim: channels of a head.
        base: the slowest pair turns once in about 2 pi base tokens.
        layout: which channels are a pair, see `formwright.ops.rotary`; weights are trained for one of the two.
        rotary_dim: how many channels turn, the first ones; none = `fraction` of them. Even.
        fraction: the share of the channels that turns.
    """

    gain = 1.0  # of the turned channels; YaRN's temperature

    def __init__(
        self,
        *,
        head_dim: int,
        base: float = 10000.0,
        layout: Layout = "interleaved",
        rotary_dim: int | None = None,
        fraction: float = 1.0,
    ) -> None:
        super().__init__()
        self.rotary_dim = turned_channels("RoPE", head_dim, rotary_dim=rotary_dim, fraction=fraction)
        if base <= 0:
            raise FormwrightError(f"RoPE needs base > 0, got base={base}.")
        if layout not in LAYOUTS:
            raise FormwrightError(f"RoPE has layout={' or '.join(map(repr, LAYOUTS))}, got {layout!r}.")
        self.base, self.layout = base, layout

    def extra_repr(self) -> str:
        """All that sets the angles."""
        return f"{self.rotary_dim}, base={self.base}, layout={self.layout!r}"

    def rotate(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], context: Context
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b g k d"]]:
        """q and k of the new tokens, turned; the keys before they are cached.

        Raises:
            UnsupportedContext: cross-attention, where n - m is no distance; a grid the tokens or channels do not fit.
        """
        refuse_cross_attention("RoPE", context)
        by = self._rotation(k, context)
        return rotate(q, by.last(q.shape[2])), rotate(k, by)

    def rates(self, channels: int, length: Float[Tensor, "rows 1 1"]) -> Float[Tensor, "*rows half"]:
        """What a step along an axis of that length turns each of its pairs by; the scaled kinds of RoPE differ here."""
        return length.new_tensor(frequencies(channels, self.base))

    def _rotation(self, k: Tensor, context: Context) -> Rotation:
        """The angles of the keys in fp32 (fp64 for fp64), made by the first layer and carried to the others."""
        dtype = torch.promote_types(k.dtype, torch.float32)
        key = f"{self} {dtype} {k.device} {k.shape[2]} of {context.keys} on {context.grid}"
        positions, by = context.carry.get(key, (None, None))
        if by is None or positions is not context.positions:
            axes = along_axes("RoPE", context, k.shape[2])
            channels = channels_by_axis("RoPE", self.rotary_dim, axes)
            angles = [
                places.to(dtype)[..., None] * self.rates(channels, length_along(axis, context, dtype))
                for axis, places in enumerate(axes)
            ]
            by = rotation(torch.cat(angles, -1), layout=self.layout, gain=self.gain)
            context.carry[key] = (context.positions, by)
        return by
