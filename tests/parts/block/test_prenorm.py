"""The pre-norm block against torch's layer, with and without cross-attention."""

import pytest
import torch
from torch import nn

from formwright.contracts import Context
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.block.prenorm import PreNorm
from formwright.parts.feedforward.mlp import GELUMLP
from formwright.parts.mixing.multihead import MultiHeadAttention


def mixer():
    return MultiHeadAttention(dim=12, heads=3, attention=SoftmaxAttention())


def copied(block, theirs):
    """The block with the weights of a layer of torch's."""
    attentions = [(block.mixer, theirs.self_attn)] + ([(block.cross, theirs.multihead_attn)] if block.cross else [])
    with torch.no_grad():
        for ours, other in attentions:
            ours.query_key_value.weight.copy_(other.in_proj_weight)
            ours.query_key_value.bias.copy_(other.in_proj_bias)
            ours.out.load_state_dict(other.out_proj.state_dict())
    norms = [block.mixer_norm, *([block.cross_norm] if block.cross else []), block.feedforward_norm]
    for ours, other in zip(norms, (theirs.norm1, theirs.norm2, getattr(theirs, "norm3", None)), strict=False):
        ours.load_state_dict(other.state_dict())
    block.feedforward.up.load_state_dict(theirs.linear1.state_dict())
    block.feedforward.down.load_state_dict(theirs.linear2.state_dict())
    return block


def perturbed(layer):
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return layer.eval()


OPTIONS = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": PreNorm.final_norm}


@pytest.mark.reference
def test_an_encoder_block_equals_torch():
    theirs = perturbed(nn.TransformerEncoderLayer(12, 3, 20, **OPTIONS))
    block = copied(PreNorm(dim=12, mixer=mixer(), feedforward=GELUMLP(dim=12, hidden=20), norm=nn.LayerNorm), theirs)
    x = torch.randn(2, 7, 12, requires_grad=True)
    torch.testing.assert_close(block(x, Context.of(x)), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.reference
def test_a_decoder_block_with_a_memory_equals_torch():
    theirs = perturbed(nn.TransformerDecoderLayer(12, 3, 20, **OPTIONS))
    made = PreNorm(dim=12, mixer=mixer(), feedforward=GELUMLP(dim=12, hidden=20), cross=mixer(), norm=nn.LayerNorm)
    block = copied(made, theirs)
    x, memory = torch.randn(2, 7, 12), torch.randn(2, 5, 12)
    wanted = theirs(x, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(7), tgt_is_causal=True)
    got = block(x, Context.of(x, causal=True), Context(queries=7, keys=5, memory=memory))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_block_may_be_a_mixer_alone():
    block = PreNorm(dim=12, mixer=mixer(), feedforward=None, norm=nn.LayerNorm)
    x = torch.randn(2, 7, 12)
    mixed = block.mixer(block.mixer_norm(x) if PreNorm.final_norm else x, Context.of(x))
    wanted = x + mixed if PreNorm.final_norm else block.mixer_norm(x + mixed)
    torch.testing.assert_close(block(x, Context.of(x)), wanted)


def test_dropout_drops_what_a_sub_layer_adds_in_training_alone():
    block = PreNorm(dim=12, mixer=mixer(), feedforward=GELUMLP(dim=12, hidden=20), norm=nn.LayerNorm, dropout=0.5)
    x = torch.randn(2, 7, 12)
    torch.manual_seed(0)
    assert not torch.equal(block(x, Context.of(x)), block(x, Context.of(x)))
    block.eval()
    assert torch.equal(block(x, Context.of(x)), block(x, Context.of(x)))
