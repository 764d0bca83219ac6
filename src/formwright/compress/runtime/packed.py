"""The layers of an encoder on real tokens alone, one text after the other without padding.

Paper    Zhai et al.: ByteTransformer (IPDPS 2023), arXiv:2210.03052.
Idea     The real tokens of a batch are one (t, d) matrix. What works on single tokens sees no padding; attention runs
         in each text, tokens cu_seqlens[i] to cu_seqlens[i + 1]. What follows another at once is one operation:

             q, k, v          one product
             attention        one call for all texts and heads, scores stay in the cache (ops/varlen.py)
             up, activation   one product with the activation in its epilogue
             residual, norm   one pass

         Weights of products are laid out for the processor once (oneDNN), not at every call.
Differs  The paper has CUDA kernels; ours are for CPUs, and plain PyTorch operations serve other devices and dtypes.

A policy may drop tokens or whole texts between layers that normalise after the residual:
    after_attention(layer, hidden, cu_seqlens, received)  -> keep, one boolean a token, or None for all. `hidden` has
        passed the attention, its residual and norm; `received` (t,) is the attention a token got, averaged over heads
        and the queries of its text, where the policy `weighs`.
    after_layer(layer, hidden, cu_seqlens)                -> keep, one boolean a text, or None for all.
What is dropped is gone from the later layers and from what `run` returns: a policy keeps what it still needs.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from formwright.compress.anatomy import Anatomy, Layer, describe
from formwright.errors import FormwrightError
from formwright.ops.varlen import Rotation, add_norm, varlen_attention

FAMILIES = ("bert", "roberta", "electra", "distilbert", "mpnet", "albert", "modernbert")
FUSED = {  # activations that a product of oneDNN can end with: its name there, and which form
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
}


class Policy:
    """What may be dropped between the layers; by itself nothing is."""

    weighs: ClassVar[bool] = False

    def after_attention(
        self, layer: int, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"], received: Float[Tensor, " t"]
    ) -> Bool[Tensor, " t"] | None:
        del layer, hidden, cu_seqlens, received
        return None

    def after_layer(
        self, layer: int, hidden: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " s"]
    ) -> Bool[Tensor, " texts"] | None:
        del layer, hidden, cu_seqlens
        return None


class Positions(NamedTuple):
    """What attention knows of places in a layer, for the longest text of a batch."""

    bias: Float[Tensor, "h n n"] | None = None
    rotation: Rotation | None = None
    window: int | None = None


class PackedEncoder:
    """Runs the layers of `model`, which stay the model's own, for inference: dropout is left out.

    Raises:
        FormwrightError: a family this cannot run, or a layer that was replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.norm_first = _anatomy(model).layers[0].norm_first
        self._model = weakref.ref(model)
        self._layers: list[_PackedLayer] = []
        self._final: _PackedNorm | None = None
        self._watch: _Watch | None = None

    @torch.no_grad()
    def run(
        self,
        hidden: Float[Tensor, "t d"],
        cu_seqlens: Int[Tensor, " s"],
        policy: Policy | None = None,
        positions: Sequence[Positions] | None = None,
    ) -> Float[Tensor, "t2 d"]:
        """The tokens after the last layer and its norm, fewer where `policy` dropped some.

        Args:
            cu_seqlens: int64 on the CPU, from 0 to t.
            positions: one a layer, where the family has any.
        """
        if self.norm_first and policy is not None:
            raise FormwrightError(
                "Tokens are dropped between layers that normalise after the residual; this model's do so before."
            )
        if self._watch is None or self._watch.changed():
            self._lay_out()
        places = positions or [Positions()] * len(self._layers)
        if self.norm_first:
            return _pre_norm(self._layers, self._final, hidden, cu_seqlens, places)
        return _post_norm(self._layers, hidden, cu_seqlens, policy, places)

    def hooked(self) -> bool:
        """Whether a hook waits for a linear layer, as in calibration: only the model's own forward calls it."""
        if self._watch is None or self._watch.rebuilt():
            model = self._model()
            assert model is not None
            linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        else:
            linears = self._watch.linears
        return any(module._forward_hooks or module._forward_pre_hooks for module in linears)

    def _lay_out(self) -> None:
        model = self._model()
        assert model is not None
        anatomy, self._watch = _anatomy(model), _Watch(model)
        made = {layer.path: _PackedLayer(model, layer) for layer in anatomy.layers}
        self._layers = [made[layer.path] for layer in _in_running_order(anatomy.layers)]
        self._final = None if anatomy.final_norm is None else _PackedNorm(model.get_submodule(anatomy.final_norm))


def _anatomy(model: PreTrainedModel) -> Anatomy:
    anatomy = describe(model)
    family = anatomy.family  # that of a changed model too
    served = family in FAMILIES and not getattr(model.config, "is_decoder", False)
    if not served or any(layer.attention is None or layer.feedforward is None for layer in anatomy.layers):
        raise FormwrightError(
            f"Padding-free execution cannot run this {family!r} model: use one of {', '.join(FAMILIES)} whose "
            "attentions and feed-forwards are its own."
        )
    return anatomy


_encoders: weakref.WeakKeyDictionary[PreTrainedModel, PackedEncoder] = weakref.WeakKeyDictionary()


def packed_encoder(model: PreTrainedModel) -> PackedEncoder:
    """The packed layers of this very model, made once."""
    if model not in _encoders:
        _encoders[model] = PackedEncoder(model)
    return _encoders[model]


def runs_packed(model: PreTrainedModel) -> bool:
    """Whether the layers of this model can run on real tokens alone."""
    try:
        packed_encoder(model)
    except FormwrightError:
        return False
    return True


def _in_running_order(layers: Sequence[Layer]) -> Iterable[Layer]:
    """Layers that are shared come as often as they run, those of one group together."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.path.rpartition(".")[0], []).append(layer)
    for group in groups.values():
        yield from group * group[0].repeats


def _post_norm(
    layers: Sequence["_PackedLayer"],
    hidden: Tensor,
    cu_seqlens: Tensor,
    policy: Policy | None,
    places: Sequence[Positions],
) -> Tensor:
    for number, (layer, place) in enumerate(zip(layers, places, strict=True)):
        weighs = policy is not None and policy.weighs
        mixed, received = layer.attend(hidden, cu_seqlens, place, weigh=weighs)
        hidden, _ = layer.attention_norm(hidden, mixed)
        if policy is not None and received is not None:
            keep = policy.after_attention(number, hidden, cu_seqlens, received)
            if keep is not None:
                hidden, cu_seqlens = hidden[keep], sums(keep.long().cpu())[cu_seqlens]
        hidden, _ = layer.feedforward_norm(hidden, layer.feed(hidden))
        if policy is not None and (stay := policy.after_layer(number, hidden, cu_seqlens)) is not None:
            lengths, stay = cu_seqlens.diff(), stay.cpu()
            tokens = stay.repeat_interleave(lengths).to(hidden.device)
            hidden, cu_seqlens = hidden[tokens], sums(lengths[stay])
            if not len(hidden):
                break
    return hidden


def _pre_norm(
    layers: Sequence["_PackedLayer"],
    final: "_PackedNorm | None",
    hidden: Tensor,
    cu_seqlens: Tensor,
    places: Sequence[Positions],
) -> Tensor:
    fresh: Tensor | None = None  # what is still to be added to the residual stream
    for layer, place in zip(layers, places, strict=True):
        normal, hidden = layer.attention_norm(hidden, fresh, total=True)
        fresh, _ = layer.attend(normal, cu_seqlens, place)
        normal, hidden = layer.feedforward_norm(hidden, fresh, total=True)
        fresh = layer.feed(normal)
    if final is not None:
        return final(hidden, fresh)[0]
    return hidden if fresh is None else hidden + fresh


def sums(lengths: Int[Tensor, " n"]) -> Int[Tensor, " n+1"]:
    """Where each begins, and where the last ends."""
    found = lengths.new_zeros(len(lengths) + 1)
    torch.cumsum(lengths, 0, out=found[1:])
    return found


# One layer, laid out


class _PackedLayer:
    def __init__(self, model: PreTrainedModel, layer: Layer) -> None:
        attention, feedforward = layer.attention, layer.feedforward
        assert attention is not None
        assert feedforward is not None

        def module(path: str | None) -> nn.Module:
            assert path is not None
            return model.get_submodule(path)

        if attention.fused is None:
            into = [module(path) for path in (attention.query, attention.key, attention.value)]
        else:
            into = [module(attention.fused)]
        self.heads, self.scaling = attention.heads, attention.head_dim**-0.5
        self.qkv, self.out = _PackedLinear(into), _PackedLinear([module(attention.output)])
        self.attention_norm = _PackedNorm(module(attention.norm))
        self.feedforward_norm = _PackedNorm(module(feedforward.norm))
        self.activation, self.gated = feedforward.activation, feedforward.gate is not None
        self.up = _PackedLinear([module(feedforward.up)])
        self.down = _PackedLinear([module(feedforward.down)])

    def attend(
        self, x: Float[Tensor, "t d"], cu_seqlens: Tensor, place: Positions, *, weigh: bool = False
    ) -> tuple[Float[Tensor, "t d"], Float[Tensor, " t"] | None]:
        mixed, received = varlen_attention(
            self.qkv(x), cu_seqlens, heads=self.heads, scaling=self.scaling, weigh=weigh, **place._asdict()
        )
        return self.out(mixed), received

    def feed(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        if not self.gated:
            return self.down(self.up(x, self.activation))
        gate, up = self.up(x).chunk(2, -1)  # of one projection
        return self.down(ACT2FN[self.activation](gate) * up)


class _PackedLinear:
    """Projections of one input as one product. Modules that are no plain projection are called as they are."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        plain = all(type(module) is nn.Linear for module in modules)
        self.weight = torch.cat([module.weight.detach() for module in modules]) if plain else None
        self.bias: Tensor | None = None
        self.laid_out: Tensor | None = None
        if self.weight is None:
            return
        if any(module.bias is not None for module in modules):
            self.bias = torch.cat(
                [
                    module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias.detach()
                    for module in modules
                ]
            )
        if _lays_out(self.weight):
            self.laid_out = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: Float[Tensor, "t i"], activation: str | None = None) -> Float[Tensor, "t o"]:
        if self.laid_out is not None and x.dtype == self.laid_out.dtype and len(x):
            name, form = ("none", "") if activation is None else FUSED.get(activation, ("none", ""))
            y = torch.ops.mkldnn._linear_pointwise(x, self.laid_out, self.bias, name, [], form)
            return y if activation is None or activation in FUSED else ACT2FN[activation](y)
        if self.weight is None:
            y = torch.cat([module(x) for module in self.modules], -1) if len(self.modules) > 1 else self.modules[0](x)
        else:
            y = F.linear(x, self.weight, self.bias)
        return y if activation is None else ACT2FN[activation](y)


def _lays_out(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class _PackedNorm:
    """A residual sum and the norm after it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.known = type(module) is nn.LayerNorm and module.weight is not None
        if self.known:
            wide = module.weight.dtype == torch.float64
            self.gain = module.weight.detach() if wide else module.weight.detach().float()
            self.shift = None if module.bias is None else module.bias.detach().to(self.gain.dtype)

    def __call__(
        self, x: Float[Tensor, "t d"], added: Float[Tensor, "t d"] | None, *, total: bool = False
    ) -> tuple[Float[Tensor, "t d"], Any]:
        if self.known:
            normal, summed = add_norm(
                x, added, self.gain, self.shift, eps=self.module.eps, total=total and added is not None
            )
            return normal, x if added is None else summed
        summed = x if added is None else x + added
        return self.module(summed), summed


class _Watch:
    """Notices other weights, weights that were written to, and other modules. It is asked at every call."""

    def __init__(self, model: nn.Module) -> None:
        modules = [module for name, module in model.named_modules() if not name.startswith("executor")]
        self.weights: list[tuple[dict[str, Any], str, Tensor, int, int | None]] = [
            (module._parameters, name, weight, weight.data_ptr(), None if weight.is_inference() else weight._version)
            for module in modules
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        self.root, self.inside = model._modules, _children(model._modules)
        self.children = [(module._modules, dict(module._modules)) for module in modules[1:] if module._modules]
        self.linears = [module for module in modules if isinstance(module, nn.Linear)]

    def changed(self) -> bool:
        for held, name, weight, place, version in self.weights:
            if held.get(name) is not weight or weight.data_ptr() != place:
                return True
            if version is not None and weight._version != version:
                return True
        return self.rebuilt()

    def rebuilt(self) -> bool:
        """Whether a module was put in, replaced or taken out."""
        return _children(self.root) != self.inside or any(held != known for held, known in self.children)


def _children(held: dict[str, Any]) -> dict[str, Any]:
    return {name: child for name, child in held.items() if name != "executor"}
