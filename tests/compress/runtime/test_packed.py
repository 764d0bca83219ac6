"""Packed layers: equal to the padded model, and what a policy drops."""

import pytest
import torch
from transformers import AutoModel, BertConfig, ElectraConfig, ModernBertConfig, RobertaConfig, ViTConfig

from formwright.compress.runtime.packed import PackedEncoder, Policy, packed_encoder
from formwright.errors import FormwrightError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}
LENGTHS = [5, 1, 9]


def tiny(config=BertConfig):
    torch.manual_seed(0)
    return AutoModel.from_config(config(**SIZES)).eval().double()


def packed(model):
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(3, 50, mask.shape).masked_fill(~mask, model.config.pad_token_id)
    states = model(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    return states[0][mask], states[-1][mask], torch.tensor([0, 5, 6, 15])


@pytest.mark.reference
@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, ElectraConfig])
@torch.no_grad()
def test_equals_the_padded_model_on_real_tokens(config):
    model = tiny(config)
    hidden, expected, border = packed(model)
    assert torch.allclose(PackedEncoder(model).run(hidden, border), expected, atol=1e-12)


@torch.no_grad()
def test_an_empty_sequence_changes_nothing():
    model = tiny()
    hidden, expected, _ = packed(model)
    assert torch.allclose(PackedEncoder(model).run(hidden, torch.tensor([0, 0, 5, 6, 6, 15])), expected, atol=1e-12)


class Drop(Policy):
    weighs = True

    def after_attention(self, layer, hidden, cu_seqlens, received):
        assert len(hidden) == cu_seqlens[-1]
        assert torch.allclose(received.sum(), torch.tensor(3.0 - layer).to(received.dtype))
        return torch.arange(len(hidden)) % 2 == 0 if layer == 1 else None

    def after_layer(self, layer, hidden, cu_seqlens):
        assert len(hidden) == cu_seqlens[-1]
        return torch.tensor([True, False, True]) if layer == 0 else None


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_policy_drops_a_sequence_and_then_tokens(dtype, close):
    model = tiny().to(dtype)
    hidden, expected, border = packed(model)
    left = PackedEncoder(model).run(hidden, border, Drop())
    assert torch.allclose(left, torch.cat([expected[:5], expected[6:]])[::2], atol=close)


@torch.no_grad()
def test_weights_written_to_and_modules_replaced_are_noticed():
    model = tiny()
    hidden, _, border = packed(model)
    engine = packed_encoder(model)
    assert engine is packed_encoder(model)
    before = engine.run(hidden, border)
    model.encoder.layer[0].output.dense.weight.mul_(2)
    written = engine.run(hidden, border)
    model.encoder.layer[1].output.dense = torch.nn.Linear(24, 16).double()
    replaced = engine.run(hidden, border)
    assert not torch.allclose(before, written)
    assert not torch.allclose(written, replaced)


def test_tokens_are_dropped_only_where_norms_follow_the_residual():
    config = ModernBertConfig(**SIZES, pad_token_id=0, cls_token_id=1, bos_token_id=None, eos_token_id=None)
    with pytest.raises(FormwrightError, match="normalise after"):
        PackedEncoder(AutoModel.from_config(config)).run(torch.zeros(3, 16), torch.tensor([0, 3]), Drop())


def test_an_unknown_family_is_refused():
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16)
    with pytest.raises(FormwrightError, match="vit"):
        PackedEncoder(AutoModel.from_config(config))
