"""SAFE: narrow token embeddings, lifted to the model's width by a layer of self-attention.

Paper    Reid, Marrese-Taylor, Matsuo: Subformer (Findings of EMNLP 2021), arXiv:2101.00234. The linear lift is
         ALBERT's: Lan et al. (ICLR 2020), arXiv:1909.11942.
Idea     A vocabulary of V tokens costs V r numbers and not V d. Attention at width r lets a token take from its
         neighbours what its own r numbers do not say.

             z = s E[token] + position                 at width r;  s = sqrt(r) in an encoder, sqrt(d) in a decoder
             z <- norm(z + attention(z))
             x = norm(W_2 relu(W_1 z))                 r -> r -> d, no residual across the change of width

             logits = E (A h + a)                      A: d -> r, in the head

         `factorised` is  x = W z.  An encoder-decoder has one E and a lift on each side; a decoder's is causal, and
         keeps its keys when decoding, as a layer does.
Differs  Pre-norm models of the release put the norms in front here, too; ours stand behind as in the paper.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, NormFactory
from formwright.errors import FormwrightError
from formwright.ops.linear import project
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.sharing.subformer import paper_heads

MakePosition = Callable[[int, int], nn.Module | None]  # heads, their width -> a position on the scores


class Factorised(nn.Module):
    """(b, n, r) -> (b, n, d) by one matrix, every token alone.

    Args:
        dim: width d of the model.
        rank: width r of the embeddings.
    """

    scale = 1.0
    mixer: None = None

    def __init__(self, *, dim: int, rank: int) -> None:
        super().__init__()
        self.lift = nn.Linear(_checked(rank, dim), dim)

    def forward(self, z: Float[Tensor, "b n r"], _context: Context) -> Float[Tensor, "b n d"]:
        return project(self.lift, z)


class SelfAttentive(nn.Module):
    """(b, n, r) -> (b, n, d) by attention and a feed-forward layer. `scale` is what the embeddings are multiplied by.

    Args:
        dim: width d of the model.
        rank: width r of the embeddings.
        causal: whether this is a decoder's.
        norm: makes a norm of a given width.
        make_position: makes the position on this attention's scores, for models that have one.
        dropout: of what the two sub-layers give.
        heads: of the attention; none = as the paper chooses them, of size 64 where that divides r, else r/10;
            one below 64.
    """

    def __init__(
        self,
        *,
        dim: int,
        rank: int,
        causal: bool,
        norm: NormFactory,
        make_position: MakePosition = lambda _heads, _head_dim: None,
        dropout: float = 0.0,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        heads = paper_heads(_checked(rank, dim)) if heads is None else heads
        if heads < 1 or rank % heads:
            raise FormwrightError(f"A rank of {rank} does not split into {heads} heads; choose another number.")
        self.scale = float(dim if causal else rank) ** 0.5
        self.dropout = dropout
        self.mixer = MultiHeadAttention(
            dim=rank,
            heads=heads,
            attention=SoftmaxAttention(),
            position=make_position(heads, rank // heads),
        )
        self.mixer_norm = norm(rank)
        self.up, self.down, self.feedforward_norm = nn.Linear(rank, rank), nn.Linear(rank, dim), norm(dim)

    def forward(self, z: Float[Tensor, "b n r"], context: Context) -> Float[Tensor, "b n d"]:
        z = self.mixer_norm(z + self._dropped(self.mixer(z, context)))
        return self.feedforward_norm(self._dropped(project(self.down, F.relu(project(self.up, z)))))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _checked(rank: int, dim: int) -> int:
    if not 1 <= rank < dim:
        raise FormwrightError(f"rank is {rank}, but it must be from 1 to below the model's width of {dim}.")
    return rank
