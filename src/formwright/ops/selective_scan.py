"""Selective scan: a diagonal linear recurrence whose step size, input and output maps depend on the token.

Paper    Gu, Dao: Mamba (2023), arXiv:2312.00752, section 3.

             h_t = exp(delta_t A) h_{t-1} + Bbar_t x_t          y_t = C_t . h_t + D x_t
             Bbar_t = delta_t B_t                               discretization "euler"
             Bbar_t = A^-1 (exp(delta_t A) - 1) B_t             discretization "zoh", the paper's equation 4

Three ways to the same numbers:
    selective_scan_reference  one token after the other.
    selective_scan_chunked    PyTorch operations on a chunk of tokens at a time. A chunk is cut into pieces, scanned
                              side by side and joined by the rule (a1, b1), (a2, b2) -> (a1 a2, a2 b1 + b2). Nothing is
                              divided, so a decay that underflows is a zero and nothing worse. Only the states between
                              chunks are kept; the backward pass recomputes the others.
    selective_scan_native     a C++ kernel for CPUs, float32, "euler".
`selective_scan` takes the fastest that serves.

Axes     b batch, l tokens, c channels, n states. The hidden states (b, l, c, n) are never stored whole by the last two.
"""

import math
from contextlib import nullcontext
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from formwright.ops import native

Discretization = Literal["euler", "zoh"]

PIECE = 8  # tokens that one piece of a chunk scans one after the other, all pieces at once
CHUNK_ELEMENTS = 1 << 19  # hidden-state elements of one chunk, about a processor's second-level cache
NATIVE_CHUNK = 32  # tokens of which the kernel keeps the states in its cache
FORWARD = native.function("formwright_scan_forward", tensors=10, numbers=6)
BACKWARD = native.function("formwright_scan_backward", tensors=16, numbers=7)
GROUPS = native.function("formwright_scan_groups", tensors=0, numbers=3)


def selective_scan_reference(
    x: Float[Tensor, "b l c"],
    delta: Float[Tensor, "b l c"],
    A: Float[Tensor, "c n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " c"] | None = None,
    *,
    state: Float[Tensor, "b c n"] | None = None,
    discretization: Discretization = "euler",
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b c n"]]:
    """The recurrence as it is written, for tests and for reading."""
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        exponent = delta[:, t, :, None] * A
        step = delta[:, t, :, None] if discretization == "euler" else torch.expm1(exponent) / A
        h = exponent.exp() * h + step * B[:, t, None, :] * x[:, t, :, None]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, 1) if outputs else torch.zeros_like(x)
    return (y if D is None else y + D * x), h


def selective_scan(
    x: Float[Tensor, "b l c"],
    delta: Float[Tensor, "b l c"],
    A: Float[Tensor, "c n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " c"] | None = None,
    *,
    state: Float[Tensor, "b c n"] | None = None,
    discretization: Discretization = "euler",
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b c n"]]:
    """The recurrence by the fastest way: one token as written, the C++ kernel on CPUs (float32, "euler"), else chunks.

    Args:
        x: what is written into the state.
        delta: step sizes, positive; 0 leaves the state as it was.
        A: decay rates, negative.
        B: input maps, shared by all channels.
        C: output maps, shared by all channels.
        D: weight of the direct path; none = no direct path.
        state: hidden state before the first token; none = zero.
        discretization: how B is made discrete.

    Returns:
        The outputs, and the hidden state after the last token.

    Raises:
        ValueError: a discretization that is neither of the two.
    """
    _check(discretization)
    if x.shape[1] == 1:
        return selective_scan_reference(x, delta, A, B, C, D, state=state, discretization=discretization)
    if FORWARD is not None and discretization == "euler" and _plain_cpu(x, delta, A, B, C):
        return selective_scan_native(x, delta, A, B, C, D, state=state)
    return selective_scan_chunked(x, delta, A, B, C, D, state=state, discretization=discretization)


def _check(discretization: str) -> None:
    if discretization not in get_args(Discretization):
        raise ValueError(f'discretization is {discretization!r}, but must be "euler" or "zoh".')


def _plain_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def selective_scan_chunked(
    x: Float[Tensor, "b l c"],
    delta: Float[Tensor, "b l c"],
    A: Float[Tensor, "c n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " c"] | None = None,
    *,
    state: Float[Tensor, "b c n"] | None = None,
    discretization: Discretization = "euler",
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b c n"]]:
    """The recurrence in PyTorch on any device, one chunk of tokens at a time.

    Raises:
        ValueError: a discretization that is neither of the two.
    """
    _check(discretization)
    state = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    device = x.device.type
    full_precision = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with full_precision:
        y, final = _Chunked.apply(x, delta, A, B, C, state, discretization == "zoh")
    return (y if D is None else torch.addcmul(y, D, x)), final


class _Chunked(torch.autograd.Function):
    """Inside, the channels are the last axis: rows of 16 states would be too short for vector arithmetic."""

    @staticmethod
    def forward(ctx, x, delta, A, B, C, state, zoh):
        rates, h = A.t().contiguous(), state.transpose(1, 2).contiguous()
        y, starts = torch.empty_like(x, memory_format=torch.contiguous_format), []
        for chunk in _chunks(x, A):
            starts.append(h)
            x_, delta_, B_, C_ = (_padded(values[:, chunk]) for values in (x, delta, B, C))
            _, written = _discrete(x_, delta_, rates, B_, zoh)
            decay = (delta_.unsqueeze(2) * rates).exp_()
            states = _scan(decay, written, h)
            h = states[:, -1].clone()
            y[:, chunk] = (C_.unsqueeze(2) @ states).squeeze(2)[:, : chunk.stop - chunk.start]
        ctx.save_for_backward(x, delta, A, B, C, *starts)
        ctx.zoh = zoh
        return y, h.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        x, delta, A, B, C, *starts = ctx.saved_tensors
        rates, end = A.t().contiguous(), grad_final.transpose(1, 2).contiguous()
        dx, ddelta, dB, dC = (torch.empty_like(values) for values in (x, delta, B, C))
        dA = torch.zeros_like(rates)
        for chunk, start in zip(reversed(_chunks(x, A)), reversed(starts), strict=True):
            x_, delta_, B_, C_, dy = (_padded(values[:, chunk]) for values in (x, delta, B, C, grad_y))
            length = chunk.stop - chunk.start
            source, written = _discrete(x_, delta_, rates, B_, ctx.zoh)
            exponent = delta_.unsqueeze(2) * rates
            decay = exponent.exp()
            states = _scan(decay, written, start)
            dC[:, chunk] = (states @ dy.unsqueeze(3)).squeeze(3)[:, :length]
            g, end = _scan_back(decay, C_.unsqueeze(3) * dy.unsqueeze(2), end)
            through_decay = decay.mul_(g)
            through_decay[:, 0].mul_(start)
            through_decay[:, 1:].mul_(states[:, :-1])
            if ctx.zoh:
                through_decay.addcmul_(g * source.unsqueeze(2), B_.unsqueeze(3) * _phi_slope(exponent))
                g = g * _phi(exponent)
            dB[:, chunk] = (g @ source.unsqueeze(3)).squeeze(3)[:, :length]
            dsource = (B_.unsqueeze(2) @ g).squeeze(2)
            dx[:, chunk] = (dsource * delta_)[:, :length]
            ddelta[:, chunk] = (dsource * x_ + (through_decay * rates).sum(2))[:, :length]
            dA += through_decay.mul_(delta_.unsqueeze(2)).sum((0, 1))
        return dx, ddelta, dA.t(), dB, dC, end.transpose(1, 2), None


def _chunks(x: Tensor, A: Tensor) -> list[slice]:
    """The tokens cut into chunks, each a whole number of pieces but for the last."""
    pieces = min(32, max(1, CHUNK_ELEMENTS // max(1, x.shape[0] * A.numel() * PIECE)))
    return [slice(start, min(start + pieces * PIECE, x.shape[1])) for start in range(0, x.shape[1], pieces * PIECE)]


def _padded(values: Tensor) -> Tensor:
    """Zeros up to a whole number of pieces: a step of size 0 leaves the state as it was."""
    missing = -values.shape[1] % PIECE
    return F.pad(values, (0, 0, 0, missing)) if missing else values


def _discrete(x: Tensor, delta: Tensor, rates: Tensor, B: Tensor, zoh: bool) -> tuple[Tensor, Tensor]:
    """delta x (b, l, c), and what is written into the state (b, l, n, c)."""
    source = delta * x
    written = source.unsqueeze(2) * B.unsqueeze(3)
    return source, written.mul_(_phi(delta.unsqueeze(2) * rates)) if zoh else written


def _phi(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, 1 at 0."""
    return torch.where(z == 0, 1.0, torch.expm1(z) / z)


def _phi_slope(z: Tensor) -> Tensor:
    """The derivative of `_phi`. Near 0 the closed form cancels, the series does not."""
    series = torch.zeros_like(z)
    for k in range(10, -1, -1):
        series = series * z + (k + 1) / math.factorial(k + 2)
    return torch.where(z.abs() < 0.3, series, (z.exp() - _phi(z)) / z)


def _scan(decay: Tensor, written: Tensor, start: Tensor) -> Tensor:
    """All states of a chunk, in the place of `written` (b, l, n, c)."""
    a, h = (values.unflatten(1, (-1, PIECE)) for values in (decay, written))
    ends, through = h[:, :, 0].clone(), a[:, :, 0].clone()  # of every piece, begun from zero; its product of decays
    for t in range(1, PIECE):
        ends.mul_(a[:, :, t]).add_(h[:, :, t])
        through.mul_(a[:, :, t])
    before = [start]  # every piece
    for piece in range(ends.shape[1] - 1):
        before.append(torch.addcmul(ends[:, piece], through[:, piece], before[-1]))
    carry = torch.stack(before, 1)
    for t in range(PIECE):
        carry = h[:, :, t].addcmul_(a[:, :, t], carry)
    return written


def _scan_back(decay: Tensor, direct: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of all states of a chunk, in the place of `direct`, and of the state before; `end` comes from later."""
    a, g = (values.unflatten(1, (-1, PIECE)) for values in (decay, direct))
    ends, through = g[:, :, -1] * a[:, :, -1], a[:, :, -1].clone()
    for t in range(PIECE - 2, -1, -1):
        ends.add_(g[:, :, t]).mul_(a[:, :, t])
        through.mul_(a[:, :, t])
    later = [end]  # from behind every piece, the last piece first
    for piece in range(ends.shape[1] - 1, 0, -1):
        later.append(torch.addcmul(ends[:, piece], through[:, piece], later[-1]))
    carry = torch.stack(later[::-1], 1)
    for t in range(PIECE - 1, -1, -1):
        carry = g[:, :, t].add_(carry) * a[:, :, t]
    return direct, carry[:, 0].clone()


def selective_scan_native(
    x: Float[Tensor, "b l c"],
    delta: Float[Tensor, "b l c"],
    A: Float[Tensor, "c n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " c"] | None = None,
    *,
    state: Float[Tensor, "b c n"] | None = None,
) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b c n"]]:
    """The recurrence by the C++ kernel: CPU, float32, "euler". Needs the compiled kernels."""
    D = x.new_zeros(x.shape[2]) if D is None else D
    state = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    y, final, _ = _native_forward(x, delta, A, B, C, D, state)
    return y, final


def _pointers(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _ready(*tensors: Tensor) -> list[Tensor]:
    """Contiguous copies where needed. The caller names them, so that they live through the call."""
    if not _plain_cpu(*tensors):
        raise ValueError(
            "The native selective scan takes float32 tensors on the CPU: use selective_scan, which chooses."
        )
    return [tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("formwright::selective_scan", mutates_args=(), device_types="cpu")
def _native_forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (b, l, c), the last state (b, c, n) and the states at the chunks' borders (b, chunks + 1, n, c)."""
    inputs = _ready(x, delta, A, B, C, D, state)
    (batch, length, channels), states = x.shape, A.shape[1]
    outputs = x.new_empty(x.shape), x.new_empty(state.shape), x.new_empty(_borders_shape(x, A))
    sizes = batch, length, channels, states, NATIVE_CHUNK, torch.get_num_threads()
    if FORWARD(*_pointers(*inputs, *outputs), *sizes):
        raise MemoryError("The selective scan found no memory for its buffers.")
    return outputs


@_native_forward.register_fake
def _(x, delta, A, B, C, D, state):  # noqa: ARG001
    return x.new_empty(x.shape), x.new_empty(state.shape), x.new_empty(_borders_shape(x, A))


@register_flop_formula(torch.ops.formwright.selective_scan)
def _flops(x, delta, A, *_, **__):  # noqa: ARG001
    """9 a token, channel and state, as the paper's authors count: the maps, the decay, the sum and what is read."""
    batch, length, channels = x
    return 9 * batch * length * channels * A[1]


def _borders_shape(x: Tensor, A: Tensor) -> tuple[int | torch.SymInt, ...]:
    return x.shape[0], (x.shape[1] + NATIVE_CHUNK - 1) // NATIVE_CHUNK + 1, A.shape[1], A.shape[0]


@torch.library.custom_op("formwright::selective_scan_backward", mutates_args=(), device_types="cpu")
def _native_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    borders: Tensor,
    grad_y: Tensor,
    grad_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C, D and the first state."""
    inputs = _ready(x, delta, A, B, C, D, borders, grad_y, grad_final)
    (batch, length, channels), states, threads = x.shape, A.shape[1], torch.get_num_threads()
    groups = GROUPS(batch, channels, threads)
    dx, ddelta, dstate = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(batch, channels, states)
    dB, dC = (x.new_empty(batch, groups, length, states) for _ in range(2))
    dA, dD = x.new_empty(batch, channels, states), x.new_empty(batch, channels)
    sizes = batch, length, channels, states, NATIVE_CHUNK, groups, threads
    if BACKWARD(*_pointers(*inputs, dx, ddelta, dA, dB, dC, dD, dstate), *sizes):
        raise MemoryError("The selective scan found no memory for its buffers.")
    return dx, ddelta, dA.sum(0), dB.sum(1), dC.sum(1), dD.sum(0), dstate


@_native_backward.register_fake
def _(x, delta, A, B, C, D, borders, grad_y, grad_final):  # noqa: ARG001
    like = [x.new_empty(values.shape) for values in (x, delta, A, B, C, D)]
    return *like, x.new_empty(x.shape[0], *A.shape)


def _save(ctx, inputs, output):
    x, delta, A, B, C, D, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, delta, A, B, C, D, output[2])


def _backward(ctx, grad_y, grad_final, _):
    x, delta, A, B, C, D, borders = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_final = x.new_zeros(x.shape[0], *A.shape) if grad_final is None else grad_final
    return _native_backward(x, delta, A, B, C, D, borders, grad_y, grad_final)


_native_forward.register_autograd(_backward, setup_context=_save)
