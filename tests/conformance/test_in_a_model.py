"""Every part inside a whole Hugging Face model: generate, save and load, gradients."""

import pytest
import torch

from formwright import catalog
from formwright.catalog.evidence import defined
from formwright.conformance.subject import enliven
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerForSequenceClassification,
)

SLOTS = {"mixer": "mixer", "attention": "mixer", "position": "position", "feedforward": "feedforward"} | {
    "norm": "norm",
    "block": "block",
    "init": "init",
}
PARTS = {p.key: p for p in catalog.provided() if p.slot in SLOTS and defined(p.module, p.attribute)}


def able(*capabilities):
    """Parts that declare all of these; what declares nothing (an initialisation scheme) is neutral."""
    chosen = [p for p in PARTS.values() if set(capabilities) <= set(p.capabilities) or p.slot == "init"]
    return pytest.mark.parametrize("part", chosen, ids=lambda p: p.key)


def config(part, architecture):
    return TransformerConfig(
        architecture=architecture,
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        **{"position": "none", "init": "fan-in", SLOTS[part.slot]: part.name},
    )


def built(cls, part, architecture):
    torch.manual_seed(0)
    return cls(config(part, architecture)).eval()


def prompts():
    """Three prompts of 3, 6 and 4 tokens, padded on the left, and their mask."""
    ids = torch.randint(1, 23, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) >= torch.tensor([[3], [0], [2]])).long()
    return ids * mask, mask


@able("causal", "cache", "padding")
def test_generate_with_a_cache_equals_without_and_the_row_alone(part):
    model, (ids, mask) = built(TransformerForCausalLM, part, "decoder"), prompts()
    for how in ({"num_beams": 1}, {"num_beams": 2}):
        facts = {"max_new_tokens": 4, "do_sample": False, **how}
        cached = model.generate(ids, attention_mask=mask, **facts)
        plain = model.generate(ids, attention_mask=mask, use_cache=False, **facts)
        assert torch.equal(cached, plain)
        for row, real in enumerate(mask.bool()):
            alone = model.generate(ids[row : row + 1, real], **facts)
            assert torch.equal(alone[0, -4:], cached[row, -4:])


@able("causal")
def test_a_causal_lm_comes_back_from_a_folder_and_trains_every_parameter(part, tmp_path):
    model = built(TransformerForCausalLM, part, "decoder")
    ids = torch.randint(1, 23, (3, 20), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    loaded, report = TransformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        # Weights from a file lie at other addresses, where a vectorised sum may start elsewhere.
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    enliven(model)  # a gain that starts at 0 hides what it multiplies
    model.train()(input_ids=ids, labels=ids).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@able("bidirectional", "padding")
def test_a_classifier_reads_a_padded_row_as_the_row_alone(part):
    model, (ids, mask) = built(TransformerForSequenceClassification, part, "encoder"), prompts()
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        for row, real in enumerate(mask.bool()):
            alone = model(input_ids=ids[row : row + 1, real]).logits
            torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)


@able("causal", "bidirectional", "padding", "cache")
def test_an_encoder_decoder_generates_the_same_with_and_without_a_cache(part):
    model, (ids, mask) = built(TransformerForConditionalGeneration, part, "encoder-decoder"), prompts()
    facts = {"max_new_tokens": 4, "do_sample": False}
    cached = model.generate(ids, attention_mask=mask, **facts)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **facts))
    for row, real in enumerate(mask.bool()):
        assert torch.equal(model.generate(ids[row : row + 1, real], **facts)[0], cached[row])
