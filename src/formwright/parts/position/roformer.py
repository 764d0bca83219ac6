"""RoPE: every pair of channels of q and k turns by an angle proportional to the token's position.

Paper    Su, Lu, Pan, Murtadha, Wen, Liu: RoFormer (2021), arXiv:2104.09864, equations 15, 16, 34 and 19.
Idea     Rotations compose: turning q by m f and k by n f leaves an inner product that knows only n - m.

             score[m, n] = (R_m q_m) . (R_n k_n) / sqrt(d) = q_m . R_(n - m) k_n / sqrt(d)

             R_p turns channels 2i, 2i + 1 by p base^(-2i/d)          base = 10000

         v is left alone, nothing is learned, no length is the longest. A cache keeps turned keys: a new token needs its
         own position only. The linear attention of equation 19 is `formwright.ops.rotary.rotary_linear_attention`.
Differs  In nothing by default. layout="half" (GPT-NeoX, LLaMA) pairs channel i with i + d/2, the same function of
         permuted weights; rotary_dim < head_dim (GPT-J) turns the first channels only. The release can turn v as well
         (rotary_value); that is off in every published checkpoint and not here.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.ops.rotary import LAYOUTS, Layout, Rotation, rotary_angles, rotate, rotation
from formwright.parts.position import refuse_all_but_one_sequence


class RoPE(nn.Module):
    """Relative position by rotation of queries and keys. No parameters, no longest length.

    Args:
        head_dim: channels of a head.
        base: the slowest pair turns once in about 2 pi base tokens.
        layout: which channels are a pair, see `formwright.ops.rotary`; weights are trained for one of the two.
        rotary_dim: how many channels turn, the first ones; none = all. Even.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        base: float = 10000.0,
        layout: Layout = "interleaved",
        rotary_dim: int | None = None,
    ) -> None:
        super().__init__()
        turned = head_dim if rotary_dim is None else rotary_dim
        if turned < 2 or turned % 2 or turned > head_dim:
            raise FormwrightError(
                f"RoPE turns pairs of channels: of a head of {head_dim} it cannot turn {turned}; choose an even "
                f"rotary_dim from 2 to {head_dim} or another number of heads."
            )
        if base <= 0:
            raise FormwrightError(f"RoPE needs base > 0, got base={base}.")
        if layout not in LAYOUTS:
            raise FormwrightError(f"RoPE has layout={' or '.join(map(repr, LAYOUTS))}, got {layout!r}.")
        self.base, self.layout, self.rotary_dim = base, layout, turned

    def rotate(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], context: Context
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b g k d"]]:
        """q and k of the new tokens, turned; the keys before they are cached.

        Raises:
            UnsupportedContext: cross-attention or a grid, where n - m is no distance.
        """
        refuse_all_but_one_sequence("RoPE", context)
        by = self._rotation(q, context)
        return rotate(q, by), rotate(k, by)

    def _rotation(self, q: Tensor, context: Context) -> Rotation:
        """The angles in fp32 (fp64 for fp64), made by the first layer and carried to the others."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        key = f"rope {self.layout} {self.base} {self.rotary_dim} {dtype} {q.device} {context.queries} of {context.keys}"
        positions, by = context.carry.get(key, (None, None))
        if by is None or positions is not context.positions:
            angles = rotary_angles(context.query_positions(), dim=self.rotary_dim, base=self.base, dtype=dtype)
            by = rotation(angles, layout=self.layout)
            context.carry[key] = (context.positions, by)
        return by
