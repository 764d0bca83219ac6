"""Sandwich sharing: the layers between the first and the last use one set of matrices.

Paper    Reid, Marrese-Taylor, Matsuo: Subformer: Exploring Weight Sharing for Parameter Efficiency in Generative
         Transformers (Findings of EMNLP 2021), arXiv:2101.00234.
Idea     The first layer reads embeddings and the last one writes what is predicted; the layers between do much the same
         work and can share it. Every layer keeps norms of its own.

             layer 1                 its own
             layers 2 .. L-1         one set of matrices and biases, L-2 sets of norms
             layer L                 its own

         The shared layers may be wider, d_s: since they are paid for once, width is cheap there.

             x <- norm(dropout(W_in x))      before layer 2, d -> d_s
             x <- norm(dropout(W_out x))     before layer L, d_s -> d
             cross-attention at width d      x + norm(U cross(norm(D x)))    D: d_s -> d,  U: d -> d_s

         `all` shares every layer (ALBERT, Universal Transformer) and `all-but-last` all except the last: the paper's
         comparisons, both without width.
Differs  What stays a layer's own is every module whose parameters are all vectors: norms and learned scales. In the
         release's code that is the layer norms. What a position keeps in a matrix is shared as well. A later version of
         the release also multiplies by learned vectors of each layer, which the paper does not have.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.contracts import Context, Mixer, NormFactory
from formwright.errors import FormwrightError
from formwright.ops.linear import project

ADAPTER_DROPOUT = 0.05


class Sharing:
    """Every layer uses the matrices of one of them, its owner."""

    width: int | None = None  # of the shared layers; none = the model's

    def owners(self, layers: int) -> tuple[int, ...]:
        """For each layer the first one with its matrices."""
        raise NotImplementedError

    def wide(self, layer: int, layers: int) -> bool:
        """Whether this layer has the width of the shared ones."""
        return self.width is not None and 0 < layer < layers - 1


class Sandwich(Sharing):
    """All layers but the first and the last share.

    Args:
        dim: width d of the model.
        width: d_s, that of the shared layers; none = d.
        heads: of the shared layers when they are wider; none = as the paper chooses them, see `paper_heads`.
        hidden: feed-forward width of the shared layers when they are wider; none = the model's.
    """

    def __init__(
        self, *, dim: int, width: int | None = None, heads: int | None = None, hidden: int | None = None
    ) -> None:
        if width is None and (heads is not None or hidden is not None):
            raise FormwrightError("heads and hidden are those of wider shared layers: give width, too, or leave both.")
        for name, value in (("width", width), ("heads", heads), ("hidden", hidden)):
            if value is not None and value < 1:
                raise FormwrightError(f"{name} is {value}, but it must be at least 1.")
        self.width = None if width == dim else width
        self.hidden = hidden
        self.heads = None if self.width is None else heads or paper_heads(self.width)
        if self.width is not None and self.width % self.heads:
            raise FormwrightError(f"A width of {self.width} does not split into {self.heads} heads; choose others.")

    def owners(self, layers: int) -> tuple[int, ...]:
        if layers < 3:
            raise FormwrightError(
                f"A sandwich needs a first layer, a last one and layers between, got {layers}: 3 or more layers, 4 to "
                "save any weights."
            )
        return (0, *[1] * (layers - 2), layers - 1)


class AllShared(Sharing):
    """Every layer shares."""

    def owners(self, layers: int) -> tuple[int, ...]:
        return (0,) * layers


class AllButLast(Sharing):
    """Every layer but the last shares."""

    def owners(self, layers: int) -> tuple[int, ...]:
        return (*[0] * (layers - 1), layers - 1)


def paper_heads(width: int) -> int:
    """The paper's heads: of size 64 where that divides the width (128 beyond a width of 1024; 80 at 640), else of a
    tenth of it. Below 64, where the paper has no models, one head.

    Raises:
        FormwrightError: neither divides it.
    """
    size = 80 if width == 640 else 128 if width > 1024 and width % 128 == 0 else 64
    size = width if width < 64 else size if width % size == 0 else width // 10
    if width % size:
        raise FormwrightError(f"The paper has no heads for a width of {width}: say how many with heads=.")
    return width // size


def shared_names(layers: nn.ModuleList, owners: Sequence[int]) -> dict[str, str]:
    """Which parameter is whose: {"2.mixer.out.weight": "1.mixer.out.weight", ...}, those that follow an owner.

    Raises:
        FormwrightError: a layer's matrices have other names or shapes than its owner's.
    """
    found: dict[str, str] = {}
    for layer, owner in enumerate(owners):
        if layer == owner:
            continue
        mine, theirs = _matrices(layers[layer]), _matrices(layers[owner])
        if mine != theirs:
            odd = next(name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name))
            raise FormwrightError(
                f"Layers {owner} and {layer} cannot share: {odd} is {_shown(theirs.get(odd))} in one and "
                f"{_shown(mine.get(odd))} in the other. Give all layers that share the same parts and sizes."
            )
        found |= {f"{layer}.{name}": f"{owner}.{name}" for name in mine}
    return found


def _matrices(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters of the modules that hold a matrix, with their shapes."""
    return {
        f"{path}.{name}" if path else name: tuple(parameter.shape)
        for path, module in layer.named_modules()
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        for name, parameter in module.named_parameters(recurse=False)
    }


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))


def tie(layers: nn.ModuleList, names: dict[str, str]) -> None:
    """Put the owner's parameter where a follower's was."""
    for target, source in names.items():
        path, _, name = target.rpartition(".")
        layers.get_submodule(path)._parameters[name] = layers.get_parameter(source)


@torch.no_grad()
def average(layers: nn.ModuleList, names: dict[str, str]) -> None:
    """Give every owner the mean over itself and those that follow it, in double precision."""
    groups: dict[str, list[Tensor]] = {}
    for target, source in names.items():
        groups.setdefault(source, [layers.get_parameter(source)]).append(layers.get_parameter(target))
    for source, members in groups.items():
        mean = torch.stack([one.double() for one in members]).mean(0)
        layers.get_parameter(source).copy_(mean)


class Adapter(nn.Module):
    """norm(dropout(W x + b)), from one width to another.

    Args:
        dim: width of x.
        width: of what comes out.
        norm: makes a norm of a given width.
        dropout: probability.
    """

    def __init__(self, *, dim: int, width: int, norm: NormFactory, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(dim, width), norm(width), dropout

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        x = project(self.linear, x)
        return self.norm(F.dropout(x, self.dropout, self.training) if self.dropout else x)


class Narrowed(nn.Module):
    """A mixer at the model's width inside a wider layer: cross-attention reads the memory at the memory's width.

    Args:
        mixer: of width `dim`.
        dim: the model's width d.
        width: the layer's, d_s.
        norm: makes a norm of a given width.
    """

    def __init__(self, mixer: Mixer, *, dim: int, width: int, norm: NormFactory) -> None:
        super().__init__()
        self.down = Adapter(dim=width, width=dim, norm=norm)
        self.mixer, self.cache_kind, self.hooks = mixer, mixer.cache_kind, mixer.hooks
        self.up = Adapter(dim=dim, width=width, norm=norm)

    def forward(self, x: Float[Tensor, "b n e"], context: Context) -> Float[Tensor, "b n e"]:
        return self.up(self.mixer(self.down(x), context))
