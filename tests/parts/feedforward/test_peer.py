"""PEER: exact properties, then PEER-pytorch."""

import jaxtyping
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from formwright.contracts import Context
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.ops import peer as ops
from formwright.parts.feedforward.peer import PEER, TokenNorm


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dim=7, seed=0, **options):
    torch.manual_seed(seed)
    return PEER(dim=dim, **({"experts": 64, "retrievals": 3, "active": 4, "key_dim": 6} | options))


def by_hand(ours, x, gate=lambda s: s.softmax(-1), act=F.gelu):
    """Token by token, head by head, all N keys scored."""
    n, y = ours.keys.shape[1], torch.zeros_like(x)
    keys = torch.cat((ours.keys[0].repeat_interleave(n, 0), ours.keys[1].repeat(n, 1)), 1)
    queries = x @ ours.query.T
    if ours.norm is not None:
        queries = ours.norm(queries.flatten(0, 1)).view_as(queries)
    for at in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        b, t = at
        for q in queries[b, t].view(ours.retrievals, -1):
            scores, index = (keys @ q).topk(ours.active)
            for g, i in zip(gate(scores), index, strict=True):
                y[b, t] += g * act(ours.up[i] @ x[b, t]) * ours.down[i]
    return y


@pytest.mark.parametrize(
    ("options", "hand"),
    [
        ({}, {}),
        ({"activation": "relu"}, {"act": F.relu}),
        ({"gate": "sigmoid"}, {"gate": torch.sigmoid}),
        ({"query_norm": False}, {}),
        ({"experts": 1024, "active": 16}, {}),
    ],
)
@torch.no_grad()
def test_a_token_is_the_gated_sum_of_what_its_heads_retrieve(options, hand):
    ours, x = layer(**options).eval(), draw(2, 5, 7)
    torch.testing.assert_close(ours(x), by_hand(ours, x, **hand), rtol=1e-5, atol=1e-6)


def test_the_parameters_are_counted_by_the_formula():
    ours = layer(dim=7, experts=64, retrievals=3, key_dim=6)
    assert sum(p.numel() for p in ours.parameters()) == 2 * 7 * 64 + 3 * 7 * 6 + 8 * 6 + 2 * 3 * 6


@torch.no_grad()
def test_one_head_that_takes_all_is_a_dense_layer_under_gates():
    ours, x = layer(experts=25, retrievals=1, active=25, query_norm=False), draw(2, 5, 7)
    index, gates = ours.retrieve(x.flatten(0, 1))
    assert torch.equal(index.sort(-1).values, torch.arange(25).expand(10, 25))
    everywhere = torch.zeros(10, 25).scatter(1, index, gates)
    dense = (F.gelu(x.flatten(0, 1) @ ours.up.T) * everywhere) @ ours.down
    torch.testing.assert_close(ours(x).flatten(0, 1), dense, rtol=1e-5, atol=1e-6)
    ours.keys.zero_()  # all scores alike: the dense layer itself, over N
    dense = F.gelu(x @ ours.up.T) @ ours.down / 25
    torch.testing.assert_close(ours(x), dense, rtol=1e-5, atol=1e-6)


def test_gates_sum_to_one_a_head():
    ours = layer()
    _, gates = ours.retrieve(draw(9, 7))
    torch.testing.assert_close(gates.view(9, 3, 4).sum(-1), torch.ones(9, 3))


@torch.no_grad()
def test_sub_keys_may_change_places_with_their_experts():
    ours, x = layer().eval(), draw(2, 5, 7)
    y, n = ours(x), 8
    rows, columns = torch.randperm(n), torch.randperm(n)
    ours.keys.copy_(torch.stack((ours.keys[0, rows], ours.keys[1, columns])))
    for table in (ours.up, ours.down):
        table.copy_(table.view(n, n, -1)[rows][:, columns].flatten(0, 1))
    torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_tables_learn_where_they_were_retrieved_and_nowhere_else(training):
    ours, x = layer(experts=1024).train(training), draw(2, 5, 7)
    (ours(x) * draw(2, 5, 7, seed=1)).sum().backward()
    reached = ours.usage.counts > 0
    assert 0 < reached.sum() < 1024
    for table in (ours.up, ours.down):
        assert torch.equal(table.grad.any(1), reached)
    for parameter in (ours.query, ours.keys, ours.norm.weight, ours.norm.bias):
        assert parameter.grad.any()


def test_gradients_are_those_of_gathered_rows():
    ours, x = layer().double().eval(), draw(2, 5, 7, dtype=torch.float64).requires_grad_()
    g = draw(2, 5, 7, seed=1, dtype=torch.float64)
    found = [torch.autograd.grad(way(ours, x), [x, *ours.parameters()], g) for way in (PEER.forward, by_hand)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_the_kernel_and_pytorch_give_the_same_layer(monkeypatch):
    ours, x, found = layer(dim=16, experts=1024), draw(3, 40, 16).requires_grad_(), []
    for kernels in (True, False):
        if not kernels:
            for kernel in ("DOTS", "SUMS", "SCATTER", "TOP_PAIRS"):
                monkeypatch.setattr(ops, kernel, None)
        y = ours(x)
        found.append((y.detach(), *torch.autograd.grad(y, [x, *ours.parameters()], draw(3, 40, 16, seed=1))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_norm_is_batch_normalisation():
    ours, theirs = TokenNorm(5), torch.nn.BatchNorm1d(5)
    for seed in range(3):
        x = 3 * draw(9, 5, seed=seed) + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close((ours.mean, ours.var), (theirs.running_mean, theirs.running_var))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_the_norm_and_usage_see_real_tokens_alone():
    x, found = draw(2, 9, 7), []
    real = torch.tensor([[True] * 4 + [False] * 5, [False] * 9])
    for given, padding in ((x, real), (x[:1, :4], None)):
        ours = layer()
        y = ours(given, Context.of(given, padding=padding))
        found.append((y[0, :4].detach(), ours.norm.mean, ours.norm.var, ours.usage.counts))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_one_token_alone_keeps_the_statistics():
    ours, x = layer(), draw(1, 1, 7)
    before = ours.norm.mean.clone()
    torch.testing.assert_close(ours.train()(x), ours.eval()(x))
    assert torch.equal(ours.norm.mean, before)


@torch.no_grad()
def test_tokens_meet_in_training_alone():
    ours, x = layer(), draw(2, 9, 7)
    other = x.clone()
    other[:, 5:] *= 3
    assert torch.equal(ours.eval()(x)[:, :5], ours(other)[:, :5])
    assert not torch.allclose(ours.train()(x)[:, :5], ours(other)[:, :5])
    plain = layer(query_norm=False).train()
    assert torch.equal(plain(x)[:, :5], plain(other)[:, :5])


@torch.no_grad()
def test_the_work_of_a_token_grows_as_the_root_of_the_experts():
    work = []
    for experts in (32**2, 128**2, 512**2):
        ours = layer(dim=8, experts=experts).eval()
        with FlopCounterMode(display=False) as counter:
            ours(draw(1, 9, 8))
        work.append(counter.get_total_flops())
    fixed = 9 * (2 * 8 * 18 + 2 * 2 * 12 * 8 + 2 * 2 * 12 * 3)
    searched = [found - fixed for found in work]
    assert searched[1] == 4 * searched[0]
    assert searched[2] == 16 * searched[0]


@torch.no_grad()
def test_a_million_experts():
    ours = PEER(dim=4, experts=1024**2).eval()
    x = draw(1, 8, 4)
    assert ours(x).shape == x.shape
    assert ours.usage.counts.sum() == 8 * 8 * 16


def test_no_tokens_give_no_tokens():
    for training in (True, False):
        assert layer().train(training)(torch.empty(2, 0, 7)).shape == (2, 0, 7)


def test_bfloat16_retrieves_what_float32_does():
    ours, x = layer(dim=16, experts=1024), draw(1, 50, 16).bfloat16()
    half = layer(dim=16, experts=1024).bfloat16()
    ours.load_state_dict(half.state_dict())
    with torch.no_grad():
        index, gates = ours.eval().retrieve(x[0].float())
        other, same = half.eval().retrieve(x[0].float())
        assert torch.equal(index, other)
        torch.testing.assert_close(gates, same)
        torch.testing.assert_close(half(x).float(), ours(x.float()), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"experts": 60}, "next square is 64"),
        ({"experts": 0}, "experts is 0"),
        ({"retrievals": 0}, "retrievals=0"),
        ({"active": 65}, "active=65"),
        ({"active": 0}, "active=0"),
        ({"key_dim": 5}, "key_dim=5"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(FormwrightError, match=says):
        layer(**options)


@pytest.mark.parametrize("option", [{"activation": "gleu"}, {"gate": "sofmax"}])
def test_a_misspelt_choice_is_no_other_choice(option, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(FormwrightError, match=next(iter(option.values()))):
        layer(**option)


def test_a_decoder_trains_with_it_in_the_middle_and_generates():
    config = TransformerConfig(
        architecture="decoder",
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        feedforward=["gelu", "peer(experts=256, retrievals=2, active=4, key_dim=8)", "gelu"],
    )
    torch.manual_seed(0)
    model = TransformerForCausalLM(config).train()
    ids = torch.randint(256, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert model.model.decoder.layers[1].block.feedforward.up.grad.any()
    model.eval()
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    again = model(generated[:, :-1], use_cache=False).logits[:, -3:].argmax(-1)
    assert torch.equal(generated[:, -3:], again)


def library(ours):
    """PEER-pytorch with our weights: its heads have keys of their own, here the same ones, and it has no norm."""
    theirs = pytest.importorskip("PEER_pytorch", reason="PEER-pytorch is not installed").PEER(
        ours.up.shape[1],
        heads=ours.retrievals,
        num_experts=ours.up.shape[0],
        num_experts_per_head=ours.active,
        dim_key=ours.keys.shape[2],
        non_competing_scores=False,
    )
    with torch.no_grad():
        theirs.weight_down_embed.weight.copy_(ours.up)
        theirs.weight_up_embed.weight.copy_(ours.down)
        queries = ours.query.view(ours.retrievals, 2, ours.keys.shape[2], -1)  # theirs: half, then head
        theirs.to_queries[0].weight.copy_(queries.transpose(0, 1).flatten(0, 2))
        theirs.keys.copy_(ours.keys.transpose(0, 1).expand_as(theirs.keys))
    return theirs


@pytest.mark.reference
@pytest.mark.parametrize(("experts", "active"), [(64, 4), (1024, 16)])
def test_outputs_and_gradients_equal_peer_pytorch(experts, active):
    ours, x = layer(dim=16, experts=experts, active=active, query_norm=False), draw(2, 31, 16)
    theirs, g = library(ours), draw(2, 31, 16, seed=1)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    (y * g).sum().backward()
    (z * g).sum().backward()
    torch.testing.assert_close(ours.up.grad, theirs.weight_down_embed.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.down.grad, theirs.weight_up_embed.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.keys.grad, theirs.keys.grad.sum(0).transpose(0, 1), rtol=1e-4, atol=1e-5)
    queries = ours.query.grad.view(ours.retrievals, 2, ours.keys.shape[2], -1).transpose(0, 1).flatten(0, 2)
    torch.testing.assert_close(queries, theirs.to_queries[0].weight.grad, rtol=1e-4, atol=1e-5)
