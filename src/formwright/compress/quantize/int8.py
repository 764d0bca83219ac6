"""int8: the products of a model's layers in 8-bit integers, without training.

Paper    Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
         (CVPR 2018), arXiv:1712.05877, for products of integers with zero points. Xiao et al.: SmoothQuant
         (ICML 2023), arXiv:2211.10438, for the factors s_j.
Idea     A weight is 8 bits with a scale for every output channel; an activation is 8 bits without sign. The product is
         exact in int32, and one multiplication a channel brings it back. Input channels that reach far would leave few
         of the 256 steps to the others: a part of their reach moves into the weight, channel by channel.

             w^_ij = w_ij s_j     w^ ~ d_i W_ij     W from -127 to 127      d_i = max_j |w^_ij| / 127
             x^_j  = x_j / s_j    x^ ~ d_x (X - z)  X from 0 to 255
             y_i   = d_x d_i (sum_j X_j W_ij - z sum_j W_ij) + b_i
             s_j   = max |x_j|^a / max_i |w_ij|^(1 - a), a = `smooth`; 1 with smooth=0

         scale="static"    d_x and z of a tensor, from the smallest and largest x^ in calibration
         scale="dynamic"   z = 128 and d_x = max |x^| / 127 of each token: without calibration, but for s_j
Differs  SmoothQuant folds 1 / s_j into the norm before the layer. Where the residual leaves after that norm, as in
         BERT, it cannot be folded; here it is part of the rounding, x_j / (s_j d_x) + z, at no cost and for every
         family and layer. Its a is one for all; here each layer's is chosen by the layer's error. A dynamic scale is a
         token's, not the tensor's: with a tensor's a text's answer would depend on its batch.

On x86 with VNNI or AMX the product is oneDNN's. Elsewhere PyTorch computes the same integers as exact sums of floats,
which is right and not fast. Inference only: rounding has no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int, Int32, UInt8
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formwright.compress.anatomy import describe
from formwright.compress.modifier import Data, Modifier
from formwright.compress.structure import Rebuilt, replace
from formwright.errors import FormwrightError

Scale = Literal["static", "dynamic"]

POWERS = (0.0, 0.5, 0.7, 0.8, 0.9)  # what smooth=None tries
TOKENS = 512  # of calibration, on which it chooses

BLOCK = 256  # tokens that are rounded at a time

EXACT = 1024  # products of a byte and a byte, as many as float32 adds without rounding: 128 * 128 * 1024 = 2^24


def exact_product(x: UInt8[Tensor, "t i"], weight: Int[Tensor, "o i"], zero: int) -> Int32[Tensor, "t o"]:
    """sum_j (x_j - zero) weight_ij, exactly, on any device: float32 adds up pieces whose sums it can hold."""
    pieces = zip((x.float() - 128).split(EXACT, 1), weight.float().split(EXACT, 1), strict=True)
    total = sum((a @ b.T).to(torch.int32) for a, b in pieces)
    return total + (128 - zero) * weight.sum(1, dtype=torch.int32)


def has_instructions(device: torch.device) -> bool:
    """Whether oneDNN's product is fast and exact there; without VNNI its 16-bit sums of pairs may saturate."""
    return (
        device.type == "cpu"
        and hasattr(torch.ops.onednn, "qlinear_pointwise")
        and (torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported())
    )


class Packed(NamedTuple):
    """A layer made ready for calls: the weight in oneDNN's order (None: as it is), the rest as float32."""

    source: Tensor
    weight: Tensor | None
    factor: Float[Tensor, " i"] | Float[Tensor, ""]  # 1 / (s_j d_x)
    shift: Float[Tensor, ""]  # z + 1/2: what is cut off is rounded
    zero: int
    scale: Float[Tensor, " o"]  # d_x d_i
    zeros: Int32[Tensor, " o"]
    bias: Float[Tensor, " o"] | None


class WithoutGradient(torch.autograd.Function):
    """Ends the way back with a word, where a plain detach would let a model train without its layers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG004
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:  # noqa: ARG004
        raise FormwrightError("An int8 layer has no gradients: train the model before step int8, not after it.")


class Int8Linear(Rebuilt):
    """A linear layer on 8-bit integers. Scales and bias are kept as the bits of float32, which no cast can round.

    Memory: the saved weight, and from the first call on its copy in oneDNN's order; a byte a weight each.
    """

    kind: ClassVar[str] = "int8-linear"
    codes: Int[Tensor, "o i"]
    weight_scale: Int32[Tensor, " o"]
    smoothing: Int32[Tensor, " i"] | None
    input_scale: Int32[Tensor, ""] | None
    offset: Int32[Tensor, " o"] | None
    one: Tensor

    def __init__(self, *, inputs: int, outputs: int, bias: bool, scale: Scale, smooth: bool, zero: int = 128) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale, self.zero = inputs, outputs, scale, zero
        self.register_buffer("codes", torch.empty(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(outputs, dtype=torch.int32))
        self.register_buffer("smoothing", torch.empty(inputs, dtype=torch.int32) if smooth else None)
        self.register_buffer("input_scale", torch.empty((), dtype=torch.int32) if scale == "static" else None)
        self.register_buffer("offset", torch.empty(outputs, dtype=torch.int32) if bias else None)
        self.register_buffer("one", torch.ones(()))  # has the model's dtype
        self._packed: Packed | None = None

    def structure(self) -> dict[str, Any]:
        return {
            "inputs": self.in_features,
            "outputs": self.out_features,
            "bias": self.offset is not None,
            "scale": self.scale,
            "smooth": self.smoothing is not None,
            "zero": self.zero,
        }

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "Int8Linear":  # noqa: ARG003 - it stands alone
        return cls(**structure)

    @classmethod
    def of(cls, old: nn.Linear | Conv1D, *, scale: Scale, smooth: float, seen: "Seen") -> "Int8Linear":
        """A Linear or Conv1D in integers; `smooth` is the power a."""
        weight = by_output(old)
        outputs, inputs = weight.shape
        new = cls(inputs=inputs, outputs=outputs, bias=old.bias is not None, scale=scale, smooth=smooth > 0)
        new = new.to(weight.device)
        new.one = torch.ones_like(old.weight[0, 0])
        factor = smoothing(seen.reach, weight.abs().amax(0), smooth)
        weight = weight * factor
        step = nonzero(weight.abs().amax(1) / 127)
        new.codes = (weight / step[:, None]).round().clamp(-127, 127).to(torch.int8)
        new.weight_scale = bits(step)
        if smooth > 0:
            new.smoothing = bits(factor)
        if scale == "static":
            low = (seen.low / factor).amin().clamp(max=0)  # 0 is met exactly: padding, ReLU
            high = (seen.high / factor).amax().clamp(min=0)
            step = nonzero((high - low) / 255)
            new.input_scale, new.zero = bits(step), int((-low / step).round())
        if old.bias is not None:
            new.offset = bits(old.bias.detach())
        return new

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """What the codes stand for, in the model's dtype; families ask for that."""
        weight = self.codes * values(self.weight_scale)[:, None]
        return (weight if self.smoothing is None else weight / values(self.smoothing)).to(self.one.dtype)

    @property
    def bias(self) -> Float[Tensor, " o"] | None:
        return None if self.offset is None else values(self.offset).to(self.one.dtype)

    @property
    def packed(self) -> Packed:
        """Made at the first call, and again when the weight is another tensor; a compiler gets no oneDNN weight."""
        if torch.compiler.is_compiling():
            return self.pack(None)
        if self._packed is None or self._packed.source is not self.codes:
            fast = has_instructions(self.codes.device)
            self._packed = self.pack(torch.ops.onednn.qlinear_prepack(self.codes, None) if fast else None)
        return self._packed

    def pack(self, weight: Tensor | None) -> Packed:
        scale = values(self.weight_scale)
        factor = torch.ones_like(scale[0]) if self.smoothing is None else 1 / values(self.smoothing)
        if self.input_scale is not None:
            factor, scale = factor / values(self.input_scale), scale * values(self.input_scale)
        return Packed(
            source=self.codes,
            weight=weight,
            factor=factor,
            shift=torch.full_like(scale[0], self.zero + 0.5),
            zero=self.zero,
            scale=scale,
            zeros=torch.zeros_like(self.weight_scale),
            bias=None if self.offset is None else values(self.offset),
        )

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        with torch.no_grad():
            packed, rows = self.packed, x.detach().reshape(-1, self.in_features)
            if self.scale == "static":
                codes = in_blocks(lambda part: rounded(part.float(), packed), rows, self.in_features, torch.uint8)
                y = product(packed, codes, packed.bias, x.dtype)
            else:
                y = in_blocks(lambda part: by_token(part.float(), packed), rows, self.out_features, x.dtype)
            y = y.view(*x.shape[:-1], self.out_features)
        return WithoutGradient.apply(x, y) if torch.is_grad_enabled() and x.requires_grad else y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a copy packs its own weight

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scale={self.scale}, smooth={self.smoothing is not None}"


def in_blocks(function: Callable[[Tensor], Tensor], rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """A function of every row; on a processor some rows at a time, so that what is in between stays in its cache."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return function(rows).to(dtype)
    out = rows.new_empty(len(rows), width, dtype=dtype)
    for part, place in zip(rows.split(BLOCK), out.split(BLOCK), strict=True):
        place.copy_(function(part))
    return out


def rounded(x: Float[Tensor, "t i"], packed: Packed) -> Int32[Tensor, "t i"]:
    """X of the whole tensor's scale. int32 is cut off much faster than uint8, and then is as fast to shorten."""
    return torch.addcmul(packed.shift, x, packed.factor).clamp_(0, 255).to(torch.int32)


def by_token(x: Float[Tensor, "t i"], packed: Packed) -> Float[Tensor, "t o"]:
    """The answer with a scale for each token."""
    x = x * packed.factor
    step = nonzero(x.abs().amax(1, keepdim=True) / 127)
    codes = torch.addcdiv(packed.shift, x, step).to(torch.int32).to(torch.uint8)
    y = product(packed, codes, None, torch.float32)
    return y * step if packed.bias is None else torch.addcmul(packed.bias, y, step)


def product(
    packed: Packed, codes: UInt8[Tensor, "t i"], bias: Float[Tensor, " o"] | None, dtype: torch.dtype
) -> Float[Tensor, "t o"]:
    """scale_i sum_j (codes_j - zero) W_ij + bias_i."""
    if packed.weight is None:
        y = exact_product(codes, packed.source, packed.zero) * packed.scale
        return (y if bias is None else y + bias).to(dtype)
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, packed.zero, packed.weight, packed.scale, packed.zeros, bias, 1.0, 0, dtype, "none", [], ""
    )


def bits(value: Float[Tensor, "*n"]) -> Int32[Tensor, "*n"]:
    return value.float().contiguous().view(torch.int32)


def values(held: Int32[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return held.view(torch.float32)


def nonzero(step: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A scale to divide by; what is all zeros has any."""
    return torch.where(step > 0, step, 1.0)


def smoothing(reach: Float[Tensor, " i"], weight: Float[Tensor, " i"], power: float) -> Float[Tensor, " i"]:
    """s_j from the reach of a channel's inputs and weights; 1 without smoothing and where either is all zeros."""
    if not power:
        return torch.ones_like(reach)
    found = reach**power / weight ** (1 - power)
    return torch.where((reach > 0) & (weight > 0) & found.isfinite() & (found > 0), found, 1.0)


def by_output(module: nn.Linear | Conv1D) -> Float[Tensor, "o i"]:
    weight = module.weight.detach().float()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


@dataclass
class Seen:
    """What a layer was given in calibration: the smallest and largest input of each channel, and some of the tokens."""

    low: Float[Tensor, " i"]
    high: Float[Tensor, " i"]
    rows: list[Float[Tensor, "t i"]]

    def add(self, x: Float[Tensor, "t i"], keep: int) -> None:
        low, high = torch.aminmax(x, dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.rows.append(x[torch.linspace(0, len(x) - 1, min(keep, len(x)), device=x.device).long()])

    @property
    def reach(self) -> Float[Tensor, " i"]:
        return torch.maximum(self.low.abs(), self.high.abs())


class Int8(Modifier):
    """Turn the linear layers of a model's layers, and GPT-2's Conv1D, into 8-bit integers; embeddings and head stay.

    Args:
        scale: "static", from calibration, or "dynamic", of each token in every call.
        smooth: the part a of a channel's reach that moves from activations into weights, from 0 to 1. None chooses
            for every layer the one whose answers to calibration tokens are nearest to the old ones.
        samples: calibration rows.
    """

    def __init__(self, *, scale: Scale = "static", smooth: float | None = None, samples: int = 128) -> None:
        if scale not in get_args(Scale):
            raise FormwrightError(f"scale is {scale!r}, but it must be static or dynamic.")
        if smooth is not None and not 0 <= smooth <= 1:
            raise FormwrightError(f"smooth is {smooth:g}, but it must be from 0 to 1.")
        if samples < 1:
            raise FormwrightError(f"samples is {samples}, but it must be at least 1.")
        self.scale, self.smooth, self.samples = scale, smooth, samples
        self.seen: dict[str, Seen] | None = None

    def check(self, model: PreTrainedModel) -> None:
        found = layers(model)
        if not found:
            raise FormwrightError(f"{type(model).__name__} has no linear layer in floating point left for int8.")
        for path, module in found.items():
            if not bool(module.weight.isfinite().all()):
                raise FormwrightError(f"A weight of {path} is infinite or no number: repair or retrain the model.")

    @torch.no_grad()
    def calibrate(self, model: PreTrainedModel, data: Data) -> None:
        """The reach of every channel and some tokens, padding left out."""
        seen: dict[str, Seen] = {}
        size, left = min(16, self.samples), self.samples
        keep = math.ceil(TOKENS * size / self.samples)
        mask: Tensor | None = None

        def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                (x,) = args
                real = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
                if len(real):
                    real = real.float()
                    seen.setdefault(path, Seen(real[0], real[0], [])).add(real, keep)

            return look

        hooks = [module.register_forward_pre_hook(note(path)) for path, module in layers(model).items()]
        try:
            for batch in data.batches(math.ceil(left / size), batch_size=size):
                inputs = {name: value[:left].to(model.device) for name, value in batch.items()}
                mask = inputs.get("attention_mask")
                mask = mask.bool() if mask is not None and mask.ndim == 2 else None
                model(**inputs)
                left -= size
        finally:
            for hook in hooks:
                hook.remove()
        self.seen = seen

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        if self.seen is None:
            raise FormwrightError("int8 needs calibration rows: call calibrate with data first.")
        for path, module in layers(model).items():
            if path in self.seen:  # of a layer that no row reached nothing is known
                replace(model, path, self.nearest(module, self.seen[path]))
        self.seen = None

    def nearest(self, old: nn.Linear | Conv1D, seen: Seen) -> Int8Linear:
        """The layer in integers whose answers are nearest, each token's error as a share of its answer."""
        powers = POWERS if self.smooth is None else (self.smooth,)
        made = [Int8Linear.of(old, scale=self.scale, smooth=power, seen=seen) for power in powers]
        if len(made) == 1:
            return made[0]
        rows = torch.cat(seen.rows).to(old.weight.dtype)
        answer = old(rows).float()
        size = answer.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)
        errors = [float(((new(rows).float() - answer).square().sum(1) / size).mean()) for new in made]
        return made[errors.index(min(errors))]


def layers(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers and Conv1D inside the model's layers, by path."""
    return {
        f"{layer.path}.{name}": module
        for layer in describe(model).layers
        for name, module in model.get_submodule(layer.path).named_modules()
        if type(module) in (nn.Linear, Conv1D) and module.weight.is_floating_point()
    }
