"""What an encoder family does before and after its layers, on packed tokens.

embed      real tokens of a batch -> (t, d), at their places in the text
positions  what attention knows of places: MPNet's bias, ModernBERT's rotation and windows
finish     (b, n, d) -> the output of the family's own forward
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ModelOutput

from formwright.compress.runtime.packed import Positions

COUNTED = ("roberta", "mpnet")  # positions count what is no pad token, from the pad's id + 1
RELATIVE = ("mpnet", "modernbert")  # what attention knows of places is their distance: a text must have no holes
TYPED = ("bert", "roberta", "electra", "albert")


def allows_holes(family: str) -> bool:
    """Whether texts may have pads between real tokens."""
    return family not in RELATIVE


def embed(base: PreTrainedModel, family: str, given: dict[str, Any], places: Int[Tensor, " t"]) -> Float[Tensor, "t d"]:
    """The embeddings of the tokens at these places of the flattened batch alone, as they enter the first layer."""
    ids = given["input_ids"]

    def packed(values: Tensor) -> Tensor:  # (b, n) -> (1, t)
        return values.reshape(-1)[places][None]

    tokens = {"input_ids": packed(ids)}
    if family != "modernbert":
        tokens["position_ids"] = packed(_places(base, family, ids, given.get("position_ids")))
    if family in TYPED:
        types = given.get("token_type_ids")
        tokens["token_type_ids"] = torch.zeros_like(tokens["input_ids"]) if types is None else packed(types)
    hidden = base.embeddings(**tokens)[0]
    project = getattr(base, "embeddings_project", None) or getattr(
        getattr(base, "encoder", None), "embedding_hidden_mapping_in", None
    )
    return hidden if project is None else project(hidden)


def _places(
    base: PreTrainedModel, family: str, ids: Int[Tensor, "b n"], given: Int[Tensor, "#b n"] | None
) -> Int[Tensor, "b n"]:
    if given is not None:
        return given.expand_as(ids)
    if family in COUNTED:
        pad = base.embeddings.padding_idx
        known = ids.ne(pad).long()
        return known.cumsum(1) * known + pad
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def positions(base: PreTrainedModel, family: str, longest: int) -> list[Positions] | None:
    """For each layer; none where the family adds positions to its embeddings alone."""
    place = torch.arange(longest, device=base.device)[None]
    if family == "mpnet":
        empty = torch.empty(1, longest, 0, device=base.device)
        bias = base.encoder.compute_position_bias(empty)[0].detach().float().contiguous()
        return [Positions(bias=bias)] * len(base.encoder.layer)
    if family == "modernbert":
        wide = torch.empty(0, device=base.device, dtype=torch.promote_types(base.dtype, torch.float32))
        kinds = {
            kind: tuple(x[0].contiguous() for x in base.rotary_emb(wide, place, kind))
            for kind in set(base.config.layer_types)
        }
        return [
            Positions(
                rotation=kinds[layer.attention_type],
                window=base.config.sliding_window if layer.attn.sliding_window is not None else None,
            )
            for layer in base.layers
        ]
    return None


def finish(base: PreTrainedModel, states: Float[Tensor, "b n d"]) -> ModelOutput:
    """What the family's own forward gives for these states."""
    if not hasattr(base, "pooler"):
        return BaseModelOutput(last_hidden_state=states)
    pooled = None
    if base.pooler is not None:
        pooled = base.pooler(states[:, 0] if hasattr(base, "pooler_activation") else states)
        if hasattr(base, "pooler_activation"):
            pooled = base.pooler_activation(pooled)
    return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
