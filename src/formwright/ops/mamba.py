"""What stands around Mamba's selective scan: its causal convolution, and one decoding step in a single call.

Paper    Gu, Dao: Mamba (2023), arXiv:2312.00752, section 3.4.

             y_t = SiLU(bias + sum_k w_k x_{t - taps + 1 + k})       each channel by itself, x before the first token 0

The C++ kernel reads x where the projection left it, (b, l, c) with any stride between tokens; PyTorch's convolution
wants the channels before the length and copies there and back.

Axes     b batch, l tokens, c channels, k taps, n states, r rank of the step sizes.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from formwright.ops import native

FORWARD = native.function("formwright_conv_forward", tensors=4, numbers=8)
BACKWARD = native.function("formwright_conv_backward", tensors=6, numbers=8)
PARTS = native.function("formwright_conv_parts", tensors=0, numbers=3)
STEP = native.function("formwright_mamba_step", tensors=14, numbers=6)


def causal_conv_silu_reference(
    x: Float[Tensor, "b l c"], weight: Float[Tensor, "c 1 k"], bias: Float[Tensor, " c"]
) -> Float[Tensor, "b l c"]:
    """The convolution in PyTorch, on any device and type."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[2] - 1, 0))
    return F.silu(F.conv1d(padded, weight, bias, groups=x.shape[2])).transpose(1, 2)


def causal_conv_silu(
    x: Float[Tensor, "b l c"], weight: Float[Tensor, "c 1 k"], bias: Float[Tensor, " c"]
) -> Float[Tensor, "b l c"]:
    """A causal convolution of every channel by itself, then SiLU: the C++ kernel on CPUs in float32, else PyTorch."""
    if FORWARD is not None and _plain(x, weight, bias) and not torch.is_autocast_enabled("cpu"):
        return _forward(x, weight, bias)
    return causal_conv_silu_reference(x, weight, bias)


def _plain(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def _ready(x: Tensor, *others: Tensor) -> list[Tensor]:
    """x with its channels side by side, the others contiguous. The caller names them, so that they outlive the call."""
    if not _plain(x, *others):
        raise ValueError(
            "The native convolution takes float32 tensors on the CPU: use causal_conv_silu, which chooses."
        )
    return [x if x.stride(2) == 1 else x.contiguous(), *(other.contiguous() for other in others)]


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    threads = torch.get_num_threads()
    return *x.shape, weight.shape[2], x.stride(0), x.stride(1), PARTS(x.shape[0], x.shape[1], threads), threads


@torch.library.custom_op("formwright::causal_conv_silu", mutates_args=(), device_types="cpu")
def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x, weight, bias = _ready(x, weight, bias)
    y = x.new_empty(x.shape)
    if FORWARD(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), y.data_ptr(), *_sizes(x, weight)):
        raise MemoryError("The causal convolution found no memory for its buffers.")
    return y


@_forward.register_fake
def _(x, weight, bias):  # noqa: ARG001
    return x.new_empty(x.shape)


@torch.library.custom_op("formwright::causal_conv_silu_backward", mutates_args=(), device_types="cpu")
def _backward(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, grad = _ready(x, weight, bias, grad)
    sizes, taps, dx = _sizes(x, weight), weight.shape[2], x.new_empty(x.shape)
    sums = x.new_empty(x.shape[0] * sizes[-2], taps + 1, x.shape[2])
    if BACKWARD(*(t.data_ptr() for t in (x, weight, bias, grad, dx, sums)), *sizes):
        raise MemoryError("The causal convolution found no memory for its buffers.")
    total = sums.sum(0)
    return dx, total[:taps].t().contiguous().unsqueeze(1), total[taps].clone()


@_backward.register_fake
def _(x, weight, bias, grad):  # noqa: ARG001
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


_forward.register_autograd(
    lambda ctx, grad: _backward(*ctx.saved_tensors, grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),  # noqa: ARG005
)


def can_step(x: Tensor, *weights: Tensor) -> bool:
    """Whether `mamba_step` serves: one token, float32 on the CPU, no gradient, nothing traced, not under autocast."""
    return (
        STEP is not None
        and x.shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None  # one that counts or traces operations would miss this one
        and _plain(x, *weights)
        and not torch.is_autocast_enabled("cpu")
    )


def mamba_step(
    xz: Float[Tensor, "b 1 two_c"],
    window: Float[Tensor, "b kept c"],
    state: Float[Tensor, "b c n"],
    *,
    conv_weight: Float[Tensor, "c 1 k"],
    conv_bias: Float[Tensor, " c"],
    x_weight: Float[Tensor, "maps c"],
    dt_weight: Float[Tensor, "c r"],
    dt_bias: Float[Tensor, " c"],
    A_log: Float[Tensor, "c n"],
    D: Float[Tensor, " c"],
    real: Bool[Tensor, "b 1"] | None = None,
) -> tuple[Float[Tensor, "b 1 c"], Float[Tensor, "b kept c"], Float[Tensor, "b c n"]]:
    """One token between Mamba's two projections ("euler"): the gated output, the next window and the next state.

    The C++ kernel; ask `can_step` first. `window` holds the last taps - 1 inputs of the convolution. A token that is
    not `real` writes nothing into the state.
    """
    batch, channels, states = state.shape
    y = xz.new_empty(batch, 1, channels)
    next_window, next_state = torch.empty_like(window), torch.empty_like(state)
    weights = conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D
    ready = [tensor.contiguous() for tensor in (xz, window, *weights, state)]
    real = None if real is None else real.contiguous()
    outputs = [tensor.data_ptr() for tensor in (y, next_window, next_state)]
    pointers = [*(tensor.data_ptr() for tensor in ready), None if real is None else real.data_ptr(), *outputs]
    rank, taps = dt_weight.shape[1], conv_weight.shape[2]
    if STEP(*pointers, batch, channels, states, rank, taps, torch.get_num_threads()):
        raise MemoryError("A decoding step of Mamba found no memory for its buffers.")
    return y, next_window, next_state
