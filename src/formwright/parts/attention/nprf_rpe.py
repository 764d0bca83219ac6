"""NPRF: kernel attention of normalised queries and keys that still takes a relative position, by FFT.

Paper    Luo, Li, Cai, He, Peng, Zheng, Ke, Wang, Liu: Stable, Fast and Accurate: Kernelized Attention with Relative
         Positional Encoding (NeurIPS 2021), arXiv:2106.12566.
Idea     Random features phi make exp(q . k) a product of what queries and keys are alone, and a bias set by i - j
         multiplies it by a Toeplitz matrix, which an FFT applies in n log n:

             out_i = sum_j c_ij phi(q_i) . phi(k_j) v_j / sum_j c_ij phi(q_i) . phi(k_j)          c_ij = exp(b_(i-j))

             phi(x) = m^(-1/2) exp(-|x|^2 / 2) (exp(w_1 . x), .., exp(w_m . x))        q <- q / |q|,  k <- k / |k|

         The variance of phi(q) . phi(k) grows exponentially in |q|^2 and |k|^2. On vectors of length 1 it is bounded,
         and training from scratch is stable; what sharpness the softmax loses by that, c gives back. The w are drawn
         once, in blocks of orthogonal rows of the lengths that N(0, 1) rows have.
Differs  b is whatever the layer's position gives: kept as diagonals it goes through the FFT (`rpe` is the paper's), as
         an array, which is n x n already, through the weights. Factors on the weights (urpe) multiply c above the line
         alone. Short sequences and decoding steps have their weights made outright, where that is less work.
         Where a query's weight of itself is below e^-3 of the largest of all, the FFT is one in float64. A `scaling` is
         a factor on q . k after normalisation, 1 unless given. The w are drawn for each layer from `seed` and not from
         the model's seed, and not redrawn. features="trigonometric" is the paper's TRF, whose sums can vanish.
"""

import math
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Hook, Mask, Structured, Toeplitz, dense, refuse
from formwright.errors import FormwrightError
from formwright.ops.toeplitz import toeplitz_attend

OUTRIGHT = 2.0  # work of an FFT's element against one of a product, measured; below what is fastest, to save memory
SPREAD = 3.0  # in logarithms of weights; float32 then keeps five digits of a row


def orthogonal_features(count: int, width: int, seed: int) -> Float[Tensor, "{count} {width}"]:
    """w_1 .. w_m in float64: blocks of orthogonal rows, each as long as a row of `width` normal numbers."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def rotation() -> Tensor:
        basis, triangle = torch.linalg.qr(normal(width, width))
        return (basis * triangle.diagonal().sign()).mT  # the signs that LAPACK chooses are not random

    blocks = [rotation() for _ in range(-(-count // width))]
    return torch.cat(blocks)[:count] * normal(count, width).norm(dim=-1, keepdim=True)


class NPRF(nn.Module):
    """Normalised kernel attention with a relative position. No parameters.

    Args:
        head_dim: channels d of a head.
        features: m; none = d.
        kernel: "positive" (exp, NPRF) or "trigonometric" (sine and cosine, NTRF).
        normalise: q and k to length 1; without, they are divided by d^(1/4) each, as in Performer.
        seed: of the w, which every layer draws for itself.
        layer: which layer this is.
    """

    grouped: ClassVar[bool] = False
    hooks: ClassVar[frozenset[Hook]] = frozenset({"rotate", "bias", "scale"})

    def __init__(
        self,
        *,
        head_dim: int,
        features: int | None = None,
        kernel: Literal["positive", "trigonometric"] = "positive",
        normalise: bool = True,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        features = head_dim if features is None else features
        if head_dim < 1 or features < 1:
            raise FormwrightError(
                f"NPRF needs head_dim and features from 1, got head_dim={head_dim} and features={features}."
            )
        if kernel not in ("positive", "trigonometric"):
            raise FormwrightError(f'NPRF has kernel="positive" or "trigonometric", got {kernel!r}.')
        if seed < 0:
            raise FormwrightError(f"NPRF needs a seed from 0, got {seed}.")
        self.head_dim, self.kernel, self.normalise = head_dim, kernel, normalise
        # In a tuple and no buffer: model.bfloat16() would round a buffer, and loading through the meta device lose it.
        self.w = (orthogonal_features(features, head_dim, 1000 * seed + layer),)

    def forward(
        self,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b h k d"],
        v: Float[Tensor, "b h k e"],
        *,
        mask: Mask,
        bias: Structured | None = None,
        scale: Structured | None = None,
        scaling: float | None = None,
    ) -> Float[Tensor, "b h q e"]:
        """The weighted means; an array of q x k is made only where bias or scale are one, or where it is small. No
        visible key gives 0.

        Raises:
            UnsupportedContext: a scaling that is not above 0.
        """
        with torch.autocast(q.device.type, enabled=False):
            phi_q, phi_k = self._features(q, k, mask, scaling)
            wide = v.to(phi_q.dtype)
            if mask.padding is not None:
                wide = wide.masked_fill(~mask.padding[:, None, :, None], 0)
            arrays = any(isinstance(given, Tensor) for given in (bias, scale))
            attend = materialised if arrays or _is_short(mask, phi_q.shape[-1], v.shape[-1]) else by_fft
            return attend(phi_q, phi_k, wide, mask=mask, bias=bias, scale=scale).to(v.dtype)

    def _features(
        self, q: Tensor, k: Tensor, mask: Mask, scaling: float | None
    ) -> tuple[Float[Tensor, "b h q m"], Float[Tensor, "b h k m"]]:
        """phi of both, in float32 or float64; 0 for pads. Without normalisation each query's features are divided by
        the largest, and so are all keys' together: the quotients are the same."""
        if scaling is not None and scaling <= 0:
            raise refuse(
                "NPRF attention",
                asked=f"a scaling of {scaling}, or a position that makes the scores itself",
                because="its features stand for the exponential of a positive multiple of q . k",
                instead="Choose a position with a bias, such as rpe, t5 or kerple, and a scaling above 0.",
            )
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(dtype), k.to(dtype)
        if self.normalise:
            q, k, scaling = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6), scaling or 1.0
        w = self.w[0].to(q.device, dtype)
        root = (self.head_dim**-0.5 if scaling is None else scaling) ** 0.5
        real = None if mask.padding is None else mask.padding[:, None, :, None]
        found = [_phi(x * root, w, self.kernel) for x in (q, k)]
        tops = [0.0, 0.0]
        if not self.normalise:
            seen = found[1][0] if real is None else found[1][0].masked_fill(~real, -torch.inf)
            least = torch.finfo(dtype).min
            tops = [found[0][0].detach().amax(-1, keepdim=True), seen.detach().amax((-2, -1), keepdim=True)]
            tops[1] = tops[1].clamp(min=least)
        phi_q, phi_k = ((log - top).exp() * wave for (log, wave), top in zip(found, tops, strict=True))
        return phi_q, phi_k if real is None else phi_k.masked_fill(~real, 0)


def _phi(x: Tensor, w: Tensor, kernel: str) -> tuple[Tensor, Tensor | float]:
    """phi(x) as a logarithm and a factor with a sign."""
    turned, half = x @ w.mT, x.square().sum(-1, keepdim=True) / 2
    root = len(w) ** -0.5
    if kernel == "positive":
        return turned - half, root
    return half.expand(*turned.shape[:-1], 2 * len(w)), torch.cat([turned.sin(), turned.cos()], -1) * root


def _is_short(mask: Mask, features: int, width: int) -> bool:
    """Whether the weights are less work than the transforms: at 32 features and channels, up to 600 tokens."""
    tokens = mask.queries + mask.keys
    transforms = features * (width + 1) * tokens * math.log2(tokens)
    return mask.queries * mask.keys * (features + width + 8) <= OUTRIGHT * transforms


def materialised(
    phi_q: Float[Tensor, "b h q m"],
    phi_k: Float[Tensor, "b h k m"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask,
    bias: Structured | None = None,
    scale: Structured | None = None,
) -> Float[Tensor, "b h q e"]:
    """The same through the weights, an array of q x k."""
    weights = phi_q @ phi_k.mT
    seen = mask.dense()
    if bias is not None:
        b = dense(bias).to(weights.dtype)
        b = b if seen is None else b.masked_fill(~seen, -torch.inf)
        top = b.detach().amax(-1, keepdim=True)
        weights = weights * (b - top.clamp(min=torch.finfo(b.dtype).min)).exp()
    elif seen is not None:
        weights = weights.masked_fill(~seen, 0)
    total = _away_from_zero(weights.sum(-1, keepdim=True))
    return (weights if scale is None else weights * dense(scale).to(weights.dtype)) @ v / total


def by_fft(
    phi_q: Float[Tensor, "b h q m"],
    phi_k: Float[Tensor, "b h k m"],
    v: Float[Tensor, "b h k e"],
    *,
    mask: Mask,
    bias: Toeplitz | None = None,
    scale: Toeplitz | None = None,
) -> Float[Tensor, "b h q e"]:
    """The same by diagonals."""
    queries, keys, dtype = mask.queries, mask.keys, v.dtype
    heads = phi_q.shape[1]
    logs = v.new_zeros(heads, queries + keys - 1) if bias is None else bias.diagonals.to(dtype)
    first = queries - 1 if mask.causal else 0  # the diagonal of i = j is the first that a causal query sees
    seen = logs[:, first:]
    top = seen.detach().amax(-1, keepdim=True)
    own = (
        seen.detach()[:, queries - 1 - first] if keys >= queries else seen.detach().amin(-1)
    )  # that a query surely sees
    if dtype != torch.float64 and float((top[:, 0] - own).amax()) > SPREAD:
        wide = (part.double() for part in (phi_q, phi_k, v))
        return by_fft(*wide, mask=mask, bias=bias, scale=scale).to(dtype)
    c = F.pad((seen - top).exp(), (first, 0))
    phi_q, phi_k, columns = (part.mT.contiguous() for part in (phi_q, phi_k, v))
    ones = torch.ones_like(columns[:, :, :1])
    if scale is None:
        sums = toeplitz_attend(phi_q, phi_k, torch.cat([columns, ones], 2), c)
        above, total = sums[:, :, :-1], sums[:, :, -1:]
    else:
        above = toeplitz_attend(phi_q, phi_k, columns, c * scale.diagonals.to(dtype))
        total = toeplitz_attend(phi_q, phi_k, ones, c)
    mixed = (above / _away_from_zero(total)).mT
    if mask.padding is None:
        return mixed
    real = mask.padding.long().cumsum(-1)[:, keys - queries :] if mask.causal else mask.padding.sum(-1, keepdim=True)
    return mixed.masked_fill(real[:, None, :, None] == 0, 0)  # rounding errors over rounding errors


def _away_from_zero(total: Tensor) -> Tensor:
    """A divisor that is never 0; sums of features with signs keep theirs."""
    least = torch.finfo(total.dtype).eps
    return torch.where(total < 0, total.clamp(max=-least), total.clamp(min=least))
