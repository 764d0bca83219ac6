"""Work and memory grow with the number of tokens as the card declares.

Work is the FLOPs torch's FlopCounterMode counts plus one for every number written, so that element-by-element work
counts too. Memory is the largest number of bytes alive at once, counted storage by storage, not the process's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from formwright.conformance.check import check, ensure
from formwright.conformance.subject import Subject, tokens
from formwright.contracts import Context

SHORT, LONG = 256, 1024
ALLOWED = 0.2  # at 1,024 tokens a linear share or a logarithm still bends the exponent by a tenth or two

aten = torch.ops.aten


def _flash(q: Any, k: Any, v: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _flash_backward(grad: Any, q: Any, k: Any, v: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


FUSED_ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


class Meter(TorchDispatchMode):
    """Numbers written, and the peak of the bytes alive among what was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.written = self.live = self.peak = 0
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}

    def ignore(self, *tensors: Tensor) -> None:
        """These were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = (StorageWeakRef(storage), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for key in [key for key, (reference, _) in self.known.items() if reference.expired()]:
            self.live -= self.known.pop(key)[1]
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            fresh = storage._cdata not in self.known
            if fresh:
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.live += storage.nbytes()
            if fresh or func._schema.is_mutable:
                self.written += tensor.numel()
        self.peak = max(self.peak, self.live)
        return out


def cost(run: Callable[[], Tensor], *before: Tensor) -> tuple[int, int]:
    """Work and peak bytes of a forward and backward pass; `before` are tensors that exist anyway."""
    counter, meter = FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU), Meter()
    meter.ignore(*before)
    with counter, meter:
        run().sum().backward()
    return counter.get_total_flops() + meter.written, meter.peak


def exponents(subject: Subject, causal: bool) -> tuple[float, float]:
    """Growth exponents of work and memory, by the slope between 256 and 1,024 tokens."""
    costs = []
    for n in (SHORT, LONG):
        stand, x = subject.stand(causal=causal, length=LONG).train(), tokens(n, batch=1)
        context = Context.of(x, causal=causal)
        costs.append(
            cost(lambda stand=stand, x=x, context=context: stand(x, context), x, *stand.parameters(), *stand.buffers())
        )
    (work, memory), (more_work, more_memory) = costs
    scale = math.log(LONG / SHORT)
    return math.log(more_work / work) / scale, math.log(more_memory / memory) / scale


@check(slots=("mixer", "attention", "feedforward", "norm"))
def cost_grows_as_declared(subject: Subject) -> None:
    """FLOPs and peak memory of a training step grow with the tokens by the card's exponents; token by token parts are
    linear.
    """
    alone = subject.slot in ("feedforward", "norm")
    time, memory = (1.0, 1.0) if alone else (subject.time, subject.memory)
    ensure(
        time is not None and memory is not None,
        f"{subject} declares no growth exponents: its card needs time and memory.",
    )
    for causal in subject.causals or (False,):
        measured = exponents(subject, causal)
        for what, found, declared in zip(("work", "memory"), measured, (time, memory), strict=True):
            ensure(
                abs(found - declared) <= ALLOWED,
                f"{subject}: {what} grows as N^{found:.2f}, but N^{declared:g} is declared (causal={causal}, "
                f"{SHORT} to {LONG} tokens).",
            )
