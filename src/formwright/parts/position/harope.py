"""HARoPE: a learned linear map a head before the rotation, so that heads choose the planes that turn.

Paper    Li et al.: Head-wise Adaptive Rotary Positional Encoding (2025), arXiv:2510.10489.
Idea     On a grid RoPE gives each axis channels of its own. A map M of all channels lets every head mix them, the two
         axes included, and a score still knows the offset alone:

             M = U diag(s) V^T     U = exp((A_u - A_u^T) / 2),  V = exp((A_v - A_v^T) / 2),  s = softplus(sigma) + 1e-6

             score[m, n] = (R_m M q_m) . (R_n M^-T k_n) / sqrt(d) = q_m . M^T R_(n - m) M^-T k_n / sqrt(d)

         U and V are orthogonal, so the inverse costs nothing: M^-T = U diag(1/s) V^T. At the start M is the identity
         and HARoPE is RoPE; at no offset the score stays q . k for any M. After training `fold` multiplies the maps
         into the projections, and what runs is RoPE.
Differs  wiring="conjugate" is the released code's; "shared" is the paper's text, M on both sides, where a score is
         q_m . M^T R_(n - m) M k_n and s sets the temperature too. With fewer key than query heads there is one map for
         each key head, shared by its queries. sigma is not weight-decayed: its 0 is no identity.
"""

import math
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.position.roformer import RoPE
from formwright.parts.position.rotary import full_precision, refuse_cross_attention

Wiring = Literal["conjugate", "shared"]


class HARoPE(nn.Module):
    """RoPE in a basis of its own for every head of every layer.

    Args:
        heads: query heads.
        head_dim: channels of a head; even, on a plane a multiple of 4, in a volume of 6.
        kv_heads: key heads; none = as many as query heads.
        wiring: "conjugate" maps keys by M^-T and keeps the score of a token with itself, "shared" maps both by M.
        base: of the frequencies, as in RoPE.
    """

    scope = "layer"
    no_weight_decay: ClassVar[tuple[str, ...]] = ("sigma",)

    def __init__(
        self,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        wiring: Wiring = "conjugate",
        base: float = 10000.0,
    ) -> None:
        super().__init__()
        maps = heads if kv_heads is None else kv_heads
        if maps < 1 or heads % maps:
            raise FormwrightError(
                f"HARoPE needs kv_heads that divide the heads, got kv_heads={maps} and heads={heads}."
            )
        if wiring not in get_args(Wiring):
            raise FormwrightError(f'HARoPE has wiring="conjugate" or "shared", got {wiring!r}.')
        self.wiring, self.shared_by = wiring, heads // maps
        self.rope = RoPE(head_dim=head_dim, base=base)
        self.A_u = nn.Parameter(torch.empty(maps, head_dim, head_dim))
        self.A_v = nn.Parameter(torch.empty(maps, head_dim, head_dim))
        self.sigma = nn.Parameter(torch.empty(maps, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.A_u)
        nn.init.zeros_(self.A_v)
        nn.init.constant_(self.sigma, math.log(math.e - 1))  # softplus gives 1

    def maps(self) -> tuple[Float[Tensor, "h d d"], Float[Tensor, "g d d"]]:
        """What the queries and the keys of every head are multiplied by, in fp32 (fp64 for fp64 parameters)."""
        dtype = torch.promote_types(self.sigma.dtype, torch.float32)
        u, v = (torch.linalg.matrix_exp((a - a.mT) / 2) for a in (self.A_u.to(dtype), self.A_v.to(dtype)))
        s = (F.softplus(self.sigma.to(dtype)) + 1e-6)[:, None]
        of_queries = (u * s) @ v.mT
        of_keys = of_queries if self.wiring == "shared" else (u / s) @ v.mT
        return of_queries.repeat_interleave(self.shared_by, 0), of_keys

    def rotate(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], context: Context
    ) -> tuple[Float[Tensor, "b h q d"], Float[Tensor, "b g k d"]]:
        """q and k of the new tokens, mapped and turned; the keys before they are cached.

        Raises:
            UnsupportedContext: cross-attention, where n - m is no distance; a grid the tokens or channels do not fit.
        """
        refuse_cross_attention("HARoPE", context)
        with full_precision(q.device):
            of_queries, of_keys = self.maps()
            mapped_q, mapped_k = q.to(of_queries.dtype) @ of_queries.mT, k.to(of_keys.dtype) @ of_keys.mT
            turned_q, turned_k = self.rope.rotate(mapped_q, mapped_k, context)
        return turned_q.to(q.dtype), turned_k.to(k.dtype)


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """For inference, in place: the maps go into the query and key projections of every layer, RoPE takes their place.

    Raises:
        FormwrightError: no layer has HARoPE, or one does not project in the plain way.
    """
    layers = [module for module in model.modules() if isinstance(getattr(module, "position", None), HARoPE)]
    if not layers:
        raise FormwrightError("There is no HARoPE to fold: build the model with position='harope'.")
    for layer in layers:
        plain = isinstance(layer, MultiHeadAttention) and type(layer)._projected is MultiHeadAttention._projected
        projection = layer.query_key_value
        if not (plain and isinstance(projection, nn.Linear) and projection.weight.is_floating_point()):
            raise FormwrightError(
                f"HARoPE's maps go into a plain projection, and {type(layer).__name__} has another: merge adapters "
                "first, or leave the model as it is."
            )
    for layer in layers:
        maps = torch.cat(layer.position.maps())
        for parameter in (layer.query_key_value.weight, layer.query_key_value.bias):
            if parameter is not None:
                rows = parameter[: maps.shape[0] * maps.shape[1]]  # (h + g) d of them, with or without columns
                mapped = maps @ rows.to(maps.dtype).view(*maps.shape[:2], -1)
                rows.copy_(mapped.view_as(rows))
        layer.position = layer.position.rope
