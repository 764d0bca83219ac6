"""Fast DistilBERT: a pattern of zeros that the processor's byte products can skip, trained back, and run in int8.

Paper    Shen et al.: Fast DistilBERT on CPUs (2022), arXiv:2211.07715.
Idea     Of the layers' matrices, blocks of four outputs of one input become zero, most of them, while the model trains;
         then the pattern is locked and what was lost is learnt back from the dense model. Weights and activations
         become 8-bit integers, and a product reads the blocks that are left and nothing else.

    score       of a block, sum |w| or the root of sum w^2; the lowest go, of each matrix or of all
    share       s_t = s (1 - (1 - t/T)^3) after t of T steps; a block that is gone stays gone
    lock        masked weights get no gradient, and have no momentum: zero after every step
    weights     signed, a scale an output, s_w = max |w| / 127: zeros stay exactly zero
    activations unsigned, one scale, from calibration: s_x = (max - min) / 255, z = round(-min / s_x), 0 within
    product     y = s_x s_w (sum over blocks of q w  -  z sum_k w) + b, in int32; the last sum is known beforehand

    a layer     x in panels, 64 tokens feature by feature, as bytes and as floats (formwright.ops.block_sparse)
                q, k, v   one product, in floats, for the attention of each text
                output    product + x, LayerNorm in columns (Welford), to bytes and floats
                up        product, bias, activation, to bytes: the wide states never exist in floats
                down      product + x, LayerNorm, to bytes and floats

`block-prune` is the first part, `distill` the second, `sparse-int8` the third.
Differs  The paper prunes while it pretrains and locks the pattern for each task; here both are one training on the
         task, or two steps of a recipe. Its products are generated code for each weight, ours one loop over indices
         (16 bits a block). Ranges are the smallest and largest values met. Attention runs in floats.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Int8, Int32, UInt8
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.pytorch_utils import Conv1D

from formwright.compress.anatomy import Layer, describe
from formwright.compress.distill import Pair
from formwright.compress.finetune import Budget, takes_labels, trainable
from formwright.compress.modifier import Data, Modifier
from formwright.compress.prune.llm_weight_pruning import Masks, Matrix, cubic, keep_together, matrices
from formwright.compress.runtime import encoders
from formwright.compress.runtime.bytetransformer import PaddingFree, family_of, unpack, word_places
from formwright.compress.runtime.packed import sums
from formwright.compress.structure import EXECUTOR, Rebuilt, attach, replace
from formwright.errors import FormwrightError
from formwright.ops import block_sparse
from formwright.ops.block_sparse import BLOCK, WIDEST, Packed, Panels
from formwright.ops.varlen import varlen_attention
from formwright.training import fit

Norm = Literal["l1", "l2"]
Scope = Literal["layer", "global"]

ACTIVATIONS: dict[str, block_sparse.Activation] = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
}
FAMILIES = ("bert", "distilbert", "roberta", "electra")  # norm after the residual, no position bias


# The pattern


def divisible(found: Mapping[str, Matrix]) -> dict[str, Matrix]:
    """The matrices that consist of whole blocks; the others stay dense."""
    return {path: one for path, one in found.items() if len(one.values) % BLOCK == 0}


def block_scores(weight: Float[Tensor, "out in"], norm: Norm) -> Float[Tensor, "groups in"]:
    """The norm of every block of four outputs of one input."""
    return torch.linalg.vector_norm(weight.float().unflatten(0, (-1, BLOCK)), 1 if norm == "l1" else 2, dim=1)


def sparsity(weight: Float[Tensor, "out in"]) -> float:
    """The share of blocks that are zero."""
    held = block_sparse.blocks(weight)
    return 1 - int(held.sum()) / held.numel()


@contextmanager
def pattern_lock(
    found: Mapping[str, Matrix], masks: Masks, after_step: Callable[[], None] | None = None
) -> Iterator[None]:
    """While training, what is masked is zero after every step: it gets no gradient and keeps no momentum.

    Args:
        masks: looked up in every step, so they may change between steps.
        after_step: called when an optimizer has moved the weights, before the masks are applied.
    """
    paths = {one.weight: path for path, one in found.items()}

    def gate(path: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient * found[path].seen(masks[path])

    @torch.no_grad()
    def step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        moved = [weight for group in optimizer.param_groups for weight in group["params"] if weight in paths]
        if moved and after_step is not None:
            after_step()
        for weight in moved:
            gone = ~found[paths[weight]].seen(masks[paths[weight]])
            weight.masked_fill_(gone, 0.0)
            for moment in optimizer.state[weight].values():
                if isinstance(moment, Tensor) and moment.shape == weight.shape:
                    moment.masked_fill_(gone, 0.0)

    handles = [weight.register_hook(gate(path)) for weight, path in paths.items() if weight.requires_grad]
    handles.append(register_optimizer_step_post_hook(step))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockPrune(Modifier):
    """Zero blocks of four outputs of one input, ever more while the model trains; then train with the pattern fixed.

    Args:
        amount: the share of blocks that goes.
        norm: a block's score is its "l1" or "l2" norm.
        scope: blocks are compared within a matrix ("layer") or over the whole model ("global").
        every: steps between two choices of blocks.
        lock: the share of the steps, at the end, that train under the final pattern.
        alpha: the share of the original model's answers in the loss, as in `distill`; 0 reads labels alone.
        temperature: at which they are read.
        hidden: the weight of the original's hidden states in the loss.
        steps: optimizer steps; none = as the data's settings say, as for the next two.
        learning_rate: the highest of the schedule.
        batch_size: rows a step.
    """

    simulated: ClassVar[bool] = True  # sparse-int8 makes it fast
    trains: ClassVar[bool] = True

    def __init__(
        self,
        *,
        amount: float = 0.8,
        norm: Norm = "l1",
        scope: Scope = "layer",
        every: int = 10,
        lock: float = 0.3,
        alpha: float = 0.0,
        temperature: float = 2.0,
        hidden: float = 0.0,
        steps: int | None = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        if not 0 < amount < 1:
            raise FormwrightError(f"amount is {amount:g}, but it is the share that goes: above 0 and below 1.")
        for name, value, kind in (("norm", norm, Norm), ("scope", scope, Scope)):
            if value not in get_args(kind):
                raise FormwrightError(f"{name} is {value!r}, but it must be {' or '.join(get_args(kind))}.")
        if every < 1:
            raise FormwrightError(f"every is {every}, but it must be at least 1.")
        if not 0 <= lock < 1:
            raise FormwrightError(f"lock is {lock:g}, but it is a share of the steps: 0 or more and below 1.")
        if not 0 <= alpha <= 1:
            raise FormwrightError(f"alpha is {alpha:g}, but it is a share: from 0 to 1.")
        if not temperature > 0 or hidden < 0:
            raise FormwrightError(
                f"temperature must be above 0 and hidden not below, got temperature={temperature:g} and "
                f"hidden={hidden:g}."
            )
        self.amount, self.norm, self.scope, self.every, self.lock = amount, norm, scope, every, lock
        self.alpha, self.temperature, self.hidden = alpha, temperature, hidden
        self.uses_teacher = alpha > 0 or hidden > 0  # type: ignore[misc]
        self.budget = Budget(steps=steps, learning_rate=learning_rate, batch_size=batch_size)
        self.masks: Masks = {}

    def check(self, model: PreTrainedModel) -> None:
        if not divisible(matrices(model)):
            raise FormwrightError(
                f"{type(model).__name__} has no plain matrix inside its layers whose outputs divide by {BLOCK}: put "
                "block-prune before what changed them, or leave it out."
            )
        trainable(model, "block-prune")
        if self.alpha < 1 and not takes_labels(model):
            raise FormwrightError(
                f"{type(model).__name__} computes no loss of its own: use block-prune(alpha=1), which learns from the "
                "original model."
            )

    def finetune(self, model: PreTrainedModel, data: Data) -> None:
        found = divisible(matrices(model))
        self.masks = {path: torch.ones_like(one.values, dtype=torch.bool) for path, one in found.items()}
        settings = self.budget.settings(data)
        ramp = max(1, round(settings.steps * (1 - self.lock)))
        step = 0

        def after_step() -> None:
            nonlocal step
            step += 1
            if step == ramp or (step < ramp and step % self.every == 0):
                self.choose(found, cubic(step, ramp, self.amount))

        trained = self.paired(model, data) if self.uses_teacher else model
        with pattern_lock(found, self.masks, after_step):
            fit(trained, data.task, settings)

    def paired(self, model: PreTrainedModel, data: Data) -> Pair:
        if data.teacher is None:
            raise FormwrightError(
                "block-prune with alpha or hidden learns from the original model, and the data holds none as its "
                "teacher."
            )
        [example] = data.batches(1, batch_size=2)
        return Pair(
            model,
            data.teacher,
            kind=data.kind,
            example={name: value.to(model.device) for name, value in example.items()},
            temperature=self.temperature,
            alpha=self.alpha,
            hidden=self.hidden,
        )

    def choose(self, found: Mapping[str, Matrix], amount: float) -> None:
        """The blocks with the lowest scores go; those that are gone have the lowest of all."""
        scores = {}
        for path, one in found.items():
            gone = ~self.masks[path][::BLOCK]
            scores[path] = block_scores(one.values, self.norm).masked_fill(gone, -math.inf)
        for path, kept in keep_together(scores, amount, self.scope).items():
            self.masks[path] = kept.repeat_interleave(BLOCK, 0)


# In integers


class Ready(NamedTuple):
    """A layer as the kernel reads it, and of which tensors it was made."""

    matrix: block_sparse.Matrix
    scale: float
    zero: int
    source: tuple[Tensor, ...]


class SparseBlockLinear(Rebuilt):
    """A linear layer of which only the blocks that hold anything are stored, in int8, and read.

    Buffers: the blocks (formwright.ops.block_sparse.Packed), and as the bits of floats, which a change of the model's
    dtype leaves alone, the scales and the bias.
    """

    kind: ClassVar[str] = "block-sparse-linear"
    starts: Tensor
    columns: Tensor
    values: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    zero: Tensor
    shift: Tensor | None
    one: Tensor

    def __init__(self, *, inputs: int, outputs: int, blocks: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("starts", torch.zeros(outputs // BLOCK + 1, dtype=torch.int32))
        self.register_buffer("columns", torch.zeros(blocks, dtype=torch.int16))
        self.register_buffer("values", torch.zeros(BLOCK * blocks, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(outputs, dtype=torch.int32))
        self.register_buffer("input_scale", torch.zeros((), dtype=torch.int32))
        self.register_buffer("zero", torch.zeros((), dtype=torch.uint8))
        self.register_buffer("shift", torch.zeros(outputs, dtype=torch.int32) if bias else None)
        self.register_buffer("one", torch.ones(()))  # has the model's dtype
        self._ready: Ready | None = None

    def structure(self) -> dict[str, Any]:
        return {
            "inputs": self.in_features,
            "outputs": self.out_features,
            "blocks": len(self.columns),
            "bias": self.shift is not None,
        }

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "SparseBlockLinear":  # noqa: ARG003 - it stands alone
        return cls(**structure)

    @classmethod
    def of(cls, old: nn.Linear | Conv1D, low: float, high: float) -> "SparseBlockLinear":
        """A Linear or Conv1D whose inputs lie between two numbers."""
        weight = Matrix("", old).values.float()
        scale = _divisor(weight.abs().amax(1) / 127)
        packed = block_sparse.pack((weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        low, high = min(low, 0.0), max(high, 0.0)  # 0 is met exactly
        step = (high - low) / 255 or 1.0
        outputs, inputs = weight.shape
        new = cls(inputs=inputs, outputs=outputs, blocks=len(packed.columns), bias=old.bias is not None)
        new = new.to(weight.device)
        new.starts, new.columns, new.values = packed
        new.weight_scale, new.input_scale = _bits(scale), _bits(scale.new_tensor(step))
        new.zero = torch.tensor(round(-low / step), dtype=torch.uint8, device=weight.device)
        if old.bias is not None:
            new.shift = _bits(old.bias.detach())
        new.one = torch.ones_like(old.weight[0, 0])
        return new

    @property
    def packed(self) -> Packed:
        return Packed(self.starts, self.columns, self.values)

    @property
    def integers(self) -> Int8[Tensor, "out in"]:
        return block_sparse.unpack(self.packed, self.in_features)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """What the integers stand for, in the model's dtype."""
        return (self.integers * _floats(self.weight_scale)[:, None]).to(self.one.dtype)

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        return None if self.shift is None else _floats(self.shift).to(self.one.dtype)

    @property
    def ready(self) -> Ready:
        """Made at the first call, and again when the tensors are others."""
        source = (self.values, self.weight_scale, self.input_scale, self.zero)
        if self._ready is None or any(one is not other for one, other in zip(self._ready.source, source, strict=True)):
            scale, zero = float(_floats(self.input_scale)), int(self.zero)
            offsets = zero * self.integers.sum(1, dtype=torch.int32)
            bias = torch.zeros_like(offsets) if self.shift is None else self.shift
            matrix = block_sparse.Matrix(
                packed=self.packed,
                factors=scale * _floats(self.weight_scale),
                offsets=offsets,
                bias=_floats(bias),
                inputs=self.in_features,
            )
            self._ready = Ready(matrix, scale, zero, source)
        return self._ready

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        if torch.is_grad_enabled() and x.requires_grad:
            raise FormwrightError(
                "A block-sparse layer in integers has no gradients: call the model under torch.no_grad(), and train "
                "before step sparse-int8."
            )
        ready, rows = self.ready, x.reshape(-1, self.in_features).float()
        if _native(x):
            panels, _ = block_sparse.to_panels(rows, ready.scale, ready.zero)
            y = block_sparse.floats(panels, ready.matrix)
        else:
            sums = self.whole(block_sparse.quantise(rows, ready.scale, ready.zero))
            y = sums * ready.matrix.factors + ready.matrix.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def whole(self, codes: Tensor) -> Int32[Tensor, "t out"]:
        """sum q w - z sum w, by a dense product."""
        return block_sparse.dense_product(codes, self.integers) - self.ready.matrix.offsets

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._ready = None  # what is loaded is written into the same tensors
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        share = 1 - len(self.columns) * BLOCK / max(1, self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, {share:.0%} zero"


def _native(x: Tensor) -> bool:
    off = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return block_sparse.kernel() is not None and x.device.type == "cpu" and not off


def _bits(value: Float[Tensor, "*n"]) -> Int32[Tensor, "*n"]:
    return value.float().contiguous().view(torch.int32)


def _floats(held: Int32[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return held.view(torch.float32)


def _divisor(scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A row of zeros has any scale."""
    return torch.where(scale > 0, scale, 1.0)


class SparseInt8(Modifier):
    """Run the block-sparse matrices of a model's layers in integers that skip the zero blocks.

    BERT, DistilBERT, RoBERTa and ELECTRA are then run layer by layer in panels, and on real tokens alone; in other
    families each matrix is. Matrices whose outputs do not divide by 4, embeddings and heads stay as they are.

    Args:
        samples: calibration rows.
        spare: how many matrices stay in floating point, those whose outputs would change most; the model is then run
            matrix by matrix.
    """

    def __init__(self, *, samples: int = 128, spare: int = 0) -> None:
        if samples < 1:
            raise FormwrightError(f"samples is {samples}, but it must be at least 1.")
        if spare < 0:
            raise FormwrightError(f"spare is {spare}, but it counts matrices: 0 or more.")
        self.samples, self.spare = samples, spare
        self.ranges: dict[str, tuple[float, float]] | None = None
        self.inputs: dict[str, Float[Tensor, "t k"]] = {}

    def check(self, model: PreTrainedModel) -> None:
        found = divisible(matrices(model))
        if self.spare >= len(found):
            raise FormwrightError(
                f"{type(model).__name__} has {len(found)} matrices of whole blocks in floating point, and spare is "
                f"{self.spare}: nothing would be left to change."
            )
        if not any(sparsity(one.values) for one in found.values()):
            raise FormwrightError(
                "No block of four weights is zero in this model: put block-prune before sparse-int8, or use int8."
            )
        for path, one in found.items():
            if one.values.shape[1] > WIDEST:
                raise FormwrightError(f"{path} has more than {WIDEST} inputs, which sparse-int8 cannot index.")
            if not bool(one.weight.isfinite().all()):
                raise FormwrightError(f"A weight of {path} is infinite or no number: repair or retrain the model.")

    @torch.no_grad()
    def calibrate(self, model: PreTrainedModel, data: Data) -> None:
        """The smallest and largest input of each matrix, padding left out."""
        ranges: dict[str, tuple[float, float]] = {}
        live: Bool[Tensor, "b n"] | None = None

        def reading(path: str) -> Callable[..., None]:
            def read(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                del module
                x = given[0].detach()
                x = x[live] if live is not None and live.shape == x.shape[:-1] else x.flatten(0, -2)
                if not len(x):
                    return
                low, high = (float(one) for one in torch.aminmax(x))
                before = ranges.get(path, (low, high))
                ranges[path] = (min(before[0], low), max(before[1], high))
                if self.spare:
                    self.inputs.setdefault(path, x[:256].clone())

            return read

        found = divisible(matrices(model))
        handles = [one.module.register_forward_pre_hook(reading(path)) for path, one in found.items()]
        size = min(16, self.samples)
        try:
            for batch in data.batches(-(-self.samples // size), batch_size=size):
                batch = {name: value.to(model.device) for name, value in batch.items()}
                mask = batch.get("attention_mask")
                live = None if mask is None else mask.bool()
                model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        self.ranges = ranges

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        if self.ranges is None:
            raise FormwrightError("sparse-int8 needs calibration rows: call calibrate with data first.")
        made = {
            path: SparseBlockLinear.of(one.module, *self.ranges[path])
            for path, one in divisible(matrices(model)).items()
            if path in self.ranges  # else it was never called on these rows
        }
        for path in sorted(made, key=lambda path: self.error(model, path, made[path]), reverse=True)[: self.spare]:
            del made[path]
        for path, one in made.items():
            replace(model, path, one)
        if getattr(model, EXECUTOR, None) is None and SparseEncoder.fits(model.base_model):
            attach(model, FusedSparse())
        self.ranges, self.inputs = None, {}

    def error(self, model: PreTrainedModel, path: str, made: SparseBlockLinear) -> float:
        """How far a matrix's outputs move, as a share of their size; read only if some are spared."""
        if not self.spare:
            return 0.0
        x = self.inputs[path]
        wanted = model.get_submodule(path)(x)
        return float((made(x) - wanted).norm() / wanted.norm().clamp(min=1e-12))


# The whole encoder


class FusedSparse(PaddingFree):
    """Runs an encoder of block-sparse layers in panels; elsewhere than on a CPU with our kernels the model itself."""

    kind: ClassVar[str] = "fused-sparse"

    def __init__(self) -> None:
        super().__init__()
        self._engine: tuple[Any, SparseEncoder] | None = None

    def serves(self, model: PreTrainedModel, given: dict[str, Any]) -> bool:
        ids = given.get("input_ids")
        return (
            isinstance(ids, Tensor)
            and ids.device.type == "cpu"
            and model.dtype == torch.float32
            and block_sparse.kernel() is not None
            and super().serves(model, given)
        )

    def encode(self, base: PreTrainedModel, given: dict[str, Any]) -> ModelOutput:
        """Embed real tokens, run the layers, unpack, pool."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        places = word_places(real)
        hidden = encoders.embed(base, family_of(base), given, places)
        packed = self.engine(base).run(hidden, sums(real.sum(1)))
        return encoders.finish(base, unpack(packed, places, real.shape))

    def engine(self, base: PreTrainedModel) -> "SparseEncoder":
        """Of this very model, and of the weights it has now."""
        if self._engine is None or self._engine[0]() is not base or not self._engine[1].holds():
            self._engine = (weakref.ref(base), SparseEncoder(base))
        return self._engine[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}


class Steps(NamedTuple):
    """One layer: its products, what they read, and what follows them."""

    mixing: block_sparse.Matrix
    output: Ready
    up: Ready
    down: Ready
    reads: tuple[float, int]  # scale and zero point of the layer's input
    norm1: nn.LayerNorm
    norm2: nn.LayerNorm
    heads: int
    activation: block_sparse.Activation


class SparseEncoder:
    """The layers of an encoder, all of whose matrices are block-sparse."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.layers = [_steps(base, layer) for layer in describe(base).layers]
        self.depth = len(self.layers)
        self._made = [(one, one.ready) for one in base.modules() if isinstance(one, SparseBlockLinear)]

    def holds(self) -> bool:
        """Whether the weights are still those it was made of."""
        return all(one.ready is made for one, made in self._made)

    @staticmethod
    def fits(base: PreTrainedModel) -> bool:
        """Whether this is such an encoder."""
        anatomy = describe(base)
        if anatomy.family not in FAMILIES or getattr(base.config, "is_decoder", False) or anatomy.shared:
            return False
        for layer in anatomy.layers:
            attention, feed = layer.attention, layer.feedforward
            if attention is None or feed is None or feed.activation not in ACTIVATIONS or layer.cross is not None:
                return False
            paths = (attention.query, attention.key, attention.value, attention.output, feed.up, feed.down)
            if not all(isinstance(base.get_submodule(path), SparseBlockLinear) for path in paths):  # type: ignore[arg-type]
                return False
            if any(type(base.get_submodule(path)) is not nn.LayerNorm for path in (attention.norm, feed.norm)):  # type: ignore[arg-type]
                return False
        return True

    @torch.no_grad()
    def run(self, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"]) -> Float[Tensor, "t d"]:
        """The tokens after the last layer. `cu_seqlens` runs from 0 to t."""
        read, kept = block_sparse.to_panels(hidden, *self.layers[0].reads, keep=True)
        assert kept is not None
        # What is wide is written into the same memory by every layer.
        wide = torch.empty(len(hidden) * max(layer.mixing.outputs for layer in self.layers))
        places = read.values[:, 0].numel()
        inner = torch.empty(places * max(layer.up.matrix.outputs for layer in self.layers), dtype=torch.uint8)
        for number, layer in enumerate(self.layers):
            following = self.layers[number + 1].reads if number + 1 < self.depth else None
            read = self.layer(layer, read, kept, cu_seqlens, following, wide, inner)
        return block_sparse.from_panels(kept)

    def layer(
        self,
        on: Steps,
        read: Panels,
        kept: Panels,
        cu_seqlens: Int[Tensor, " s"],
        following: tuple[float, int] | None,
        wide: Float[Tensor, " floats"],
        inner: UInt8[Tensor, " bytes"],
    ) -> Any:
        """One layer.

        Args:
            read, kept: the input, as bytes and as floats; the floats are overwritten by the output.
            following: scale and zero point of what reads the output, whose bytes are returned.
            wide, inner: room for queries, keys and values, and for the wide states.
        """
        mixing = wide[: read.tokens * on.mixing.outputs].view(read.tokens, on.mixing.outputs)
        block_sparse.floats(read, on.mixing, out=mixing)
        width = on.mixing.outputs // 3 // on.heads
        mixed, _ = varlen_attention(mixing, cu_seqlens, heads=on.heads, scaling=width**-0.5)
        read, _ = block_sparse.to_panels(mixed, on.output.scale, on.output.zero)
        read = block_sparse.add_and_normalise(read, on.output.matrix, kept, on.norm1, (on.up.scale, on.up.zero))
        shape = (len(read.values), on.up.matrix.outputs, block_sparse.TILE)
        states = Panels(inner[: math.prod(shape)].view(shape), read.tokens)
        block_sparse.requantised(read, on.up.matrix, on.activation, on.down.scale, on.down.zero, out=states)
        return block_sparse.add_and_normalise(states, on.down.matrix, kept, on.norm2, following)


def _steps(base: PreTrainedModel, layer: Layer) -> Steps:
    attention, feed = layer.attention, layer.feedforward
    assert attention is not None
    assert feed is not None
    find = base.get_submodule
    read = [find(path).ready for path in (attention.query, attention.key, attention.value)]  # type: ignore[arg-type]
    return Steps(
        mixing=_stacked([one.matrix for one in read]),
        output=find(attention.output).ready,
        up=find(feed.up).ready,
        down=find(feed.down).ready,
        reads=(read[0].scale, read[0].zero),  # all three read the same
        norm1=find(attention.norm),  # type: ignore[arg-type]
        norm2=find(feed.norm),  # type: ignore[arg-type]
        heads=attention.heads,
        activation=ACTIVATIONS[feed.activation],
    )


def _stacked(parts: list[block_sparse.Matrix]) -> block_sparse.Matrix:
    """Matrices of the same inputs as one."""
    starts, before = [torch.zeros(1, dtype=torch.int32)], 0
    for one in parts:
        starts.append(one.packed.starts[1:] + before)
        before += len(one.packed.columns)
    columns, values = (torch.cat([getattr(one.packed, name) for one in parts]) for name in ("columns", "values"))
    rows = {name: torch.cat([getattr(one, name) for one in parts]) for name in ("factors", "offsets", "bias")}
    return block_sparse.Matrix(packed=Packed(torch.cat(starts), columns, values), inputs=parts[0].inputs, **rows)
