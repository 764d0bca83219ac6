"""Trained models of transformers, rebuilt from our parts, compute the same."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RoFormerConfig,
    RoFormerForMaskedLM,
)

from formwright.errors import FormwrightError
from formwright.models.convert import from_transformers

BERT = BertConfig(
    vocab_size=99,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=64,
    num_labels=3,
)
GPT2 = GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)


def perturbed(model):
    """Every weight random, norms and biases included, so that a misplaced one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def ids(rows=2, tokens=11):
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.reference
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_bert_computes_the_same_with_padding_and_segments(kind):
    theirs = perturbed(kind(BERT))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask, "token_type_ids": (torch.arange(11) > 4).long().expand(2, -1)}
    ours, wanted = from_transformers(theirs)(**inputs), theirs(**inputs)
    if kind is BertForSequenceClassification:
        torch.testing.assert_close(ours.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    else:
        ours, wanted = (getattr(out, "logits", None) if kind is not BertModel else out[0] for out in (ours, wanted))
        torch.testing.assert_close(ours[mask.bool()], wanted[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("kind", [GPT2Model, GPT2LMHeadModel])
def test_gpt2_computes_the_same(kind):
    theirs = perturbed(kind(GPT2))
    ours, wanted = from_transformers(theirs)(ids())[0], theirs(ids())[0]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.reference
def test_gpt2_generates_the_same_ids_from_left_padded_prompts():
    theirs = perturbed(GPT2LMHeadModel(GPT2))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :5] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(from_transformers(theirs).generate(ids(), **asked), theirs.generate(ids(), **asked))


def test_the_loss_is_the_same():
    theirs = perturbed(GPT2LMHeadModel(GPT2))
    ours = from_transformers(theirs)
    torch.testing.assert_close(ours(ids(), labels=ids()).loss, theirs(ids(), labels=ids()).loss)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
            "bert",
        ),
        (lambda: GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, activation_function="silu")), "silu"),
        (lambda: GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, scale_attn_by_inverse_layer_idx=True)), "scales"),
    ],
)
def test_what_has_no_counterpart_is_refused(model, says):
    with pytest.raises(FormwrightError, match=says):
        from_transformers(model())


@pytest.mark.reference
@pytest.mark.parametrize(("family", "kind"), [(BertConfig, BertForMaskedLM), (RoFormerConfig, RoFormerForMaskedLM)])
def test_a_language_head_with_a_matrix_of_its_own_keeps_it(family, kind):
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    theirs = kind(family(**sizes, intermediate_size=24, tie_word_embeddings=False)).eval()
    torch.testing.assert_close(from_transformers(theirs)(ids() % 40).logits, theirs(ids() % 40).logits)


@pytest.mark.reference
def test_weights_in_float64_keep_their_digits():
    theirs = perturbed(BertModel(BERT).double())
    torch.testing.assert_close(from_transformers(theirs)(ids())[0], theirs(ids())[0], atol=1e-12, rtol=1e-12)
