"""PAF: exact properties, then independent implementations."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPTNeoXConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from formwright.build import build
from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForConditionalGeneration, TransformerModel
from formwright.parts.attention.softmax import SoftmaxAttention
from formwright.parts.block.paf import PAF
from formwright.parts.block.prenorm import PreNorm
from formwright.parts.feedforward.mlp import GELUMLP
from formwright.parts.mixing.multihead import MultiHeadAttention

D, H, F = 16, 4, 40
LAYOUTS = ("post", "pre", "pre-two")


def norm(width):
    made = nn.LayerNorm(width)
    nn.init.normal_(made.weight, 1, 0.2)
    nn.init.normal_(made.bias, 0, 0.2)
    return made


def parts(seed=0):
    torch.manual_seed(seed)
    attention = MultiHeadAttention(dim=D, heads=H, attention=SoftmaxAttention())
    return {"dim": D, "mixer": attention, "feedforward": GELUMLP(dim=D, hidden=F), "norm": norm}


def tokens(n=7, seed=1):
    return torch.randn(2, n, D, generator=torch.Generator().manual_seed(seed))


def silent(module):
    """The sub-layer adds nothing."""
    with torch.no_grad():
        last = module.out if hasattr(module, "out") else module.down
        last.weight.zero_()
        last.bias.zero_()


def test_without_attention_it_is_the_norm_of_input_and_feed_forward():
    block, x = PAF(**parts()), tokens()
    silent(block.mixer)
    torch.testing.assert_close(block(x, Context.of(x)), block.norm(x + block.feedforward(x)))


def test_without_feed_forward_it_is_the_norm_of_input_and_attention():
    x = tokens()
    block = PAF(**parts())
    silent(block.feedforward)
    expected = block.norm(x + block.mixer(x, Context.of(x)))
    torch.testing.assert_close(block(x, Context.of(x)), expected)
    alone = PAF(**parts() | {"feedforward": None})
    alone.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("feedforward")})
    torch.testing.assert_close(alone(x, Context.of(x)), expected)


def test_where_attention_adds_nothing_parallel_and_serial_pre_norm_are_one():
    serial, parallel, x = PreNorm(**parts()), PAF(**parts(), layout="pre-two"), tokens()
    silent(serial.mixer)
    parallel.mixer.load_state_dict(serial.mixer.state_dict())
    parallel.feedforward.load_state_dict(serial.feedforward.state_dict())
    parallel.feedforward_norm.load_state_dict(serial.feedforward_norm.state_dict())
    torch.testing.assert_close(parallel(x, Context.of(x)), serial(x, Context.of(x)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_feed_forward_layer_never_reads_what_attention_gave(layout):
    block, x = PAF(**parts(), layout=layout), tokens()
    read = []
    block.feedforward.register_forward_pre_hook(lambda _module, given: read.append(given[0]))
    block(x, Context.of(x))
    with torch.no_grad():
        block.mixer.out.weight.mul_(5)
    block(x, Context.of(x))
    assert torch.equal(*read)


def test_one_norm_with_the_same_weights_twice_is_the_layout_with_two():
    one, two, x = PAF(**parts(), layout="pre"), PAF(**parts(), layout="pre-two"), tokens()
    two.load_state_dict(one.state_dict() | {f"feedforward_norm.{k}": v for k, v in one.norm.state_dict().items()})
    torch.testing.assert_close(one(x, Context.of(x)), two(x, Context.of(x)))


def test_a_layer_has_one_norm_fewer_than_in_series_and_pre_two_as_many():
    def count(block):
        return TransformerModel(TransformerConfig(hidden_size=D, num_hidden_layers=3, block=block)).num_parameters()

    assert count("post") - count("paf") == 3 * 2 * D
    assert count("pre") - count("paf(layout=pre)") == 3 * 2 * D
    assert count("pre") == count("paf(layout=pre-two)")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_ends_with_a_norm_where_the_layers_do_not(layout):
    model = TransformerModel(TransformerConfig(block=f"paf(layout={layout})"))
    assert (model.encoder.norm is None) == (layout == "post")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_decoder_reads_the_memory_and_every_parameter_learns(layout):
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture="encoder-decoder", vocab_size=20, block=f"paf(layout={layout})", decoder_start_token_id=1
    )
    model = TransformerForConditionalGeneration(config)
    ids, other = torch.arange(2, 9)[None], torch.arange(3, 10)[None]
    labels = torch.arange(5, 11)[None]
    model(input_ids=ids, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert not torch.equal(model(ids, labels=labels).logits, model(other, labels=labels).logits)


def test_all_that_is_added_is_dropped_alike():
    block, x = PAF(**parts(), layout="pre", dropout=0.999).train(), tokens()
    torch.manual_seed(0)
    changed = (block(x, Context.of(x)) != x).double().mean()
    assert changed < 0.02


def test_another_layout_is_refused():
    with pytest.raises(FormwrightError, match="'post', 'pre' or 'pre-two'"):
        build("block", "paf(layout=sandwich)", **parts())


@pytest.mark.reference
@pytest.mark.parametrize("layout", ["pre", "pre-two"])
@torch.no_grad()
def test_pre_norm_equals_gpt_neox(layout):
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        hidden_size=D, num_attention_heads=H, intermediate_size=F, use_parallel_residual=True, hidden_act="gelu"
    )
    config._attn_implementation = "eager"
    theirs, block, x = GPTNeoXLayer(config, layer_idx=0).eval(), PAF(**parts(), layout=layout).eval(), tokens()
    fused = theirs.attention.query_key_value
    for ours, given in (
        (block.mixer.query_key_value.weight, fused.weight),
        (block.mixer.query_key_value.bias, fused.bias),
    ):
        ours.copy_(given.unflatten(0, (H, 3, D // H)).transpose(0, 1).flatten(0, 2))  # theirs: head by head
    block.mixer.out.load_state_dict(theirs.attention.dense.state_dict())
    block.feedforward.up.load_state_dict(theirs.mlp.dense_h_to_4h.state_dict())
    block.feedforward.down.load_state_dict(theirs.mlp.dense_4h_to_h.state_dict())
    theirs.input_layernorm.load_state_dict(block.norm.state_dict())
    second = block.norm if layout == "pre" else block.feedforward_norm
    theirs.post_attention_layernorm.load_state_dict(second.state_dict())
    still = torch.ones(1, x.shape[1], D // H), torch.zeros(1, x.shape[1], D // H)  # positions turn nothing
    hidden = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=hidden, position_embeddings=still)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(block(x, Context.of(x, causal=True)), expected)


@pytest.mark.reference
@torch.no_grad()
def test_post_norm_equals_the_modules_of_bert_put_side_by_side():
    """As the release rewires RoBERTa: both sides read the layer's input, and the norm behind the feed-forward stays."""
    torch.manual_seed(4)
    config = BertConfig(hidden_size=D, num_attention_heads=H, intermediate_size=F)
    config._attn_implementation = "eager"
    theirs, block, x = BertLayer(config).eval(), PAF(**parts()).eval(), tokens()
    attention = theirs.attention.self
    for name in ("weight", "bias"):
        rows = [getattr(one, name) for one in (attention.query, attention.key, attention.value)]
        getattr(block.mixer.query_key_value, name).copy_(torch.cat(rows))
    block.mixer.out.load_state_dict(theirs.attention.output.dense.state_dict())
    block.feedforward.up.load_state_dict(theirs.intermediate.dense.state_dict())
    block.feedforward.down.load_state_dict(theirs.output.dense.state_dict())
    block.norm.load_state_dict(theirs.output.LayerNorm.state_dict())
    block.norm.eps = config.layer_norm_eps
    mixed = theirs.attention.output.dense(attention(x)[0])
    expected = theirs.output.LayerNorm(x + mixed + theirs.output.dense(theirs.intermediate(x)))
    torch.testing.assert_close(block(x, Context.of(x)), expected)
