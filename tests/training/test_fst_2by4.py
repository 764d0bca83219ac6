"""2:4 training: masks against brute force and convolution, unbiased gradients by sampling, the run as a whole."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from formwright.build import build
from formwright.errors import FormwrightError
from formwright.tasks.base import Columns
from formwright.training import Settings, fit, fst_2by4
from formwright.training.fst_2by4 import (
    FST,
    SparseLinear,
    feedforwards,
    find_decay,
    flip_rates,
    patterns,
    sampled,
    transposable_mask,
)

IDS = torch.randint(20, (32, 12), generator=torch.Generator().manual_seed(0))


def batches(kind):
    """Rows of random ids, or pixels, and their labels."""
    torch.manual_seed(0)
    if kind == "images":
        return Columns(pixel_values=torch.randn(32, 3, 8, 8), labels=torch.arange(32) % 2)
    return Columns(input_ids=IDS, labels=IDS if kind == "text" else torch.arange(32) % 2)


class Rows:
    """What `fit` reads of a task."""

    name, head, collate, validation = "rows", "", staticmethod(dict), None
    score = summary = None

    def __init__(self, kind):
        self.train = self.test = batches(kind)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(vocab_size=20, **SIZES)), "labelled"),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=12)),
        "text",
    ),
    "vit": (lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)), "images"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES)), "text"),
}
SETTINGS = Settings(steps=6, batch_size=8, learning_rate=1e-2, warmup=0.0)


def made(name):
    torch.manual_seed(0)
    return MODELS[name][0]()


# Masks


def test_there_are_ninety_patterns_with_two_in_every_row_and_column():
    found = patterns()
    assert found.shape == (90, 4, 4)
    assert (found.sum(1) == 2).all()
    assert (found.sum(2) == 2).all()
    assert len({tuple(one.flatten().tolist()) for one in found}) == 90


@pytest.mark.parametrize("at_once", [2**16, 5])
def test_a_mask_is_2_to_4_along_both_axes(monkeypatch, at_once):
    monkeypatch.setattr(fst_2by4, "AT_ONCE", at_once)
    mask = transposable_mask(torch.randn(24, 40))
    for one in (mask, mask.T):
        assert (one.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.reference
def test_a_mask_keeps_as_much_as_any_by_brute_force():
    """All 2^16 masks of a block, those with two in every row and column."""
    weight = torch.randn(8, 12, dtype=torch.float64)
    mask = transposable_mask(weight)
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    allowed = [
        block
        for block in itertools.product(rows, repeat=4)
        if all(sum(column) == 2 for column in zip(*block, strict=True))
    ]
    for top in range(0, 8, 4):
        for left in range(0, 12, 4):
            block = weight[top : top + 4, left : left + 4].abs()
            best = max(float((block * torch.tensor(one)).sum()) for one in allowed)
            kept = float((block * mask[top : top + 4, left : left + 4]).sum())
            assert kept == pytest.approx(best)


@pytest.mark.reference
def test_a_mask_is_the_best_channel_of_a_convolution():
    weight = torch.randn(16, 20)
    scores = F.conv2d(weight.abs()[None, None], patterns()[:, None], stride=4)[0]
    mask = patterns()[scores.argmax(0)].transpose(1, 2).reshape(16, 20).bool()
    assert torch.equal(transposable_mask(weight), mask)


def test_among_equals_the_first_pattern_is_taken():
    assert torch.equal(transposable_mask(torch.ones(4, 4)), patterns()[0].bool())
    assert torch.equal(transposable_mask(torch.zeros(4, 8))[:, :4], patterns()[0].bool())


# Gradients


def test_a_sampled_gradient_keeps_two_of_four_tokens_and_its_mean():
    torch.manual_seed(0)
    gradient = torch.randn(8, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.01])
    gradient[0] = 50.0  # one outweighs the others
    draws = sampled(gradient[:, None].expand(-1, 100_000, -1).flatten(1)).view(8, 100_000, 3)
    assert ((draws.unflatten(0, (2, 4)) != 0).sum(1) == 2).all()
    size = gradient.unflatten(0, (2, 4)).abs().amax(1).repeat_interleave(4, 0)
    torch.testing.assert_close(draws.mean(1) / size, gradient / size, atol=1e-2, rtol=0)


@pytest.mark.reference
def test_the_probabilities_are_those_of_drawing_one_after_the_other():
    """Every ordered pair, by enumeration: how often each is kept, and what it then is."""
    torch.manual_seed(0)
    gradient = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    a = gradient.abs()
    kept = torch.zeros(4, dtype=torch.float64)
    for i, j in itertools.permutations(range(4), 2):
        chance = a[i] / a.sum() * a[j] / (a.sum() - a[i])
        kept[i] += chance
        kept[j] += chance
    assert float(kept.sum()) == pytest.approx(2)
    draws = sampled(gradient[:, None].expand(-1, 50_000).contiguous())
    torch.testing.assert_close((draws != 0).double().mean(1), kept, atol=1e-2, rtol=0)
    for row, value, chance in zip(draws, gradient, kept, strict=True):
        torch.testing.assert_close(row[row != 0][0], value / chance, rtol=1e-4, atol=0)


def test_zeros_give_zeros_and_tokens_need_no_multiple_of_four():
    assert torch.equal(sampled(torch.zeros(8, 5)), torch.zeros(8, 5))
    gradient = torch.randn(7, 5)
    drawn = sampled(gradient)
    assert drawn.shape == gradient.shape
    assert drawn.isfinite().all()
    one = torch.zeros(4, 1)
    one[2] = 3.0
    torch.testing.assert_close(sampled(one), one, rtol=1e-4, atol=0)
    assert sampled(torch.randn(8, 2).bfloat16()).dtype == torch.bfloat16


def layer(sample, bias=True):
    torch.manual_seed(0)
    module = nn.Linear(8, 12, bias=bias).double()
    module.__class__ = SparseLinear
    module.mask, module.sample = transposable_mask(module.weight), sample
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_a_masked_layer_is_the_product_of_the_masked_weight_with_its_gradients(bias):
    module = layer(sample=False, bias=bias)
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = (module.weight * module.mask).detach().requires_grad_()
    expected = F.linear(x, weight, module.bias)
    torch.testing.assert_close(module(x), expected)
    goal = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * goal).sum(), (x, weight))
    (module(x) * goal).sum().backward()
    torch.testing.assert_close(x.grad, wanted[0])
    torch.testing.assert_close(module.weight.grad, wanted[1])  # masked entries too
    assert (module.weight.grad[~module.mask] != 0).any()
    if bias:
        torch.testing.assert_close(module.bias.grad, goal.sum((0, 1)))


def test_a_layers_sampled_gradient_has_the_same_mean():
    module = layer(sample=True)
    x, goal = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 12, dtype=torch.float64)
    draws = []
    for _ in range(3000):
        module.weight.grad = None
        (module(x) * goal).sum().backward()
        draws.append(module.weight.grad)
    assert float(torch.stack(draws).std(0).mean()) > 0.1
    assert float((torch.stack(draws).mean(0) - goal.T @ x).abs().mean()) < 0.1


def test_without_a_mask_it_is_the_layer_itself():
    module = layer(sample=True)
    plain = nn.Linear(8, 12).double()
    plain.load_state_dict(module.state_dict())
    module.mask = None
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(module(x), plain(x))


# The run


@pytest.mark.parametrize("name", list(MODELS))
def test_a_run_of_every_family_ends_dense_and_plain(name):
    model, kind = made(name), MODELS[name][1]
    kinds = [type(one) for one in model.modules()]
    names = list(model.state_dict())
    history = fit(model, Rows(kind), replace(SETTINGS, methods="fst-2by4(dense=0.5, refresh=2)"))
    assert [type(one) for one in model.modules()] == kinds
    assert list(model.state_dict()) == names
    assert len(history.extras["flip-rate"]) == 6
    assert history.extras["flip-rate"][0] == 0
    assert max(history.extras["flip-rate"]) > 0
    assert all(one.values.all() for one in feedforwards(model).values())


@pytest.mark.parametrize("name", list(MODELS))
def test_without_the_dense_steps_the_feed_forwards_stay_sparse(name):
    model, kind = made(name), MODELS[name][1]
    attention = {path for path, one in model.named_modules() if type(one) in (nn.Linear,)} - set(feedforwards(model))
    fit(model, Rows(kind), replace(SETTINGS, methods="fst-2by4(dense=0, refresh=1)"))
    for one in feedforwards(model).values():
        for side in (one.values, one.values.T):
            assert ((side.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    assert all(
        model.get_submodule(path).weight.count_nonzero() > 0.9 * model.get_submodule(path).weight.numel()
        for path in attention
    )


@pytest.mark.parametrize("feedforward", ["gelu", "swiglu"])
def test_our_own_transformer_is_trained_by_it(worker, feedforward):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = worker.TransformerConfig(vocab_size=10, num_labels=10, feedforward=feedforward, **sizes)
    model = worker.TransformerForTokenClassification(config)
    assert len(feedforwards(model)) == 4
    seen = []

    class Seen(FST):
        def forward(self, given):
            outputs = super().forward(given)
            seen.append([one.module.mask is not None for one in self.found.values()])
            return outputs

    settings = replace(worker.SETTINGS, steps=4, save_every=0)
    history = fit(model, worker.ragged(), settings, methods=[Seen(dense=0.5)])
    assert seen == [[True] * 4] * 2 + [[False] * 4] * 2
    assert len(history.extras["flip-rate"]) == 4


def test_a_dense_run_is_the_plain_run_to_the_bit_and_only_watched(worker):
    settings = replace(worker.SETTINGS, steps=5, save_every=0)
    plain, watched = worker.small(), worker.small()
    losses = fit(plain, worker.ragged(), settings).losses
    history = fit(watched, worker.ragged(), settings, methods=[FST(dense=1.0)])
    assert history.losses == losses
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert max(flip_rates(history)) > 0


def decayed(**options):
    """The gradients of masked and of kept weights before and after the method has seen them."""
    model = made("bert")
    method = FST(**options)
    method.prepare(model, Rows("labelled"), SETTINGS)
    for one in method.found.values():
        one.weight.grad = torch.zeros_like(one.weight)
    return model, method


def test_decay_is_added_to_the_gradient_of_masked_weights_alone():
    model, method = decayed(decay=0.1)
    method.gradients(model, 1)
    for one in method.found.values():
        mask = one.module.mask
        assert not one.weight.grad[mask].any()
        torch.testing.assert_close(one.weight.grad[~mask], 0.1 * one.weight.detach()[~mask])
    model, method = decayed(decay=0.0)
    method.gradients(model, 1)
    assert not any(one.weight.grad.any() for one in method.found.values())


def test_decay_on_weights_moves_them_by_the_rate_and_leaves_gradients_alone():
    model, method = decayed(decay=0.1, on="weights")
    before = {path: one.values.clone() for path, one in method.found.items()}
    masks = {path: one.module.mask for path, one in method.found.items()}
    method.gradients(model, 1)
    method.stepped(model, 1)
    for path, one in method.found.items():
        assert not one.weight.grad.any()
        rate = torch.where(masks[path], 0.0, 0.1 * SETTINGS.learning_rate)
        torch.testing.assert_close(one.values, before[path] * (1 - rate))


def test_a_mask_is_refreshed_when_it_is_due_and_flips_are_counted_at_every_step():
    model, method = decayed(refresh=2, dense=0.0)
    method.stepped(model, 1)
    assert method.flips == 0  # no weight has moved
    path, one = next(iter(method.found.items()))
    old = one.module.mask.clone()
    with torch.no_grad():
        one.weight.copy_(torch.where(old, 1e-3, 1.0) * one.weight)
        one.weight[:4, :4] = torch.where(old[:4, :4], 0.1, 1.0)  # what was masked is the larger now
    total = sum(other.values.numel() for other in method.found.values())
    method.stepped(model, 3)
    flipped = (transposable_mask(one.values) ^ old).sum()
    assert flipped >= 16
    assert float(method.flips) == pytest.approx(float(flipped) / total)
    assert torch.equal(one.module.mask, old)
    method.stepped(model, 4)
    assert torch.equal(one.module.mask, method.last[path])
    assert not torch.equal(one.module.mask, old)
    assert method.flips == 0


def test_stronger_decay_calms_the_flips():
    rates = {}
    for decay in (0.0, 1.0):
        settings = replace(SETTINGS, steps=30, learning_rate=3e-3)
        seen = flip_rates(fit(made("gpt2"), Rows("text"), settings, methods=[FST(decay=decay, dense=0.0, refresh=1)]))
        rates[decay] = sum(seen[10:])
    assert rates[1.0] < rates[0.0]


def test_it_goes_on_from_its_state():
    _, first = decayed(refresh=1, dense=0.0)
    path, one = next(iter(first.found.items()))
    with torch.no_grad():
        one.weight.copy_(torch.randn_like(one.weight))
    model, second = decayed(refresh=1, dense=0.0)
    first.stepped(model, 1)
    second.load({name: value.clone() for name, value in first.state().items()})
    assert torch.equal(second.found[path].module.mask, first.found[path].module.mask)
    assert torch.equal(second.last[path], first.last[path])
    assert second.flips == first.flips > 0


def test_a_resumed_run_ends_as_a_whole_one(worker, tmp_path):
    method = "fst-2by4(dense=0.25, refresh=3, decay=0.001)"
    whole, model = worker.small(), worker.small()
    settings = replace(worker.SETTINGS, steps=12, save_every=5, methods=method)
    fit(whole, worker.ragged(), settings, folder=tmp_path / "whole")

    class Stops(Exception):
        pass

    def stop(step, _steps, _loss):
        if step == 7:
            raise Stops

    with pytest.raises(Stops):
        fit(model, worker.ragged(), settings, folder=tmp_path / "cut", progress=stop)
    assert type(feedforwards(model).popitem()[1].module) is nn.Linear  # also after an error
    fit(model, worker.ragged(), settings, folder=tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_bfloat16_autocast_and_accumulation(worker):
    settings = replace(worker.SETTINGS, steps=2, save_every=0, precision="bfloat16", accumulate=2)
    history = fit(worker.small(), worker.ragged(), replace(settings, methods="fst-2by4(dense=0)"))
    assert len(history.losses) == 2


def test_a_decay_is_found_by_its_share_of_a_dense_runs_flips():
    settings = replace(SETTINGS, steps=30, learning_rate=3e-3)
    decay, shares = find_decay(lambda: made("gpt2"), Rows("text"), settings, [0.0, 1.0], steps=16, refresh=1)
    assert shares[1.0] < shares[0.0]
    assert decay in shares
    with pytest.raises(FormwrightError, match="steps is 3"):
        find_decay(lambda: made("gpt2"), Rows("text"), settings, [0.0], steps=3)
    with pytest.raises(FormwrightError, match="at least one"):
        find_decay(lambda: made("gpt2"), Rows("text"), settings, [], steps=10)


# What is refused


@pytest.mark.parametrize(
    "spec",
    ["fst-2by4(decay=-1)", "fst-2by4(dense=2)", "fst-2by4(refresh=0)", "fst-2by4(on=losses)", "fst-2by4(rate=1)"],
)
def test_bad_options_are_refused(spec):
    with pytest.raises(FormwrightError):
        build("training", spec)


def test_what_it_cannot_train_is_refused():
    sizes = SIZES | {"intermediate_size": 30}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))
    with pytest.raises(FormwrightError, match="30 x 16"):
        fit(model, Rows("labelled"), replace(SETTINGS, methods="fst-2by4"))
    with pytest.raises(FormwrightError, match="no transformers model"):
        fit(nn.Linear(4, 4), Rows("labelled"), replace(SETTINGS, methods="fst-2by4"))
    model = copy.deepcopy(made("bert"))
    for path, one in feedforwards(model).items():
        model.set_submodule(path, nn.Sequential(one.module))
    with pytest.raises(FormwrightError):
        feedforwards(model)
