"""An encoder that never computes on padding.

Paper    Zhai et al.: ByteTransformer (IPDPS 2023), arXiv:2210.03052.
Idea     The real tokens of a padded batch are packed into one matrix once, before the first layer; every layer runs on
         them alone, attention inside each text; after the last layer they go back to their places.

    word_idx    places of real tokens in the flattened batch, (t,), from the mask; any mask of zeros and ones
    cu_seqlens  exclusive cumulative sum of the lengths, (b + 1,)
    cost        of the layers' linear parts t instead of b n, of attention the sum of squared lengths instead of b n^2

Differs  Padding places come out as zeros (the padded model leaves there what no one should read). The paper's kernels
         are for GPUs, ours for CPUs (packed.py). With precision="bfloat16" weights and products are bfloat16, which is
         no longer exact.

The model's own forward takes over where gradients, hidden states, attentions or another than a 2-dimensional mask are
asked for, where a hook waits for a linear layer, and for a text with holes in a family whose attention knows distances
(MPNet, ModernBERT).
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from formwright.compress.modifier import Modifier
from formwright.compress.runtime import encoders
from formwright.compress.runtime.packed import PackedEncoder, packed_encoder, sums
from formwright.compress.structure import PREFIX, Executor, attach
from formwright.errors import FormwrightError

EMBEDDED = ("input_ids", "token_type_ids", "position_ids")
OURS = (*EMBEDDED, "attention_mask", "return_dict", "labels")


class PaddingFree(Executor):
    """Runs the layers on real tokens alone."""

    kind: ClassVar[str] = "padding-free"

    def structure(self) -> dict[str, Any]:
        return {}

    @classmethod
    def rebuild(cls, old: object, **structure: Any) -> "PaddingFree":
        del old, structure
        return cls()

    def run(self, model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's output; padding places of its hidden states are zero."""
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        more = given.pop("kwargs", {})
        given = {name: value for name, value in {**given, **more}.items() if name != "self"}
        if not self.serves(model, given):
            return forward(*args, **kwargs)
        base = model.base_model
        encoded = self.encode(base, given)
        if base is model:
            tuple_asked = given.get("return_dict") is False or not getattr(model.config, "return_dict", True)
            return encoded.to_tuple() if tuple_asked else encoded
        # The head is the model's own: it calls its encoder, which for this one call has the answer ready.
        base.forward = lambda *_, **__: encoded
        try:
            return forward(*args, **kwargs)
        finally:
            del base.forward

    def serves(self, model: PreTrainedModel, given: dict[str, Any]) -> bool:
        """Whether this call can be run here."""
        asked = {name for name, value in given.items() if value is not None and value is not False}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        config = model.config
        return (
            asked <= set(OURS)
            and isinstance(ids, Tensor)
            and ids.ndim == 2
            and (mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape))
            and not torch.is_grad_enabled()
            and not model.training
            and not getattr(config, "output_hidden_states", False)
            and not getattr(config, "output_attentions", False)
            and not torch.compiler.is_compiling()
            and not packed_encoder(model.base_model).hooked()
            and (mask is None or encoders.allows_holes(family_of(model)) or not has_holes(mask.bool()))
        )

    def encode(self, base: PreTrainedModel, given: dict[str, Any]) -> ModelOutput:
        """Embed real tokens, run the layers, unpack, pool."""
        engine, family, ids, mask = (
            packed_encoder(base),
            family_of(base),
            given["input_ids"],
            given.get("attention_mask"),
        )
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        places, lengths = word_places(real), real.sum(1).cpu()
        hidden = encoders.embed(base, family, given, places)
        longest = int(lengths.max()) if len(lengths) else 0
        packed = engine.run(hidden, sums(lengths), positions=encoders.positions(base, family, longest))
        return encoders.finish(base, unpack(packed, places, real.shape))


def family_of(model: PreTrainedModel) -> str:
    """Of a changed model too."""
    return model.config.model_type.removeprefix(PREFIX)


def has_holes(real: Bool[Tensor, "b n"]) -> bool:
    """Whether real tokens of a text stand apart."""
    return bool((real.long().diff(dim=1) != 0).sum(1).gt(1 + (~real[:, 0]).long()).any())


def word_places(real: Bool[Tensor, "b n"]) -> Int[Tensor, " t"]:
    """Where in the flattened batch the real tokens stand."""
    return real.flatten().nonzero().squeeze(1)


def unpack(
    packed: Float[Tensor, "t d"], places: Int[Tensor, " t"], shape: tuple[int, int] | torch.Size
) -> Float[Tensor, "b n d"]:
    """Tokens back in their places, zeros elsewhere."""
    whole = packed.new_zeros(shape[0] * shape[1], packed.shape[-1])
    return whole.index_copy_(0, places, packed).view(*shape, packed.shape[-1])


class PaddingFreeExecution(Modifier):
    """Let an encoder compute on real tokens alone.

    Args:
        precision: "float32" is exact; "bfloat16" turns weights and products to bfloat16, faster where the processor
            has instructions for it.
    """

    exact: ClassVar[bool] = True

    def __init__(self, *, precision: Literal["float32", "bfloat16"] = "float32") -> None:
        self.precision = precision

    def check(self, model: PreTrainedModel) -> None:
        PackedEncoder(model.base_model)

    def apply(self, model: PreTrainedModel) -> None:
        padding_free(model, precision=self.precision)


def padding_free(model: nn.Module, *, precision: Literal["float32", "bfloat16"] = "float32") -> nn.Module:
    """Let a model compute on real tokens alone, in place.

    Args:
        model: a transformers model, or a module around one, such as a SentenceTransformer.
        precision: see PaddingFreeExecution.

    Raises:
        FormwrightError: no transformers model or several, a family this cannot run, or a model that another executor
            runs.
    """
    encoder = model if isinstance(model, PreTrainedModel) else _only_model(model)
    PackedEncoder(encoder.base_model)
    attach(encoder, PaddingFree())
    if precision == "bfloat16":
        encoder.to(torch.bfloat16)
    encoder.eval()
    return model


def _only_model(module: nn.Module) -> PreTrainedModel:
    found = [one for one in module.modules() if isinstance(one, PreTrainedModel)]
    outer = [one for one in found if not any(one in other.modules() for other in found if other is not one)]
    if len(outer) != 1:
        raise FormwrightError(
            f"{type(module).__name__} holds {len(outer) or 'no'} transformers models: hand over the one to run."
        )
    return outer[0]
