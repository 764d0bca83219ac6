"""MatFormer: a feed-forward layer whose first hidden units are a smaller layer of their own, several times over.

Paper    Devvrit, Kudugunta, Kusupati et al.: MatFormer: Nested Transformer for Elastic Inference (NeurIPS 2024),
         arXiv:2310.07707.
Idea     g layers share one pair of matrices; the smaller are the first rows and columns of the larger. Trained
         nested (`formwright.training.matformer`), each is a layer to use by itself, in any mix over the model's depth
         (`formwright.models.matformer`).

             T_i(x) = act(x W1[:m_i]^T + b1[:m_i]) W2[:, :m_i]^T + b2       m_i = F / 2^(g - i), m_g = F

         With a gate, its rows are cut as those of W1 are. b2 is added whole. Attention, embeddings and norms belong to
         all granularities alike, so the cache of one fits the others.
Differs  Granularities are halvings, as in the paper (1/8, 1/4, 1/2, 1), rounded down. The paper's appendix nests
         attention heads as well; here they are not. The released demo forgets its granularity after every call; here it
         stays until another is chosen.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formwright.build import build
from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.ops.linear import linear

Form = Literal["gelu", "gelu-tanh", "relu", "swiglu", "geglu"]


class MatFormerFeedForward(nn.Module):
    """(b, n, d) -> (b, n, d), every token alone. `granularity`, from 1 to g, says which of the nested layers runs; a
    new one runs the largest.

    Args:
        dim: width d.
        hidden: F, hidden width of the largest.
        form: the plain layer that is nested.
        granularities: g, each with twice the hidden width of the one before.
        bias: whether the matrices have biases.
    """

    def __init__(
        self, *, dim: int, hidden: int, form: Form = "gelu", granularities: int = 4, bias: bool = True
    ) -> None:
        super().__init__()
        if granularities < 1 or hidden < 2 ** (granularities - 1):
            raise FormwrightError(
                "MatFormer needs at least one granularity and a hidden width from which each smaller one leaves half; "
                f"got granularities={granularities} and hidden={hidden}."
            )
        if form not in get_args(Form):
            raise FormwrightError(f"MatFormer nests {', '.join(get_args(Form))}; got {form!r}.")
        self.form, self.dim, self.bias = form, dim, bias
        self.widths = [hidden >> halvings for halvings in reversed(range(granularities))]  # m_1 .. m_g
        self.layer = self.plain(hidden)
        self.granularity = granularities

    def plain(self, hidden: int) -> nn.Module:
        """A new plain layer of this kind."""
        return build("feedforward", self.form, dim=self.dim, hidden=hidden, bias=self.bias)

    def forward(self, x: Float[Tensor, "b n d"], context: Context | None = None) -> Float[Tensor, "b n d"]:
        width = self.widths[self.granularity - 1]
        if width == self.widths[-1]:
            return self.layer(x, context)
        rows, row_bias, columns, bias = self.cut(width)
        hidden = linear(x, rows, row_bias)
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return linear(self.layer.activation(gate) * value, columns, bias)
        return linear(self.layer.activation(hidden), columns, bias)

    @property
    def gated(self) -> bool:
        return getattr(self.layer, "gated", False)

    def cut(
        self, width: int
    ) -> tuple[Float[Tensor, "rows d"], Float[Tensor, " rows"] | None, Float[Tensor, "d {width}"], Tensor | None]:
        """W1[:m] (of a gate too), b1[:m], W2[:, :m] and b2.

        Raises:
            FormwrightError: something stands in place of a matrix, such as a quantised one.
        """
        up, down = self.layer.up, self.layer.down
        for one in (up, down):
            if type(one) is not nn.Linear:
                raise FormwrightError(
                    f"A nested layer is cut from plain matrices, and {type(one).__name__} is none: extract the "
                    "smaller model first (formwright.models.matformer.extract), then change it."
                )
        if self.gated:
            rows, row_bias = self._pairs(up.weight, width), None if up.bias is None else self._pairs(up.bias, width)
        else:
            rows, row_bias = up.weight[:width], None if up.bias is None else up.bias[:width]
        return rows, row_bias, down.weight[:, :width], down.bias

    def _pairs(self, stacked: Float[Tensor, "both ..."], width: int) -> Float[Tensor, "pairs ..."]:
        """The first rows of the gate and those of the value, one under the other."""
        return stacked.unflatten(0, (2, -1))[:, :width].flatten(0, 1)

    @torch.no_grad()
    def extracted(self, granularity: int) -> nn.Module:
        """The nested layer by itself: a plain layer with copies of its weights."""
        width = self.widths[granularity - 1]
        layer = self.plain(width).to(self.layer.up.weight)
        targets = layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias
        for target, source in zip(targets, self.cut(width), strict=True):
            if target is not None:
                target.copy_(source)
                target.requires_grad_(source.requires_grad)
        for mine, its in zip(self.layer.modules(), layer.modules(), strict=True):
            its.__dict__.update({name: mine.__dict__[name] for name in ("stack", "place") if name in mine.__dict__})
        return layer.train(self.training)
