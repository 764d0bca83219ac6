"""DeepScaleLM's blocks: the weighted sums by hand, and torch's layer with the weights folded in."""

import math

import pytest
import torch
from torch import nn

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.block.deepscalelm import DeepScaleLMPost, DeepScaleLMPre
from formwright.parts.feedforward.mlp import GELUMLP
from formwright.parts.mixing.multihead import MultiHeadAttention
from formwright.parts.norm.layernorm import LayerNorm

SKIP, BRANCH = math.sqrt(1 - 1 / 6), math.sqrt(1 / 6)


def mixer():
    return MultiHeadAttention(dim=12, heads=3, attention=SoftmaxAttention())


def block(kind, *, layers=6, cross=False, norm=lambda width: LayerNorm(dim=width), dropout=0.0):
    torch.manual_seed(0)
    return kind(
        dim=12,
        mixer=mixer(),
        feedforward=GELUMLP(dim=12, hidden=20),
        cross=mixer() if cross else None,
        norm=norm,
        layers=layers,
        dropout=dropout,
    )


def test_pre_norm_by_hand():
    made, x, memory = block(DeepScaleLMPre, cross=True), torch.randn(2, 5, 12), torch.randn(2, 3, 12)
    context, cross = Context.of(x), Context(queries=5, keys=3, memory=memory)
    y = SKIP * x + BRANCH * made.mixer(made.mixer_norm(x), context)
    y = SKIP * y + BRANCH * made.cross(made.cross_norm(y), cross)
    y = SKIP * y + BRANCH * made.feedforward(made.feedforward_norm(y))
    torch.testing.assert_close(made(x, context, cross), y)


@pytest.mark.parametrize("crossed", [False, True])
def test_post_norm_by_hand(crossed):
    made, x, memory = block(DeepScaleLMPost, cross=crossed), torch.randn(2, 5, 12), torch.randn(2, 3, 12)
    context, cross = Context.of(x), Context(queries=5, keys=3, memory=memory) if crossed else None
    y = made.mixer_norm(SKIP * x + BRANCH * made.mixer(x, context))
    if crossed:
        y = made.cross_norm(SKIP * y + BRANCH * made.cross(y, cross))
    y = made.feedforward_norm(SKIP * y + BRANCH * made.feedforward(y))
    torch.testing.assert_close(made(x, context, cross), y)


@pytest.mark.reference
def test_post_norm_is_torchs_layer_with_branch_over_skip_in_its_last_matrices():
    """A norm does not see by what both terms are multiplied."""
    made = block(DeepScaleLMPost, norm=lambda width: LayerNorm(dim=width, eps=1e-12))
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True).eval()
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(made.mixer.query_key_value.weight)
        theirs.self_attn.in_proj_bias.copy_(made.mixer.query_key_value.bias)
        theirs.linear1.load_state_dict(made.feedforward.up.state_dict())
        for folded, plain in ((theirs.self_attn.out_proj, made.mixer.out), (theirs.linear2, made.feedforward.down)):
            folded.weight.copy_(BRANCH / SKIP * plain.weight)
            folded.bias.copy_(BRANCH / SKIP * plain.bias)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(made.eval()(x, Context.of(x)), theirs(x))


@pytest.mark.parametrize("kind", [DeepScaleLMPre, DeepScaleLMPost])
def test_dropout_falls_on_the_branch_alone(kind):
    made = block(kind, dropout=1 - 1e-9, norm=lambda _: nn.Identity())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(made.train()(x, Context.of(x)), SKIP**2 * x)


@pytest.mark.parametrize("kind", [DeepScaleLMPre, DeepScaleLMPost])
def test_one_layer_is_refused(kind):
    with pytest.raises(FormwrightError, match="two layers or more"):
        block(kind, layers=1)
