"""MoE: exact properties, then transformers' Mixtral and OLMoE."""

import math

import jaxtyping
import pytest
import torch
from torch.nn import functional as F

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerForMaskedLM
from formwright.parts.feedforward import Usage, moe
from formwright.parts.feedforward.moe import MoE, balance_loss, router_z_loss

ROUTINGS = ("renormalized", "plain", "expert-choice")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(dim=7, hidden=5, experts=6, seed=0, **options):
    torch.manual_seed(seed)
    ours = MoE(dim=dim, hidden=hidden, experts=experts, **options)
    torch.nn.init.normal_(ours.router)
    return ours


def expert(ours, e, x):
    return ours._expert(x.flatten(0, -2), ours.up[e], ours.down[e]).view_as(x)


def by_hand(ours, x):
    """Token by token, expert by expert."""
    y = torch.zeros_like(x)
    for row, out in zip(x, y, strict=True):
        p = (row @ ours.router.T).softmax(-1)
        chosen = p.topk(ours.active, dim=-1).indices
        for t, experts in enumerate(chosen.tolist()):
            total = p[t, experts].sum() if ours.routing == "renormalized" else 1.0
            for e in experts:
                out[t] += p[t, e] / total * expert(ours, e, row[None, t])[0]
        if ours.shared is not None:
            out += ours.shared(row[None])[0]
    return y


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("expert", ["gelu", "relu", "swiglu", "geglu"])
@pytest.mark.parametrize("routing", ["renormalized", "plain"])
@torch.no_grad()
def test_a_token_is_the_weighted_sum_of_the_experts_it_chose(routing, expert, shared):
    ours, x = layer(routing=routing, expert=expert, shared=shared, active=3), draw(2, 9, 7)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), by_hand(ours, x), rtol=1e-5, atol=1e-6)


def test_all_experts_alike_and_renormalized_are_one_dense_layer():
    ours, x = layer(), draw(2, 9, 7)
    with torch.no_grad():
        for weight in (ours.up, ours.down):
            weight.copy_(weight[:1].expand_as(weight))
    torch.testing.assert_close(ours(x), expert(ours, 3, x))


def test_one_expert_is_the_dense_layer():
    ours, x = layer(experts=1, active=1, routing="plain"), draw(2, 9, 7)
    torch.testing.assert_close(ours(x), expert(ours, 0, x))


@torch.no_grad()
def test_an_expert_chooses_its_best_tokens_of_every_sequence():
    ours, x = layer(routing="expert-choice", experts=4, active=2), draw(3, 9, 7)
    p = (x @ ours.router.T).softmax(-1)
    y, taken = torch.zeros_like(x), torch.zeros(4)
    for b in range(3):
        for e in range(4):
            for t in p[b, :, e].topk(math.ceil(2 * 9 / 4)).indices.tolist():
                y[b, t] += p[b, t, e] * expert(ours, e, x[b, None, t])[0]
                taken[e] += 1
    torch.testing.assert_close(ours(x), y, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.usage.counts, taken.long())
    assert ours.usage.unevenness() == pytest.approx(0, abs=1e-12)


def test_expert_choice_gives_a_padded_row_what_the_row_alone_gets():
    ours, x = layer(routing="expert-choice", experts=4), draw(3, 9, 7)
    padding = torch.arange(9) >= torch.tensor([[4], [0], [9]])
    y = ours(x, Context.of(x, padding=padding))
    for b in (0, 1):
        alone = x[b : b + 1, padding[b]]
        torch.testing.assert_close(y[b, padding[b]], ours(alone)[0], rtol=1e-5, atol=1e-6)
    assert not y[~padding].any()


def test_expert_choice_refuses_a_causal_model_before_any_work():
    ours, x = layer(routing="expert-choice"), draw(1, 5, 7)
    with pytest.raises(UnsupportedContext, match="renormalized"):
        ours(x, Context.of(x, causal=True))
    assert not ours.usage.counts.any()


def test_expert_choice_would_leak_the_future():
    ours, x = layer(routing="expert-choice", experts=4, active=1, hidden=8), draw(1, 12, 7)
    other = x.clone()
    other[:, 6:] = draw(1, 6, 7, seed=3) * 3
    assert not torch.allclose(ours(x)[:, :6], ours(other)[:, :6])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_grouped_and_compiled_ways_agree_in_values_and_gradients(routing, monkeypatch):
    ours, x = layer(routing=routing), draw(2, 9, 7).requires_grad_()
    found = []
    for traced in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda traced=traced: traced)
        y = ours(x)
        gradients = torch.autograd.grad(y, [x, *ours.parameters()], draw(2, 9, 7, seed=1))
        found.append((y.detach(), *gradients))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("training", [True, False])
def test_no_tokens_give_no_tokens(routing, training):
    assert layer(routing=routing).train(training)(torch.empty(2, 0, 7)).shape == (2, 0, 7)


def test_experts_that_no_token_chose_learn_nothing():
    ours, x = layer(routing="plain", active=1), draw(1, 1, 7)
    ours(x).sum().backward()
    used = ours.usage.counts > 0
    assert used.sum() == 1
    for weight in (ours.up, ours.down):
        assert torch.equal(weight.grad.flatten(1).any(1), used)


@pytest.mark.parametrize("few", [0, 10**6])
def test_evaluation_reads_the_chosen_experts_alone(few, monkeypatch):
    monkeypatch.setattr(moe, "FEW", few)
    ours, x = layer(dim=8, hidden=8).eval(), draw(1, 1, 8)
    y = ours(x)
    with torch.no_grad():
        ours.up[ours.usage.counts == 0] = torch.nan
    assert torch.equal(ours(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_one_product_of_all_groups_and_one_for_each_agree(dtype, expert, monkeypatch):
    ours, x = layer(dim=16, hidden=24, expert=expert).to(dtype), draw(2, 9, 16, dtype=dtype).requires_grad_()
    found = []
    for few in (0, 10**6):
        monkeypatch.setattr(moe, "FEW", few)
        y = ours(x)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), [x, *ours.parameters()])))
    rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(*found, **rounding)


def test_the_balance_loss_is_one_when_choices_and_probabilities_are_even():
    weight = torch.full((8,), 1 / 8)
    even = torch.full((8, 4), 0.25)
    chosen = F.one_hot(torch.arange(8) % 4, 4).bool()
    assert balance_loss(even, chosen, weight).item() == pytest.approx(1)
    collapsed = F.one_hot(torch.zeros(8, dtype=torch.long), 4)
    assert balance_loss(collapsed.float(), collapsed.bool(), weight).item() == pytest.approx(4)


def test_the_losses_are_weighted_and_those_of_training_alone():
    ours, x = layer(balance=0.3, z=0.2), draw(2, 9, 7)
    context = Context.of(x)
    ours.eval()(x, context)
    assert not context.losses
    ours.train()(x, context)
    logits = ours.logits(x.flatten(0, 1))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, logits.topk(2).indices, True)
    weight = torch.full((18,), 1 / 18)
    torch.testing.assert_close(context.losses["balance"], 0.3 * balance_loss(logits.softmax(-1), chosen, weight))
    torch.testing.assert_close(context.losses["router z"], 0.2 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(router_z_loss(logits, weight), logits.logsumexp(-1).square().mean())
    sum(context.losses.values()).backward()
    assert ours.router.grad.any()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_losses_and_usage_see_real_tokens_alone(routing):
    x = draw(2, 9, 7)
    real = torch.tensor([[True] * 4 + [False] * 5, [False] * 9])
    found = []
    for given, padding in ((x, real), (x[:1, :4], None)):
        ours = layer(routing=routing)
        context = Context.of(given, padding=padding)
        y = ours(given, context)
        found.append((y[0, :4].detach(), context.losses, ours.usage.counts))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_without_weights_nothing_is_added():
    ours, x = layer(balance=0.0, z=0.0), draw(2, 9, 7)
    context = Context.of(x)
    ours(x, context)
    assert not context.losses


def test_usage_tells_share_and_unevenness():
    usage = Usage(4)
    assert (usage.share(), usage.unevenness()) == (0, 0)
    usage.add(torch.tensor([[1, 1], [1, 1]]))
    assert usage.share() == 0.25
    assert usage.unevenness() == pytest.approx(math.log(4))
    usage.add(torch.tensor([0, 2, 3]).repeat(4))
    assert usage.share() == 1
    assert usage.unevenness() == pytest.approx(0)
    usage.reset_parameters()
    assert not usage.counts.any()
    assert not usage.state_dict()


def test_bfloat16_chooses_as_float32_does():
    ours, x = layer(dim=64, hidden=8, experts=16), draw(1, 200, 64).bfloat16()
    with torch.no_grad():
        ours.router.copy_(ours.router.bfloat16())
    full = ours.logits(x[0].float()).topk(2).indices
    assert torch.equal(ours.bfloat16().logits(x[0]).topk(2).indices, full)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden": 0}, "got 0"),
        ({"active": 0}, "active=0"),
        ({"active": 7}, "active=7"),
        ({"shared": -1}, "shared=-1"),
        ({"active": 1}, 'routing="plain"'),
        ({"balance": -0.1}, "balance=-0.1"),
        ({"z": -0.1}, "z=-0.1"),
        ({"routing": "expert-choice", "balance": 0.1}, "balance=0.1"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(FormwrightError, match=says):
        layer(**options)


@pytest.mark.parametrize("option", [{"routing": "tokens"}, {"expert": "swish"}])
def test_a_misspelt_choice_is_no_other_choice(option, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(FormwrightError, match=next(iter(option.values()))):
        MoE(dim=8, hidden=16, **option)


def test_a_decoder_trains_with_it_and_reports_its_losses():
    config = TransformerConfig(
        architecture="decoder", hidden_size=16, intermediate_size=8, num_attention_heads=2, feedforward="moe"
    )
    torch.manual_seed(0)
    model = TransformerForCausalLM(config).train()
    ids = torch.randint(256, (2, 9))
    output = model(ids, labels=ids)
    assert set(output.extra_losses) == {"balance", "router z"}
    plain = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, plain + sum(output.extra_losses.values()))
    model.eval()
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    again = model(generated[:, :-1], use_cache=False).logits[:, -3:].argmax(-1)
    assert torch.equal(generated[:, -3:], again)


def test_an_encoder_takes_expert_choice_and_a_decoder_does_not():
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
    spec = "moe(routing=expert-choice)"
    ids = torch.randint(256, (2, 9))
    model = TransformerForMaskedLM(TransformerConfig(**sizes, feedforward=spec))
    assert set(model(ids, labels=ids).extra_losses) == {"router z"}
    with pytest.raises(UnsupportedContext, match="causal"):
        TransformerForCausalLM(TransformerConfig(architecture="decoder", **sizes, feedforward=spec))(ids)


def transformers_block(ours, kind):
    if kind == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock as Block

        sizes = {"num_local_experts": len(ours.up)}
    else:
        from transformers.models.olmoe.modeling_olmoe import OlmoeConfig as Config
        from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock as Block

        sizes = {"num_experts": len(ours.up)}
    config = Config(
        hidden_size=ours.router.shape[1], intermediate_size=ours.down.shape[2], num_experts_per_tok=ours.active, **sizes
    )
    config._experts_implementation = "eager"
    theirs = Block(config)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router)
        theirs.experts.gate_up_proj.copy_(ours.up)
        theirs.experts.down_proj.copy_(ours.down)
    return theirs


@pytest.mark.reference
@pytest.mark.parametrize(("kind", "routing"), [("mixtral", "renormalized"), ("olmoe", "plain")])
def test_outputs_and_gradients_equal_transformers(kind, routing):
    ours = layer(dim=16, hidden=24, experts=8, active=3, routing=routing, expert="swiglu")
    theirs, x, g = transformers_block(ours, kind), draw(2, 31, 16), draw(2, 31, 16, seed=1)
    y, z = ours(x), theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    (y * g).sum().backward()
    (z * g).sum().backward()
    torch.testing.assert_close(ours.router.grad, theirs.gate.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.up.grad, theirs.experts.gate_up_proj.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.down.grad, theirs.experts.down_proj.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_is_that_of_transformers_over_k(padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    ours, x = layer(balance=1.0, z=0.0, active=3), draw(2, 31, 7)
    padding = torch.arange(31) < torch.tensor([[20], [31]]) if padded else None
    context = Context.of(x, padding=padding)
    ours(x, context)
    logits = ours.logits(x.flatten(0, 1))
    mask = None if padding is None else padding.long()
    theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=3, attention_mask=mask)
    torch.testing.assert_close(context.losses["balance"], theirs / 3)
