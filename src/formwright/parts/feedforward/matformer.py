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
        self.form, self.bias = form, bias
        self.widths = [hidden >> halvings for halvings in reversed(range(granularities))]  # m_1 .. m_g
        self.layer: nn.Module = build("feedforward", form, dim=dim, hidden=hidden, bias=bias)
        self.gated: bool = getattr(self.layer, "gated", False)
        self.granularity = granularities

    def extra_repr(self) -> str:
        return f"widths={self.widths}, granularity={self.granularity}"

    def forward(self, x: Float[Tensor, "b n d"], context: Context | None = None) -> Float[Tensor, "b n d"]:
        if self.granularity == len(self.widths):
            return self.layer(x, context)
        weights = self.cut(self.granularity)
        hidden = linear(x, weights["up.weight"], weights.get("up.bias"))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.layer.activation(gate) * value
        else:
            hidden = self.layer.activation(hidden)
        return linear(hidden, weights["down.weight"], weights.get("down.bias"))

    def cut(self, granularity: int) -> dict[str, Tensor]:
        """The weights of T_i by the names that a plain layer gives them: views, or copies of the rows of a gate.

        Raises:
            FormwrightError: something stands in place of a matrix, such as a quantised one.
        """
        width, up, down = self.widths[granularity - 1], self.layer.up, self.layer.down
        for one in (up, down):
            if type(one) is not nn.Linear:
                raise FormwrightError(
                    f"A nested layer is cut from plain matrices, and {type(one).__name__} is none: extract the "
                    "smaller model first (formwright.models.matformer.extract), then change it."
                )
        found = {"up.weight": self._rows(up.weight, width), "down.weight": down.weight[:, :width]}
        return found | ({"up.bias": self._rows(up.bias, width), "down.bias": down.bias} if self.bias else {})

    def _rows(self, of: Float[Tensor, "rows ..."], width: int) -> Float[Tensor, "cut ..."]:
        """The first rows; of a gate and its values, one under the other, those of both."""
        return of.unflatten(0, (2, -1))[:, :width].flatten(0, 1) if self.gated else of[:width]
