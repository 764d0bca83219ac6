"""What a model costs: parameters, FLOPs, latency, peak memory, bytes on disk.

FLOPs    torch's FlopCounterMode, 2 a multiply-add, on one forward pass. It sees matrix products, convolutions and
         attention, not what happens inside an FFT or a custom op without a formula of its own
         (torch.utils.flop_counter.register_flop_formula): a part that uses those has a method
         `extra_flops(context) -> int`, for one sequence, and its number is added for every sequence it reads.
Memory   Live bytes of every tensor storage, followed op by op: exact, free of noise, the same on every machine.
         Scratch memory inside one op is not seen. On CUDA the allocator's own peak is taken.
Latency  Interleaved: every round times each model once, so that a busy machine slows all alike; medians over the
         rounds, and the median over the rounds of the ratio to the first model.
"""

import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from formwright.contracts import Context

Batch = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one model costs on one batch; bytes are bytes, 2 FLOPs a multiply-add."""

    params: int
    trainable: int
    flops: int
    forward_memory: int
    step_memory: int
    disk: int


def cost(model: nn.Module, batch: Batch) -> Cost:
    """Everything but latency. The batch holds the labels the training step needs."""
    params, trainable = parameters(model)
    return Cost(
        params=params,
        trainable=trainable,
        flops=flops(model, batch),
        forward_memory=forward_memory(model, batch),
        step_memory=step_memory(model, batch),
        disk=disk(model),
    )


def parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and the trainable ones; a tied weight counts once."""
    sizes = [(one.numel(), one.requires_grad) for one in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs of one forward pass in evaluation mode; works on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    extra = 0

    def count(part: Any, given: tuple, named: dict) -> None:
        nonlocal extra
        values = (*given, *named.values())
        tokens = next(value for value in values if isinstance(value, Tensor))
        context = next((value for value in values if isinstance(value, Context)), None) or Context.of(tokens)
        extra += tokens.shape[0] * int(part.extra_flops(context))

    handles = [
        part.register_forward_pre_hook(count, with_kwargs=True)
        for part in model.modules()
        if hasattr(part, "extra_flops")
    ]
    try:
        formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with _evaluating(model), torch.no_grad(), counter:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return int(counter.get_total_flops()) + extra


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Of the CPU's fused attention, which torch has no formula for: both products, whatever the mask hides."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages alive now, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def follow(self, values: Any) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                continue
            storage = value.untyped_storage()
            name, size = storage._cdata, storage.nbytes()
            known = self._sizes.get(name)
            if known is None:
                weakref.finalize(storage, self._gone, name)
            if known != size:  # new, or resized in place
                self.now += size - (known or 0)
                self._sizes[name] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, name: int) -> None:
        self.now -= self._sizes.pop(name, 0)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.follow(out)
        return out


def peak_memory(run: Callable[[], Any], *, held: Any = ()) -> int:
    """The most bytes of tensors alive at once while `run` runs, `held` (weights, inputs) included."""
    tensors = [value for value in tree_leaves(held) if isinstance(value, Tensor)]
    devices = {value.device for value in tensors if value.device.type == "cuda"}
    if devices:
        device = devices.pop()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    counter = _LiveBytes()
    counter.follow(tensors)
    with counter:
        kept = run()
    del kept
    return counter.peak


def forward_memory(model: nn.Module, batch: Batch) -> int:
    """Peak bytes of a forward pass without gradients: weights, inputs and activations."""
    with _evaluating(model), torch.no_grad():
        return peak_memory(lambda: model(**batch), held=_held(model, batch))


def step_memory(model: nn.Module, batch: Batch) -> int:
    """Peak bytes of one AdamW step: weights, inputs, activations, gradients and the optimizer's state.

    The model is put back as it was.
    """
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    training = model.training
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()

    try:
        return peak_memory(step, held=_held(model, batch))
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(before)
        model.train(training)
        torch.set_rng_state(state)


def disk(model: nn.Module) -> int:
    """Bytes of the weights as safetensors; a tied weight is stored once."""
    from safetensors.torch import save

    stored: dict[tuple, Tensor] = {}
    names: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        place = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride())
        if place not in stored:
            stored[place] = value
            names[name] = value.contiguous().clone()
    return len(save(names))


def latency(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int = 15, least: float = 0.005
) -> dict[str, tuple[float, float]]:
    """Median milliseconds a call, and the median ratio to the first one in the same round.

    Args:
        runs: what to time, by name; the first is the baseline.
        rounds: each times every one of them once.
        least: seconds a timing must last; short calls are repeated.
    """
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    timers, repeats = {}, {}
    for name, run in runs.items():
        timers[name] = Timer("run()", globals={"run": run}, num_threads=threads)
        timers[name].timeit(2)  # the first calls pay for oneDNN's compilation
        repeats[name] = max(1, round(least / max(timers[name].timeit(2).mean, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(repeats[name]).mean)
    first = times[next(iter(runs))]
    return {
        name: (
            1e3 * statistics.median(own),
            statistics.median(ours / theirs for ours, theirs in zip(own, first, strict=True)),
        )
        for name, own in times.items()
    }


def forward_call(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    """One forward pass without gradients, to be timed; puts the model in evaluation mode."""
    model.eval()

    @torch.inference_mode()
    def run() -> Any:
        return model(**batch)

    return run


def _held(model: nn.Module, batch: Batch) -> list[Any]:
    return [*model.parameters(), *model.buffers(), *batch.values()]


class _evaluating:
    """The model in evaluation mode for a while."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)
