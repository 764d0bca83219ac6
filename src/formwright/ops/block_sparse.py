"""An int8 matrix product that skips what is zero: the weight holds blocks of four outputs of one input, most of them
absent. See native/block_sparse.cpp.

    sums[t, 4g + i] = sum over the blocks b of group g of  x[t, column_b] value_b[i]          in int32

Inputs are unsigned bytes with a zero point z, weights signed ones: the real product is  (sums - z sum_k W) s_x s_w.
`product_reference` is the plain twin; the native one keeps the tokens in panels of 64, feature by feature, so that one
instruction multiplies four columns by sixteen tokens, and does bias, activation, requantisation or residual and
LayerNorm while the sums are at hand.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int8, Int16, Int32, UInt8
from torch import Tensor

from formwright.ops import native
from formwright.ops.integer import int_matmul

BLOCK = 4  # outputs of one input that are zero together
TILE = 64  # tokens of a panel
WIDEST = 1 << 16  # inputs that a column's 16 bits tell apart

Activation = Literal["relu", "gelu", "gelu-tanh", "none"]
KINDS: tuple[Activation, ...] = ("relu", "gelu", "gelu-tanh", "none")


# The weight


class Packed(NamedTuple):
    """The blocks of a weight, group of four rows after group of four rows, columns in order.

    Args:
        starts: of every group its first block, and their number at the end.
        columns: of every block, as 16 unsigned bits.
        values: of every four blocks of a group the first row's four values, then the second's ...; what is left over at
            the end of a group lies in the same way, three, two or one to a row.
    """

    starts: Int32[Tensor, " groups_and_one"]
    columns: Int16[Tensor, " n"]
    values: Int8[Tensor, " four_n"]


def blocks(weight: Tensor) -> Bool[Tensor, "groups inputs"]:
    """Which blocks of a weight (outputs, inputs) hold anything."""
    return (weight != 0).unflatten(0, (-1, BLOCK)).any(1)


def pack(weight: Int8[Tensor, "outputs inputs"]) -> Packed:
    """Only the blocks that hold anything."""
    held = blocks(weight)
    groups, columns = held.nonzero().unbind(1)
    starts = torch.zeros(len(held) + 1, dtype=torch.int32, device=weight.device)
    starts[1:] = held.sum(1).cumsum(0)
    values = torch.empty(BLOCK * len(columns), dtype=torch.int8, device=weight.device)
    values[_places(starts)] = weight.unflatten(0, (-1, BLOCK))[groups, :, columns]
    return Packed(starts, columns.to(torch.int16), values)


def unpack(packed: Packed, inputs: int) -> Int8[Tensor, "outputs {inputs}"]:
    """The weight again."""
    groups = len(packed.starts) - 1
    weight = torch.zeros(groups, BLOCK, inputs, dtype=torch.int8, device=packed.values.device)
    group = torch.arange(groups, device=packed.starts.device).repeat_interleave(packed.starts.diff())
    weight[group, :, packed.columns.long() % WIDEST] = packed.values[_places(packed.starts)]
    return weight.flatten(0, 1)


def _places(starts: Int32[Tensor, " g"]) -> Tensor:
    """Of every block the places of its four values, (n, 4)."""
    counts = starts.diff().long()
    first = starts[:-1].long().repeat_interleave(counts)
    number = torch.arange(int(starts[-1]), device=starts.device) - first
    run = (counts.repeat_interleave(counts) - number // BLOCK * BLOCK).clamp(max=BLOCK)
    rows = torch.arange(BLOCK, device=starts.device)
    return (BLOCK * (first + number // BLOCK * BLOCK) + number % BLOCK)[:, None] + rows * run[:, None]


# The product in plain operations


def quantise(x: Float[Tensor, "*n"], scale: float, zero: int) -> UInt8[Tensor, "*n"]:
    """To the nearest of 256 levels, halves to even; `zero` stands for 0."""
    return ((x.float() * (1.0 / scale)).round() + zero).clamp(0, 255).to(torch.uint8)


def product_reference(x: UInt8[Tensor, "t k"], packed: Packed) -> Int32[Tensor, "t m"]:
    """Group by group, gathering the columns that hold a block; zero point not yet taken off."""
    parts = []
    weight = packed.values[_places(packed.starts)].int()
    for start, end in zip(packed.starts[:-1].tolist(), packed.starts[1:].tolist(), strict=True):
        columns = packed.columns[start:end].long() % WIDEST
        parts.append(x[:, columns].int() @ weight[start:end])
    return torch.cat(parts, 1)


def dense_product(x: UInt8[Tensor, "t k"], weight: Int8[Tensor, "m k"]) -> Int32[Tensor, "t m"]:
    """The same numbers from a dense weight, where there is no kernel."""
    shifted = (x.short() - 128).to(torch.int8)
    return int_matmul(shifted, weight.T.contiguous()) + 128 * weight.sum(1, dtype=torch.int32)


# The product in panels


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A packed weight ready for the kernel, on the CPU.

    Args:
        packed: the blocks.
        factors: of every row, the scale of the input times that of the weight.
        offsets: of every row, the zero point times its sum.
        bias: zeros where there is none.
        inputs: columns.
    """

    packed: Packed
    factors: Float[Tensor, " m"]
    offsets: Int32[Tensor, " m"]
    bias: Float[Tensor, " m"]
    inputs: int

    @property
    def outputs(self) -> int:
        return len(self.factors)


class Panels(NamedTuple):
    """Activations of `tokens` tokens, (tiles, features, 64); the last tile may be filled up."""

    values: Tensor
    tokens: int

    @property
    def width(self) -> int:
        return self.values.shape[1]


@functools.cache
def kernel() -> Callable[..., int] | None:
    """The native call; none where the kernels are not built."""
    return native.function("formwright_block_sparse", tensors=14, numbers=5)


@functools.cache
def _converters() -> tuple[Callable[..., int], Callable[..., int]]:
    to = native.function("formwright_to_panels", tensors=4, numbers=3)
    back = native.function("formwright_from_panels", tensors=2, numbers=3)
    assert to is not None
    assert back is not None
    return to, back


def has_vnni() -> bool:
    """Whether the kernel runs on the processor's byte dot products."""
    found = native.function("formwright_has_vnni", tensors=0, numbers=0)
    return found is not None and bool(found())


def to_panels(x: Float[Tensor, "t k"], scale: float, zero: int, *, keep: bool = False) -> tuple[Panels, Panels | None]:
    """Rows as panels of bytes, and with `keep` as panels of floats too."""
    tokens, width = x.shape
    shape = (-(-tokens // TILE), width, TILE)
    made, kept = torch.empty(shape, dtype=torch.uint8), torch.empty(shape) if keep else None
    x = x.contiguous()
    constants = torch.tensor([1.0 / scale, zero], dtype=torch.float32)
    _converters()[0](
        x.data_ptr(),
        constants.data_ptr(),
        made.data_ptr(),
        None if kept is None else kept.data_ptr(),
        tokens,
        width,
        torch.get_num_threads(),
    )
    return Panels(made, tokens), None if kept is None else Panels(kept, tokens)


def from_panels(panels: Panels) -> Float[Tensor, "t k"]:
    """Panels of floats as rows."""
    rows = torch.empty(panels.tokens, panels.width)
    _converters()[1](panels.values.data_ptr(), rows.data_ptr(), panels.tokens, panels.width, torch.get_num_threads())
    return rows


def integers(x: Panels, matrix: Matrix) -> Int32[Tensor, "t m"]:
    """The product less its offsets, in int32."""
    out = torch.empty(x.tokens, matrix.outputs, dtype=torch.int32)
    _run(x, matrix, whole=out)
    return out


def floats(
    x: Panels, matrix: Matrix, activation: Activation = "none", *, out: Float[Tensor, "t m"] | None = None
) -> Float[Tensor, "t m"]:
    """The product in floats, bias added and activated; written into `out` where there is one."""
    out = torch.empty(x.tokens, matrix.outputs) if out is None else out
    _run(x, matrix, out=out, activation=activation)
    return out


def requantised(
    x: Panels, matrix: Matrix, activation: Activation, scale: float, zero: int, *, out: Panels | None = None
) -> Panels:
    """The same as bytes of this scale and zero point, in panels: what the next product reads."""
    made = torch.empty(len(x.values), matrix.outputs, TILE, dtype=torch.uint8) if out is None else out.values
    _run(x, matrix, bytes=made, activation=activation, constants=(1.0 / scale, float(zero), 0.0))
    return Panels(made, x.tokens)


def add_and_normalise(
    x: Panels, matrix: Matrix, residual: Panels, norm: torch.nn.LayerNorm, following: tuple[float, int] | None
) -> Panels | None:
    """residual <- LayerNorm(residual + product), in place.

    Args:
        residual: panels of floats, overwritten.
        following: scale and zero point of the product that reads the result; its bytes are returned.
    """
    made = None if following is None else torch.empty(residual.values.shape, dtype=torch.uint8)
    scale, zero = following or (1.0, 0)
    constants = (1.0 / scale, float(zero), norm.eps)
    _run(x, matrix, bytes=made, residual=residual.values, gain=norm.weight, shift=norm.bias, constants=constants)
    return None if made is None else Panels(made, x.tokens)


def _run(
    x: Panels,
    matrix: Matrix,
    *,
    activation: Activation = "none",
    constants: tuple[float, float, float] = (1.0, 0.0, 0.0),
    **outputs: Tensor | None,
) -> None:
    run = kernel()
    assert run is not None
    assert x.width == matrix.inputs
    last = torch.tensor(constants, dtype=torch.float32)
    weight = (*matrix.packed, matrix.factors, matrix.offsets, matrix.bias)
    others = (outputs.get(name) for name in ("whole", "out", "bytes", "residual", "gain", "shift"))
    failed = run(
        *(None if one is None else one.data_ptr() for one in (x.values, *weight, *others, last)),
        x.tokens,
        matrix.outputs,
        matrix.inputs,
        KINDS.index(activation),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("There was no memory for a block-sparse product.")
