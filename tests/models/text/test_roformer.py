"""RoFormer from our parts computes what transformers' RoFormer computes with the same weights."""

import pytest
import torch
from transformers import RoFormerConfig, RoFormerForMaskedLM, RoFormerModel

from formwright.errors import FormwrightError
from formwright.models.convert import from_transformers
from formwright.models.text.roformer import roformer_config
from formwright.models.transformer import TransformerForMaskedLM

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def perturbed(model):
    """Every weight random, norms and biases included, so that a misplaced one shows; the table of angles as it is."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def ids(rows=3, tokens=63):
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.reference
@pytest.mark.parametrize("kind", [RoFormerModel, RoFormerForMaskedLM])
def test_equal_to_transformers_with_padding_on_either_side_and_segments(kind):
    theirs = perturbed(kind(RoFormerConfig(**SIZES)))
    mask = torch.ones(3, 63, dtype=torch.long)
    mask[1, 40:] = 0
    mask[2, :7] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask, "token_type_ids": (torch.arange(63) > 9).long().expand(3, -1)}
    ours, wanted = (model(**inputs)[0] for model in (from_transformers(theirs), theirs))
    torch.testing.assert_close(ours[mask.bool()], wanted[mask.bool()], atol=2e-5, rtol=1e-5)


@pytest.mark.reference
def test_gradients_equal_transformers():
    theirs = perturbed(RoFormerForMaskedLM(RoFormerConfig(**SIZES)))
    ours = from_transformers(theirs)
    for model in (ours, theirs):
        model(input_ids=ids(), labels=ids()).loss.backward()
    block, layer = ours.model.encoder.layers[0].block, theirs.roformer.encoder.layer[0]
    query_key_value = [getattr(layer.attention.self, name).weight.grad for name in ("query", "key", "value")]
    torch.testing.assert_close(
        block.mixer.query_key_value.weight.grad, torch.cat(query_key_value), atol=1e-6, rtol=1e-3
    )


def test_no_text_is_too_long_and_no_place_is_special():
    model = TransformerForMaskedLM(roformer_config(**SIZES)).eval()
    row = ids(1, 200)
    whole = model(input_ids=row).logits
    moved = model(input_ids=row, position_ids=torch.arange(5000, 5200)[None]).logits
    torch.testing.assert_close(moved, whole, atol=1e-3, rtol=1e-3)  # angles of 5200 in fp32


@pytest.mark.parametrize(
    "change", [{"rotary_value": True}, {"embedding_size": 16}, {"is_decoder": True}, {"hidden_act": "relu"}]
)
def test_what_would_change_the_function_is_refused(change):
    with pytest.raises(FormwrightError, match="RoFormer"):
        from_transformers(RoFormerModel(RoFormerConfig(**SIZES | change)))
