"""Mamba: exact properties, then transformers' MambaMixer with the same weights."""

import math

import pytest
import torch
from torch.nn import functional as F

from formwright.contracts import Context, UnsupportedContext
from formwright.models.cache import State
from formwright.parts.mixing.mamba import Mamba
from formwright.training.trainer import decay_groups


def seeded(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mamba(**{"dim": 24, **options})


def tokens(batch, length, dim=24, dtype=torch.float32):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(length), dtype=dtype)


def causal(x, **facts):
    return Context.of(x, causal=True, **facts)


@pytest.mark.parametrize(
    ("dim", "expand", "state", "conv", "rank"), [(24, 2, 16, 4, None), (7, 3, 5, 2, 3), (64, 1, 1, 1, None)]
)
def test_the_number_of_parameters_is_the_papers(dim, expand, state, conv, rank):
    mixer = Mamba(dim=dim, expand=expand, state=state, conv=conv, dt_rank=rank)
    inner, r = expand * dim, math.ceil(dim / 16) if rank is None else rank
    projections = 3 * dim * inner + inner * (r + 2 * state) + r * inner + inner
    assert sum(p.numel() for p in mixer.parameters()) == projections + (conv + 1) * inner + state * inner + inner


def test_the_initial_dynamics_are_the_papers():
    mixer = seeded(dim=256)
    steps = F.softplus(mixer.dt_proj.bias)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert torch.equal(mixer.D, torch.ones(512))
    assert 1e-3 * 0.99 <= steps.min() <= 2e-3
    assert 0.05 <= steps.max() <= 0.1 * 1.01
    assert 0.005 < steps.median() < 0.02  # even in log space: the middle is 0.01
    assert 0.24 <= mixer.dt_proj.weight.abs().max() <= 0.25  # R^-1/2, R = 16


def test_what_weight_decay_would_spoil_is_spared():
    mixer = Mamba(dim=24)
    spared = {id(p) for group in decay_groups(mixer, 0.1) if not group["weight_decay"] for p in group["params"]}
    names = {name for name, p in mixer.named_parameters() if id(p) in spared}
    assert names == {"A_log", "D", "dt_proj.bias", "conv1d.bias"}


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("cuts", [(63,), (1,) * 63, (7, 1, 30, 1, 24), (1, 62), (2, 1, 60)])
def test_pieces_with_a_cache_equal_the_whole(discretization, cuts):
    mixer, x, cache = seeded(discretization=discretization).double(), tokens(3, 63, dtype=torch.float64), State()
    parts, past = [], 0
    with torch.no_grad():
        whole = mixer(x, causal(x))
        for cut in cuts:
            context = Context(queries=cut, keys=past + cut, causal=True, cache=cache)
            parts.append(mixer(x[:, past : past + cut], context))
            past += cut
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)


def test_float32_decoding_equals_the_whole():
    """The fast step of a single token, a way of its own, with a batch and left padding."""
    mixer, x, cache = seeded(dim=40), tokens(3, 20, dim=40), State()
    padding = torch.arange(20) >= torch.tensor([[0], [3], [17]])
    with torch.no_grad():
        whole = mixer(x, causal(x, padding=padding))
        parts = []
        for t in range(20):
            context = Context(queries=1, keys=t + 1, causal=True, padding=padding[:, : t + 1], cache=cache)
            parts.append(mixer(x[:, t : t + 1], context))
    torch.testing.assert_close(torch.cat(parts, 1)[padding], whole[padding], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["x_proj", "dt_proj"])
def test_a_layer_put_in_the_place_of_a_projection_is_used_in_decoding_too(name):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    mixer, x, cache = Mamba(dim=8).eval(), torch.randn(2, 6, 8), State()
    with torch.no_grad():
        plain = mixer(x, Context.of(x, causal=True))
        getattr(mixer, name).__class__ = Doubled
        whole = mixer(x, Context.of(x, causal=True))
        assert not torch.allclose(whole, plain, atol=1e-5)
        pieces = [
            mixer(x[:, start:end], Context(queries=end - start, keys=end, causal=True, cache=cache))
            for start, end in ((0, 3), (3, 4), (4, 5), (5, 6))
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError):  # two sequences are kept
            Mamba(dim=8)(x[:1, :1], Context(queries=1, keys=7, causal=True, cache=cache))


def test_the_cache_has_one_size():
    mixer, sizes = seeded(), set()
    for length in (1, 7, 300):
        cache, x = State(), tokens(2, length)
        mixer(x, causal(x, cache=cache))
        sizes.add(tuple(part.untyped_storage().nbytes() for part in cache.state))
    assert sizes == {(2 * 3 * 48 * 4, 2 * 48 * 16 * 4)}


def test_left_padding_leaves_no_trace_even_in_the_state():
    mixer, x = seeded(), tokens(2, 30)
    padding = (torch.arange(37) >= 7).expand(2, 37)
    padded = torch.cat([torch.full((2, 7, 24), 1e3), x], 1)
    plain, shifted = State(), State()
    y = mixer(x, causal(x, cache=plain))
    z = mixer(padded, causal(padded, padding=padding, cache=shifted))
    torch.testing.assert_close(z[:, 7:], y)
    for part, other in zip(plain.state, shifted.state, strict=True):
        torch.testing.assert_close(part, other)


def test_the_scan_stays_in_float32_in_a_bfloat16_model():
    mixer, x = seeded(), tokens(2, 63)
    exact = mixer(x, causal(x))
    cache, half = State(), seeded().bfloat16()
    y = half(x.bfloat16(), causal(x, cache=cache))
    assert y.dtype == torch.bfloat16
    assert cache.state[1].dtype == torch.float32
    assert F.cosine_similarity(y.float().flatten(), exact.flatten(), dim=0) > 0.999


def test_the_two_discretizations_differ_and_meet_at_small_steps():
    x = tokens(2, 63)
    for bias, close in ((2.0, False), (-9.0, True)):
        euler, zoh = seeded(discretization="euler"), seeded(discretization="zoh")
        with torch.no_grad():
            outputs = []
            for mixer in (euler, zoh):
                mixer.dt_proj.bias.fill_(bias)
                outputs.append(mixer(x, causal(x)))
        assert torch.allclose(*outputs, rtol=1e-2, atol=1e-4) is close


def test_the_model_keeps_the_initial_dynamics():
    transformer = pytest.importorskip("formwright.models.transformer")
    config = transformer.TransformerConfig(architecture="decoder", mixer="mamba", hidden_size=32, position="none")
    torch.manual_seed(0)
    body = transformer.TransformerModel(config)
    mixers = [module for module in body.modules() if isinstance(module, Mamba)]
    assert mixers
    for mixer in mixers:
        assert F.softplus(mixer.dt_proj.bias).min() > 0.99e-3
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(64, 16))


@pytest.mark.parametrize("options", [{"expand": 0}, {"state": 0}, {"conv": 0}, {"dt_rank": 0}, {"dt_min": 0.0}])
def test_impossible_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Mamba(dim=24, **options)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"memory": torch.zeros(2, 5, 24)}, "cross-attention"),
        ({"causal": False}, "bidirectional"),
        ({"grid": (3, 3)}, "grid"),
        ({"attentions": []}, "weights"),
    ],
)
def test_what_it_cannot_honour_raises(asked, says):
    x = tokens(2, 9)
    with pytest.raises(UnsupportedContext, match=says):
        seeded()(x, Context.of(x, **{"causal": True, **asked}))


@pytest.fixture
def twins():
    """Transformers' mixer and ours with its state dict, every weight moved off its initial value."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = modeling.MambaConfig(hidden_size=40, num_hidden_layers=1, state_size=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = modeling.MambaMixer(config, layer_idx=0)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours = Mamba(dim=40)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, config


@pytest.mark.reference
def test_outputs_and_gradients_equal_transformers(twins):
    ours, theirs, _ = twins
    inputs = [tokens(3, 63, dim=40).requires_grad_() for _ in range(2)]
    y, z = ours(inputs[0], causal(inputs[0])), theirs(inputs[1])
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)
    (y**2).sum().backward()
    (z**2).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-4, rtol=1e-4)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    torch.testing.assert_close(gradients, {n: p.grad for n, p in theirs.named_parameters()}, atol=1e-3, rtol=1e-4)


@pytest.mark.reference
def test_left_padding_and_decoding_equal_transformers(twins):
    from transformers.cache_utils import DynamicCache

    ours, theirs, config = twins
    x, padding = tokens(2, 20, dim=40), torch.arange(20) >= torch.tensor([[4], [0]])
    cache, their_cache = State(), DynamicCache(config=config)
    with torch.no_grad():
        context = causal(x[:, :12], padding=padding[:, :12], cache=cache)
        y = ours(x[:, :12], context)
        z = theirs(x[:, :12], cache_params=their_cache, attention_mask=padding[:, :12].long())
        torch.testing.assert_close(y[padding[:, :12]], z[padding[:, :12]], atol=1e-5, rtol=1e-5)
        for t in range(12, 20):
            context = Context(queries=1, keys=t + 1, causal=True, padding=padding[:, : t + 1], cache=cache)
            y = ours(x[:, t : t + 1], context)
            z = theirs(x[:, t : t + 1], cache_params=their_cache)
            torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pads", [1, 2, 5])
@pytest.mark.parametrize("more", [1, 3])
def test_a_prefill_padded_on_the_right_goes_on_as_the_row_alone(pads, more):
    mixer, x, cache = seeded().double(), tokens(2, 9 + more, dtype=torch.float64), State()
    real = torch.ones(2, 9 + pads + more, dtype=torch.bool)
    real[1, 9 : 9 + pads] = False
    padded = torch.cat([x[:, :9], tokens(2, pads, dtype=torch.float64), x[:, 9:]], 1)[1:]
    with torch.no_grad():
        alone = mixer(x[1:], causal(x[1:]))
        head, rest = padded[:, : 9 + pads], padded[:, 9 + pads :]
        mixer(head, causal(head, padding=real[1:, : 9 + pads], cache=cache))
        after = mixer(rest, Context(queries=more, keys=9 + pads + more, causal=True, padding=real[1:], cache=cache))
    torch.testing.assert_close(after, alone[:, 9:])
