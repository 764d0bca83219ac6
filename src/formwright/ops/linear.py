"""Linear layers whose products go to the quicker of PyTorch's two libraries.

On processors of AMD with AVX-512 PyTorch's usual BLAS, MKL, does not use it: float32 products through oneDNN, which
PyTorch carries too, take less than half the time. Elsewhere, for small products, under compilation and autocast and for
other dtypes this is `torch.nn.functional.linear`.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 2**21  # multiplications from which the call of oneDNN costs less than it saves


@functools.cache
def onednn_is_quicker() -> bool:
    """In float32, on this processor."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    described = platform.processor()
    if platform.system() == "Linux":
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in described and torch.cpu._is_avx512_supported()


def linear(
    x: Float[Tensor, "*n i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """x W^T + b, with gradients."""
    if not _served(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return _Linear.apply(rows, weight, bias).view(*x.shape[:-1], len(weight))


def project(layer: nn.Module, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
    """What the layer gives, through `linear` if it is a plain nn.Linear that nobody watches."""
    if type(layer) is not nn.Linear or _is_watched(layer):
        return layer(x)
    return linear(x, layer.weight, layer.bias)


def _is_watched(layer: nn.Module) -> bool:
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks) or bool(nn.modules.module._has_any_global_hook())


def _served(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: a size compared there would be a size fixed there
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= LEAST
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0  # who counts FLOPs does not know oneDNN's product
        and onednn_is_quicker()
    )


def _product(x: Float[Tensor, "t i"], weight: Float[Tensor, "o i"], bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (y,) = (gradient.contiguous() for gradient in gradients)
        to_x = _product(y, weight.T) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:  # of the two factors oneDNN copies the first: let it be the narrower
            to_weight = _product(x.T, y.T).T if x.shape[1] < y.shape[1] else _product(y.T, x.T)
        return to_x, to_weight, y.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
