"""Sandwich sharing: exact properties, then the model unrolled by hand from torch's own layers."""

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import formwright
from formwright.build import build
from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerModel,
)
from formwright.parts.sharing.subformer import Narrowed, paper_heads

D, H, V, L = 16, 2, 30, 5
SIZES = {"vocab_size": V, "hidden_size": D, "num_attention_heads": H, "num_hidden_layers": L}
PAIR = {"architecture": "encoder-decoder", "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
WIDE = "sandwich(width=24, heads=3, hidden=40)"


def model(kind=TransformerForCausalLM, *, seed=0, **options):
    torch.manual_seed(seed)
    made = kind(TransformerConfig(**{"architecture": "decoder", **SIZES, **options})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def ids(length=9, seed=1):
    return torch.randint(2, V, (2, length), generator=torch.Generator().manual_seed(seed))


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("scheme", "sets"), [("sandwich", 3), ("all", 1), ("all-but-last", 2), ("none", L)])
@pytest.mark.parametrize("block", ["pre", "post", "sub-ln"])
def test_weights_are_counted_once_and_norms_once_a_layer(scheme, sets, block):
    inner = D + 4 * D if block == "sub-ln" else 0
    matrices = 4 * D * D + 4 * D + 8 * D * D + 5 * D
    made = model(TransformerModel, sharing=scheme, block=block)
    assert size(made.decoder.layers) == sets * matrices + L * 2 * (2 * D + inner)


def test_the_layers_between_hold_the_same_tensors_and_norms_of_their_own():
    layers = model(sharing="sandwich").model.decoder.layers
    first, second, third, *_, last = layers
    for name, parameter in second.named_parameters():
        is_norm = "norm" in name
        assert (third.get_parameter(name) is parameter) != is_norm
        assert first.get_parameter(name) is not parameter
        assert last.get_parameter(name) is not parameter


@pytest.mark.parametrize("scheme", ["sandwich", "all", "all-but-last"])
def test_every_parameter_learns_and_the_shared_gradient_is_the_sum_over_its_uses(scheme):
    shared, plain = model(sharing=scheme), model()
    plain.load_state_dict(shared.state_dict())
    for one in (shared, plain):
        one.train()(ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in shared.parameters())
    owners = build("sharing", scheme, dim=D).owners(L)
    for name, parameter in shared.model.decoder.layers[owners[1]].named_parameters():
        members = [1] if "norm" in name else [i for i in range(L) if owners[i] == owners[1]]
        if "norm" in name and owners[1] != 1:
            continue
        expected = sum(plain.model.decoder.layers[i].get_parameter(name).grad for i in members)
        torch.testing.assert_close(parameter.grad, expected)


@torch.no_grad()
def test_with_three_layers_a_sandwich_is_the_unshared_model():
    plain, shared = model(num_hidden_layers=3), model(num_hidden_layers=3, sharing="sandwich")
    assert size(plain) == size(shared)
    assert torch.equal(plain(ids()).logits, shared(ids()).logits)


@torch.no_grad()
def test_with_equal_norms_the_layers_between_are_one_layer_run_again_and_again():
    made = model(TransformerModel, sharing="sandwich", position="none", block="post")
    first, layer, *rest, last = made.decoder.layers
    for other in rest:
        other.load_state_dict(layer.state_dict())
    x = made.embeddings.tokens(ids())
    context = Context.of(x, causal=True)
    x = first(x, context)
    for _ in range(L - 2):
        x = layer(x, context)
    assert torch.equal(made(ids()).last_hidden_state, last(x, context))


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["sandwich", "all", "all-but-last", WIDE])
@pytest.mark.parametrize("position", ["learned", "rope", "t5"])
def test_token_by_token_is_all_at_once(sharing, position):
    made = model(sharing=sharing, position=position)
    whole, cache, steps = made(ids()).logits, None, []
    for part in (ids()[:, :4], *ids()[:, 4:].split(1, dim=1)):
        output = made(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sharing", ["sandwich", WIDE])
def test_an_encoder_decoder_reads_its_memory_and_leaves_padding_out(sharing):
    made = model(TransformerForConditionalGeneration, **PAIR, sharing=sharing)
    wide = [isinstance(layer.block.cross, Narrowed) for layer in made.model.decoder.layers]
    assert wide == [False, *[sharing == WIDE] * (L - 2), False]
    source, target = ids(), ids(6, seed=2)
    whole = made(source, decoder_input_ids=target).logits
    padded = torch.cat([source, torch.zeros_like(source[:, :2])], 1)
    mask = (padded != 0).long()
    torch.testing.assert_close(made(padded, mask, decoder_input_ids=target).logits, whole, atol=1e-4, rtol=1e-4)
    other = source.clone()
    other[:, 0] = 2
    assert not torch.allclose(made(other, decoder_input_ids=target).logits, whole)
    written = made.generate(source, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, made.generate(source, max_new_tokens=5, do_sample=False, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"position": "fire"}])
@pytest.mark.parametrize("sharing", ["sandwich", "all", WIDE])
def test_a_file_holds_shared_weights_once_and_gives_them_back_shared(tmp_path, sharing, options):
    made = model(sharing=sharing, **options)
    made.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(list(made.parameters()))
    back = formwright.load(tmp_path)
    assert torch.equal(back(ids()).logits, made(ids()).logits)
    assert size(back) == size(made)
    back.resize_token_embeddings(V + 2)
    layers = back.model.decoder.layers
    assert layers[2].block.mixer.out.weight is layers[1].block.mixer.out.weight


def test_bad_input_is_refused():
    for options, said in (
        ({"num_hidden_layers": 2, "sharing": "sandwich"}, "3 or more"),
        ({"mixer": ["softmax", "softmax", "mamba"], "sharing": "sandwich"}, "cannot share"),
        ({"sharing": "sandwich(heads=2)"}, "give width"),
        ({"sharing": "sandwich(width=0)"}, "at least 1"),
        ({"sharing": "sandwich(width=20, heads=3)"}, "does not split"),
        ({"sharing": "sandwhich"}, "sandwich"),
    ):
        with pytest.raises(FormwrightError, match=said):
            model(**options)


def test_none_may_be_a_word_or_none():
    config = TransformerConfig(sharing=None, embedding=None)
    assert (config.sharing, config.embedding) == ("none", "none")


def test_heads_are_as_in_the_paper():
    assert [paper_heads(width) for width in (512, 640, 1024, 2048, 320, 300, 48)] == [8, 8, 16, 16, 5, 10, 1]
    with pytest.raises(FormwrightError, match="heads="):
        paper_heads(307)


# By hand, from torch's own layers


def copied(theirs: nn.Module, ours: nn.Module) -> None:
    """A self- or cross-attention of ours in torch's."""
    theirs.in_proj_weight.copy_(ours.query_key_value.weight)
    theirs.in_proj_bias.copy_(ours.query_key_value.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def torch_layer(block: nn.Module, kind: type[nn.Module], width: int, heads: int, hidden: int) -> nn.Module:
    layer = kind(width, heads, hidden, dropout=0.0, activation="relu", batch_first=True).eval()
    copied(layer.self_attn, block.mixer)
    norms = [block.mixer_norm, block.feedforward_norm]
    if block.cross is not None and not isinstance(block.cross, Narrowed):
        copied(layer.multihead_attn, block.cross)
        norms.insert(1, block.cross_norm)
    layer.linear1.load_state_dict(block.feedforward.up.state_dict())
    layer.linear2.load_state_dict(block.feedforward.down.state_dict())
    for name, norm in zip(("norm1", "norm2", "norm3"), norms, strict=False):
        getattr(layer, name).load_state_dict(norm.state_dict())
    return layer


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("sharing", ["sandwich", WIDE])
def test_an_encoder_decoder_is_torchs_layers_in_a_row(sharing):
    """Post-norm with ReLU. In wide decoder layers cross-attention is written out around torch's attention."""
    eps = {"name": "layernorm", "eps": 1e-5}
    made = model(TransformerModel, **PAIR, sharing=sharing, block="post", feedforward="relu", norm=eps)
    wide = sharing == WIDE
    causal = nn.Transformer.generate_square_subsequent_mask(6)

    def adapted(adapter, x):
        return F.layer_norm(F.linear(x, adapter.linear.weight, adapter.linear.bias), (len(adapter.norm.weight),),
                            adapter.norm.weight, adapter.norm.bias, 1e-5)  # fmt: skip

    def sides(stack):
        for i, layer in enumerate(stack.layers):
            between = wide and 0 < i < L - 1
            yield i, layer.block, (24, 3, 40) if between else (D, H, 4 * D)

    source, target = ids(), ids(6, seed=2)
    x = made.encoder.position.embed(made.embeddings.tokens(source), plain(source))
    for i, block, sizes in sides(made.encoder):
        if wide and i in (1, L - 1):
            x = adapted(made.encoder.adapters[str(i)], x)
        x = torch_layer(block, nn.TransformerEncoderLayer, *sizes)(x)
    memory = x
    x = made.decoder.position.embed(made.embeddings.tokens(target), plain(target))
    for i, block, sizes in sides(made.decoder):
        if wide and i in (1, L - 1):
            x = adapted(made.decoder.adapters[str(i)], x)
        if sizes[0] == D:
            x = torch_layer(block, nn.TransformerDecoderLayer, *sizes)(x, memory, tgt_mask=causal)
            continue
        layer = torch_layer(block, nn.TransformerEncoderLayer, *sizes)
        x = layer.norm1(x + layer._sa_block(x, causal, None))
        across = nn.MultiheadAttention(D, H, batch_first=True).eval()
        copied(across, block.cross.mixer)
        narrow = adapted(block.cross.down, x)
        x = block.cross_norm(x + adapted(block.cross.up, across(narrow, memory, memory)[0]))
        x = layer.norm2(x + layer._ff_block(x))
    found = made(source, decoder_input_ids=target).last_hidden_state
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def plain(tokens):
    return Context(queries=tokens.shape[1], keys=tokens.shape[1])
