"""Reversible blocks: the ordinary function and gradients, with memory that does not grow with depth."""

import copy

import pytest
import torch
from torch import nn

from formwright.bench.measure import peak_memory
from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import (
    TransformerConfig,
    TransformerForCausalLM,
    TransformerForConditionalGeneration,
    TransformerModel,
)
from formwright.parts.block import reversible

SIZES = {"vocab_size": 17, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 32}


def model(kind=TransformerForCausalLM, layers=3, **changes):
    torch.manual_seed(0)
    given = {**SIZES, "architecture": "decoder", "block": "reversible", "num_hidden_layers": layers, **changes}
    return kind(TransformerConfig(**given)).train()


def gradients(net, **batch):
    net.zero_grad()
    loss = net(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def keeping(monkeypatch):
    """The same stack, whose activations autograd keeps."""

    def kept(steps, x):
        a, b = x.chunk(2, -1)
        for step in steps:
            a, b = b, a + step(b)
        return torch.cat([a, b], -1)

    monkeypatch.setattr(reversible, "run", kept)


def ids(rows=2, tokens=9):
    return torch.randint(17, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.reference
@pytest.mark.parametrize("changes", [{}, {"position": "rope", "norm": "rmsnorm"}, {"position": "t5"}, {"dropout": 0.2}])
def test_gradients_are_those_of_a_stack_that_keeps_its_activations(monkeypatch, changes):
    net = model(**changes)
    given = {"input_ids": ids(), "labels": ids(), "attention_mask": torch.tensor([[1] * 9, [1] * 5 + [0] * 4])}
    torch.manual_seed(7)
    loss, found = gradients(net, **given)
    after = torch.rand(3)
    keeping(monkeypatch)
    torch.manual_seed(7)
    expected_loss, expected = gradients(net, **given)
    assert torch.equal(after, torch.rand(3)), "recomputation must leave the generators alone"
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys() == dict(net.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_decoder_that_reads_an_encoder_sends_it_the_same_gradients(monkeypatch):
    net = model(TransformerForConditionalGeneration, architecture="encoder-decoder", layers=2, decoder_start_token_id=0)
    given = {"input_ids": ids(), "labels": ids(tokens=5)}
    _, found = gradients(net, **given)
    keeping(monkeypatch)
    _, expected = gradients(net, **given)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_streams_are_the_papers_equations():
    net = model(layers=1).eval().base_model.decoder
    block, x = net.layers[0].block, torch.randn(1, 4, 16)
    told = []
    block.register_forward_hook(lambda _module, args, out: told.extend([args[0], out, args[1]]))
    whole = model(layers=1).eval().base_model
    whole.decoder = net
    whole(inputs_embeds=x)
    (x1, x2), context = told[0].chunk(2, -1), told[2]
    y1 = x1 + block.mixer(block.mixer_norm(x2), context)
    y2 = x2 + block.feedforward(block.feedforward_norm(y1), context)
    torch.testing.assert_close(told[1], torch.cat([y1, y2], -1))


def test_memory_of_a_training_step_does_not_grow_with_depth():
    def activations(block, layers):
        net = model(layers=layers, block=block, hidden_size=32, max_position_embeddings=256)
        tokens = torch.randint(17, (4, 256))
        weights = sum(p.numel() * 4 for p in net.parameters())
        return peak_memory(lambda: net(input_ids=tokens, labels=tokens).loss.backward()) - weights  # gradients apart

    plain = [activations("pre", layers) for layers in (2, 8)]
    ours = [activations("reversible", layers) for layers in (2, 8)]
    assert plain[1] > 2.5 * plain[0]
    assert ours[1] < 1.3 * ours[0]


def test_decoding_with_a_cache_gives_the_whole_pass():
    net = model(position="rope").eval()
    tokens = ids()
    whole = net(input_ids=tokens).logits
    first = net(input_ids=tokens[:, :6], use_cache=True)
    rest = net(input_ids=tokens[:, 6:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    net = model().eval()
    net.save_pretrained(tmp_path)
    again = TransformerForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids()).logits, net(input_ids=ids()).logits)


def test_frozen_embeddings_do_not_stop_the_layers_from_learning():
    net = model()
    net.get_input_embeddings().requires_grad_(False)
    _, found = gradients(net, input_ids=ids(), labels=ids())
    assert any("mixer" in name for name in found)


def test_under_autocast_the_recomputed_pass_has_its_precision():
    net = model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_what_cannot_be_computed_again_is_refused():
    with pytest.raises(UnsupportedContext, match="loss of its own"):
        gradients(model(feedforward="moe(experts=4)"), input_ids=ids(), labels=ids())
    with pytest.raises(FormwrightError, match="PartialFormer"):
        gradients(model(mixer="partialformer"), input_ids=ids(), labels=ids())

    class Handing(nn.Linear):
        def forward(self, x, context):
            context.carry["kept"] = y = super().forward(x)
            return y

    x = torch.randn(1, 2, 8, requires_grad=True)
    step = reversible.Step(nn.Identity(), Handing(4, 4), Context.of(x), 0.0)
    with pytest.raises(UnsupportedContext, match="hands something on"):
        reversible.run([step], x).sum().backward()
    with pytest.raises(FormwrightError, match="every layer or in none"):
        model(block=["reversible", "pre"], layers=2)


def test_it_learns():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = net(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_both_streams_leave_as_their_mean():
    net = model(kind=TransformerModel, architecture="encoder", layers=2).eval()
    stack = net.encoder
    assert all(layer.block.streams == 2 for layer in stack.layers)
    assert net(input_ids=ids()).last_hidden_state.shape == (2, 9, 16)
    states = net(input_ids=ids(), output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in states] == [16] * 3
    torch.testing.assert_close(copy.deepcopy(net)(input_ids=ids()).last_hidden_state, states[-1])
