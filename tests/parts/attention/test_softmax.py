"""Softmax attention: the fused path against its own weights and against torch."""

import pytest
import torch
from torch import nn

from formwright.contracts import Context, Mask, Toeplitz
from formwright.errors import FormwrightError
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.mixing.multihead import MultiHeadAttention


def qkv(heads=4, groups=4, queries=7, keys=7, width=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, queries, width), (2, groups, keys, width), (2, groups, keys, 5)]
    return [torch.randn(*shape, generator=generator, dtype=torch.double) for shape in shapes]


def padding(keys, left=False):
    real = torch.arange(keys) < torch.tensor([[keys], [keys - 2]])
    return real.flip(1) if left else real


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [None, "right", "left"])
@pytest.mark.parametrize("bias", [None, "toeplitz", "dense"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 9), (1, 9)])
def test_the_fused_path_equals_the_weights_times_the_values(groups, causal, padded, bias, queries, keys):
    q, k, v = qkv(groups=groups, queries=queries, keys=keys)
    mask = Mask(
        queries=queries, keys=keys, causal=causal, padding=None if padded is None else padding(keys, padded == "left")
    )
    diagonals = torch.randn(4, queries + keys - 1, dtype=torch.double)
    bias = {"toeplitz": Toeplitz(diagonals, keys), "dense": Toeplitz(diagonals, keys).dense()[None]}.get(bias)
    attention = SoftmaxAttention()
    wanted = attention.weights(q, k, mask=mask, bias=bias) @ v.repeat_interleave(4 // groups, dim=1)
    torch.testing.assert_close(attention(q, k, v, mask=mask, bias=bias), wanted)


def test_a_query_that_sees_nothing_gets_nothing_and_no_gradient_is_lost():
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    mask = Mask(queries=7, keys=7, causal=True, padding=padding(7, left=True))
    out = SoftmaxAttention()(q, k, v, mask=mask)
    assert not out[1, :, :2].any()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (q, k, v))


def test_a_scale_multiplies_the_weights():
    q, k, v = qkv()
    ones, mask = torch.ones(1, 4, 7, 7, dtype=torch.double), Mask(queries=7, keys=7)
    attention = SoftmaxAttention()
    torch.testing.assert_close(attention(q, k, v, mask=mask, scale=ones), attention(q, k, v, mask=mask))
    torch.testing.assert_close(attention(q, k, v, mask=mask, scale=3 * ones), 3 * attention(q, k, v, mask=mask))


def test_dropout_drops_in_training_alone():
    q, k, v = qkv()
    attention, mask = SoftmaxAttention(dropout=0.5), Mask(queries=7, keys=7)
    torch.manual_seed(0)
    assert not torch.equal(attention(q, k, v, mask=mask), attention(q, k, v, mask=mask))
    attention.eval()
    assert torch.equal(attention(q, k, v, mask=mask), SoftmaxAttention()(q, k, v, mask=mask))


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_impossible_dropout_is_refused(dropout):
    with pytest.raises(FormwrightError, match="probability"):
        SoftmaxAttention(dropout=dropout)


@pytest.mark.reference
@pytest.mark.parametrize("causal", [False, True])
def test_the_mixer_equals_torch(causal):
    ours = MultiHeadAttention(dim=12, heads=3, attention=SoftmaxAttention())
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        ours.query_key_value.weight.copy_(theirs.in_proj_weight)
        ours.query_key_value.bias.copy_(torch.randn(36))
        theirs.in_proj_bias.copy_(ours.query_key_value.bias)
        ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, real = torch.randn(2, 7, 12), padding(7)
    hidden = torch.ones(7, 7).triu(1).bool() if causal else None
    wanted, weights = theirs(x, x, x, key_padding_mask=~real, attn_mask=hidden, average_attn_weights=False)
    context = Context.of(x, padding=real, causal=causal, attentions=[])
    torch.testing.assert_close(ours(x, context), wanted)
    torch.testing.assert_close(context.attentions[0], weights)


@pytest.mark.reference
def test_cross_attention_equals_torch():
    ours = MultiHeadAttention(dim=12, heads=3, attention=SoftmaxAttention())
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.query_key_value.weight), theirs.in_proj_bias.copy_(ours.query_key_value.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, memory, real = torch.randn(2, 4, 12), torch.randn(2, 7, 12), padding(7)
    context = Context(queries=4, keys=7, memory=memory, padding=real)
    torch.testing.assert_close(ours(x, context), theirs(x, memory, memory, key_padding_mask=~real)[0])
