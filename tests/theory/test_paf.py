"""How alike tokens are and how much attention adds: exact properties, then brute force and models of transformers."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.models.convert import from_transformers
from formwright.models.transformer import TransformerConfig, TransformerForSequenceClassification, TransformerModel
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.theory.paf import mean_cosine, measure, partition_isotropy, rank_one_residual, update_ratios

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}


def rows(n=9, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_identical_tokens_are_collapsed():
    x = rows(1).expand(5, -1)
    assert mean_cosine(x) == pytest.approx(1)
    assert rank_one_residual(x) == pytest.approx(0, abs=1e-7)
    assert partition_isotropy(100 * x) == pytest.approx(0, abs=1e-7)


def test_orthonormal_tokens_are_isotropic():
    x = torch.linalg.qr(rows(6, 6))[0]
    assert mean_cosine(x) == pytest.approx(0, abs=1e-9)
    assert mean_cosine(torch.cat([x, -x])) == pytest.approx(-1 / 11)  # each meets its opposite, and nothing else
    assert partition_isotropy(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(1)


def test_scale_changes_no_cosine_and_no_residual():
    assert mean_cosine(7 * rows()) == pytest.approx(mean_cosine(rows()))
    assert rank_one_residual(7 * rows()) == pytest.approx(rank_one_residual(rows()))


def test_one_token_has_nothing_to_be_like():
    for what in (mean_cosine, partition_isotropy, rank_one_residual):
        with pytest.raises(FormwrightError, match="two or more"):
            what(rows(1))


@pytest.mark.reference
def test_they_are_what_their_definitions_say_pair_by_pair():
    x = rows()
    pairs = [F.cosine_similarity(x[i], x[j], dim=0) for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(x) == pytest.approx(float(torch.stack(pairs).mean()))
    *_, directions = torch.linalg.svd(x)
    sums = [float((sign * x @ c).exp().sum()) for c in directions for sign in (1, -1)]
    assert partition_isotropy(x) == pytest.approx(min(sums) / max(sums))
    mean = torch.ones(9, 1, dtype=x.dtype) @ x.mean(0, keepdim=True)
    assert rank_one_residual(x) == pytest.approx(
        float(torch.linalg.matrix_norm(x - mean) / torch.linalg.matrix_norm(x))
    )
    torch.testing.assert_close(update_ratios(3 * x, x), torch.full((9,), 3.0, dtype=x.dtype))


def test_attention_alone_loses_rank_in_every_layer():
    torch.manual_seed(0)
    x, seen = torch.randn(1, 12, 16), []
    for _ in range(5):
        seen.append(rank_one_residual(x[0]))
        x = MultiHeadAttention(dim=16, heads=4, attention=SoftmaxAttention())(x, Context.of(x)).detach()
    assert all(later < before for before, later in itertools.pairwise(seen))
    assert seen[-1] < 1e-2


def ours(**fields):
    torch.manual_seed(0)
    return TransformerModel(TransformerConfig(vocab_size=30, **SMALL | fields)).eval()


IDS = torch.arange(1, 25).view(2, 12)


@pytest.mark.parametrize(
    ("block", "read"),
    [
        ("post", lambda _, x: x),
        ("paf", lambda _, x: x),
        ("pre", lambda block, x: block.mixer_norm(x)),
        ("paf(layout=pre)", lambda block, x: block.norm(x)),
    ],
)
@torch.no_grad()
def test_the_numbers_are_of_what_enters_and_leaves_every_layer(block, read):
    model = ours(block=block)
    found = measure(model, {"input_ids": IDS})
    states = model(IDS, output_hidden_states=True).hidden_states
    assert [row.layer for row in found] == [0, 1, 2]
    for row, out in zip(found[:2], states[1:3], strict=True):  # the last state went through a final norm
        assert row.cosine == pytest.approx(sum(map(mean_cosine, out)) / 2)
        assert row.residual == pytest.approx(sum(map(rank_one_residual, out)) / 2)
        assert row.partition == pytest.approx(partition_isotropy(out.flatten(0, 1)))
        assert row.ratios[0] < row.ratio
        assert row.ratios[0] < row.ratios[1] < row.ratios[2]
    first, x = model.encoder.layers[0].block, states[0]
    added = first.mixer(read(first, x), Context.of(x))
    assert found[0].ratio == pytest.approx(float(update_ratios(added.flatten(0, 1), x.flatten(0, 1)).mean()))


@torch.no_grad()
def test_without_feed_forward_layers_only_attention_is_left():
    model = ours(block="pre")
    found = measure(model, {"input_ids": IDS}, feedforward=False)
    for layer in model.encoder.layers:
        layer.block.feedforward = None
    assert [row.cosine for row in found] == [row.cosine for row in measure(model, {"input_ids": IDS})]


def test_pads_and_named_tokens_are_not_counted():
    model = ours(block="post")
    short = measure(model, {"input_ids": IDS[:, :8]})
    mask = (torch.arange(12) < 8).long().expand(2, -1)
    padded = measure(model, {"input_ids": IDS, "attention_mask": mask})
    for one, other in zip(short, padded, strict=True):
        assert one.cosine == pytest.approx(other.cosine, abs=1e-5)
        assert one.ratio == pytest.approx(other.ratio, abs=1e-5)
    fewer = measure(model, {"input_ids": IDS}, without=[1, 13])
    assert fewer[0].cosine != measure(model, {"input_ids": IDS})[0].cosine
    with pytest.raises(FormwrightError, match="no input_ids"):
        measure(model, {"inputs_embeds": torch.randn(2, 5, 16)}, without=[1])


def test_the_model_is_left_as_it_was():
    model = ours().train()
    measure(model, {"input_ids": IDS}, feedforward=False)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_classifier_of_ours_and_a_mixer_without_scores_are_measured():
    model = TransformerForSequenceClassification(TransformerConfig(vocab_size=30, mixer="aft-simple", **SMALL))
    assert len(measure(model, {"input_ids": IDS})) == 3


@pytest.mark.reference
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (BertModel, BertConfig(vocab_size=30, **SMALL)),
        (GPT2Model, GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=4)),
    ],
    ids=["bert", "gpt2"],
)
@pytest.mark.parametrize("feedforward", [True, False])
def test_a_model_of_transformers_gives_the_numbers_of_ours_with_its_weights(kind, config, feedforward):
    torch.manual_seed(1)
    theirs = kind(config).eval()
    mine = from_transformers(theirs)
    batch = {"input_ids": IDS}
    for a, b in zip(*(measure(m, batch, feedforward=feedforward) for m in (theirs, mine)), strict=True):
        assert a.ratio == pytest.approx(b.ratio, rel=1e-4)
        for name in ("cosine", "centred", "residual", "partition"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3, abs=1e-5)


def test_other_families_too():
    torch.manual_seed(0)
    albert = AlbertModel(AlbertConfig(vocab_size=30, embedding_size=8, **SMALL))
    assert [row.layer for row in measure(albert, {"input_ids": IDS})] == [0, 1, 2]  # one layer, three times
    vit = ViTModel(ViTConfig(image_size=16, patch_size=4, **SMALL))
    assert len(measure(vit, {"pixel_values": torch.randn(2, 3, 16, 16)})) == 3
    t5 = T5Model(T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=4))
    assert len(measure(t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]})) == 2
