"""AFT: exact properties of the four variants, then an independent implementation."""

import pytest
import torch

from formwright.conformance.growth import Meter
from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.cache import KeyValues, State
from formwright.models.transformer import TransformerConfig, TransformerForImageClassification
from formwright.ops.aft import aft_reference
from formwright.parts.mixing.aft import AFTConv, AFTFull, AFTLocal, AFTSimple

DIM, LENGTH = 8, 32


def tokens(n, batch=2, seed=0, dim=DIM):
    return torch.randn(batch, n, dim, generator=torch.Generator().manual_seed(seed))


def copy_projections(of, to):
    for name in ("query", "key", "value", "out"):
        getattr(to, name).load_state_dict(getattr(of, name).state_dict())


def variants(causal=False):
    return {
        "full": AFTFull(dim=DIM, length=LENGTH, rank=None, std=1.0),
        "low rank": AFTFull(dim=DIM, length=LENGTH, rank=3, std=1.0),
        "simple": AFTSimple(dim=DIM),
        "local": AFTLocal(dim=DIM, length=LENGTH, window=3, std=1.0, causal=causal),
        "conv": AFTConv(dim=DIM, heads=4, kernel=5),
    }


NAMES = list(variants())


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_full_is_attention_with_a_head_for_every_channel(rank, causal):
    part, x = AFTFull(dim=DIM, length=LENGTH, rank=rank, std=1.0), tokens(7)
    w = part.pairs if rank is None else part.rows @ part.columns.T
    q, k, v = part.query(x), part.key(x), part.value(x)
    seen = torch.ones(1, 7, 7, dtype=torch.bool)
    mean = aft_reference(k, v, w[None, :7, :7, None], seen.tril() if causal else seen)
    torch.testing.assert_close(part(x, Context.of(x, causal=causal)), part.out(q.sigmoid() * mean))


@pytest.mark.parametrize("causal", [True, False])
def test_full_without_bias_is_simple(causal):
    full, simple, x = AFTFull(dim=DIM, length=LENGTH, rank=None), AFTSimple(dim=DIM), tokens(7)
    torch.nn.init.zeros_(full.pairs)
    copy_projections(full, simple)
    context = Context.of(x, causal=causal)
    torch.testing.assert_close(full(x, context), simple(x, context))


@pytest.mark.parametrize("causal", [True, False])
def test_local_with_a_window_over_everything_is_full(causal):
    full = AFTFull(dim=DIM, length=9, rank=None, std=1.0)
    local, x = AFTLocal(dim=DIM, length=9, window=50), tokens(9)
    copy_projections(full, local)
    i = torch.arange(9)
    lag = torch.arange(-8, 9)
    with torch.no_grad():
        local.band.copy_(full.pairs[i[:, None], (i[:, None] + lag).clamp(0, 8)])
    context = Context.of(x, causal=causal)
    torch.testing.assert_close(local(x, context), full(x, context))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [2, DIM])
def test_conv_starts_as_simple_with_keys_shared_by_a_head(causal, heads):
    conv, simple, x = AFTConv(dim=DIM, heads=heads, kernel=3), AFTSimple(dim=DIM), tokens(7)
    copy = {name: getattr(conv, name).state_dict() for name in ("query", "value", "out")}
    for name, state in copy.items():
        getattr(simple, name).load_state_dict(state)
    with torch.no_grad():
        for own, shared in ((simple.key.weight, conv.key.weight), (simple.key.bias, conv.key.bias)):
            own.copy_(shared.repeat_interleave(DIM // heads, 0))
    context = Context.of(x, causal=causal)
    torch.testing.assert_close(conv(x, context), simple(x, context))


def test_conv_kernel_has_mean_beta_and_deviation_gamma():
    part = AFTConv(dim=DIM, heads=4, grid=(3, 3), kernel=5)
    assert torch.equal(part.weight(), torch.zeros(4, 5, 5))
    with torch.no_grad():
        part.gamma.copy_(torch.tensor([0.5, 1, 2, 3])), part.beta.copy_(torch.tensor([0.0, 1, -1, 2]))
    torch.testing.assert_close(part.weight().flatten(1).mean(1), part.beta)
    torch.testing.assert_close(part.weight().flatten(1).std(1, correction=0), part.gamma)


def test_conv_on_a_grid_reaches_rows_above_and_below():
    part, x = AFTConv(dim=DIM, heads=2, grid=(4, 4), kernel=3), tokens(16)
    torch.nn.init.ones_(part.gamma)
    grid = part(x, Context.of(x, grid=(4, 4)))
    swapped = part(x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2), Context.of(x, grid=(4, 4)))
    part.raw.data = part.raw.data.mT
    turned = part(x.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2), Context.of(x, grid=(4, 4)))
    turned, swapped = (y.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2) for y in (turned, swapped))
    torch.testing.assert_close(turned, grid)
    assert (swapped - grid).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
def test_a_constant_on_a_channel_of_the_keys_changes_nothing(name, causal):
    part, x = variants(causal)[name].double(), tokens(7).double()
    context = Context.of(x, causal=causal)
    before = part(x, context)
    with torch.no_grad():
        part.key.bias.add_(torch.linspace(-3, 3, len(part.key.bias)))
    torch.testing.assert_close(part(x, context), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [True, False])
def test_an_open_gate_and_constant_values_give_that_constant(name, causal):
    part, x = variants(causal)[name], tokens(7)
    with torch.no_grad():
        part.query.weight.zero_(), part.query.bias.fill_(50.0)
        part.value.weight.zero_(), part.value.bias.copy_(torch.arange(DIM))
        part.out.weight.copy_(torch.eye(DIM)), part.out.bias.zero_()
    torch.testing.assert_close(part(x, Context.of(x, causal=causal)), torch.arange(DIM).float().expand(2, 7, DIM))


@pytest.mark.parametrize(
    ("part", "own"),
    [
        (AFTFull(dim=DIM, length=LENGTH, rank=None), LENGTH**2),
        (AFTFull(dim=DIM, length=LENGTH, rank=3), 2 * LENGTH * 3),
        (AFTSimple(dim=DIM), 0),
        (AFTLocal(dim=DIM, length=LENGTH, window=4), LENGTH * 7),
        (AFTLocal(dim=DIM, length=LENGTH, window=4, causal=True), LENGTH * 4),
    ],
)
def test_parameters_are_four_matrices_and_the_bias(part, own):
    assert sum(p.numel() for p in part.parameters()) == 4 * DIM**2 + 4 * DIM + own


@pytest.mark.parametrize(("grid", "taps"), [(None, 5), ((4, 4), 25)])
def test_conv_has_one_key_channel_a_head(grid, taps):
    part = AFTConv(dim=DIM, heads=2, grid=grid, kernel=5, bias=False)
    assert sum(p.numel() for p in part.parameters()) == 3 * DIM**2 + DIM * 2 + 2 * taps + 2 * 2


def test_a_factorised_bias_learns_from_its_start():
    part, x = AFTFull(dim=DIM, length=LENGTH, rank=4), tokens(7)
    part(x, Context.of(x, causal=True)).sum().backward()
    assert part.rows.grad.any()
    assert part.columns.grad.any()


@pytest.mark.parametrize(("name", "most"), [("simple", 60), ("local", 90), ("conv", 90), ("full", 60)])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_of_tokens_squared_times_channels_is_stored(name, most, causal):
    n, dim = 256, 64
    part = {
        "full": lambda: AFTFull(dim=dim, length=n, rank=4),
        "simple": lambda: AFTSimple(dim=dim),
        "local": lambda: AFTLocal(dim=dim, length=n, window=16, causal=causal),
        "conv": lambda: AFTConv(dim=dim, heads=8),
    }[name]()
    x = tokens(n, batch=1, dim=dim)
    meter = Meter()
    with torch.no_grad(), meter:
        part(x, Context.of(x, causal=causal))
    assert meter.peak / 4 < most * n * dim  # at n = 256 one (n, n, d) array is 256 n d


def test_decoding_in_a_state_keeps_the_position_of_every_row():
    """Left-padded rows, chunked: the bias of a token is that of its position."""
    for name, cache in (("local", State()), ("full", KeyValues())):
        part, x = variants(causal=True)[name], tokens(9)
        real = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])
        out = []
        for start, end in ((0, 6), (6, 7), (7, 9)):
            context = Context(
                queries=end - start,
                keys=end,
                causal=True,
                padding=real[:, :end],
                positions=(real[:, :end].cumsum(1) - 1).clamp(min=0),
                cache=cache,
            )
            out.append(part(x[:, start:end], context))
        alone = part(x[:1, 4:], Context.of(x[:1, 4:], causal=True))
        torch.testing.assert_close(torch.cat(out, 1)[:1, 4:], alone)


def test_cross_attention_step_by_step_takes_its_own_row_of_the_bias():
    part, x, memory = variants()["full"], tokens(5), tokens(7, seed=3)
    whole = part(x, Context(queries=5, keys=7, memory=memory))
    cache, steps = KeyValues(), []
    for start, end in ((0, 2), (2, 3), (3, 5)):
        context = Context(queries=end - start, keys=7, memory=memory, cache=cache)
        steps.append(part(x[:, start:end], context))
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@pytest.mark.parametrize("name", ["full", "low rank", "local"])
@pytest.mark.parametrize("how", ["tokens", "positions"])
def test_a_place_beyond_the_length_is_refused_by_number(name, how):
    part, x = variants()[name], tokens(LENGTH + 1 if how == "tokens" else 3)
    positions = None if how == "tokens" else torch.tensor([[0, 1, LENGTH]])
    with pytest.raises(FormwrightError, match=f"{LENGTH} positions and was given position {LENGTH}"):
        part(x, Context.of(x, causal=True, positions=positions))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AFTFull(dim=8, length=4, std=0.0), "std"),
        (lambda: AFTFull(dim=8, length=4, rank=0), "rank"),
        (lambda: AFTLocal(dim=8, length=4, window=0), "window"),
        (lambda: AFTConv(dim=8, heads=3), "divisor"),
        (lambda: AFTConv(dim=8, heads=2, kernel=4), "odd kernel"),
        (lambda: AFTConv(dim=8, heads=2, grid=(2, 2, 2)), "3 axes"),
    ],
)
def test_impossible_options_are_refused(make, says):
    with pytest.raises(FormwrightError, match=says):
        make()


@pytest.mark.parametrize(
    ("part", "facts", "says"),
    [
        (AFTLocal(dim=DIM, length=LENGTH, causal=True), {}, "no bias for later tokens"),
        (AFTConv(dim=DIM, heads=2, grid=(2, 3)), {"causal": True, "grid": (2, 3)}, "no order"),
        (AFTConv(dim=DIM, heads=2, grid=(2, 3)), {}, "class token"),
        (AFTConv(dim=DIM, heads=2), {"grid": (2, 3)}, "one axis"),
        (AFTSimple(dim=DIM), {"cache": State()}, "use_cache=False"),
    ],
)
def test_what_it_cannot_honour_raises(part, facts, says):
    x = tokens(6)
    with pytest.raises(UnsupportedContext, match=says):
        part(x, Context.of(x, **facts))


@pytest.mark.reference
@pytest.mark.parametrize("name", ["full", "simple", "local"])
def test_equals_aft_pytorch(name):
    theirs = pytest.importorskip("aft_pytorch.aft_pytorch")
    torch.manual_seed(0)
    other = {
        "full": lambda: theirs.AFTFull(12, DIM, DIM),
        "simple": lambda: theirs.AFTSimple(12, DIM, DIM),
        "local": lambda: theirs.AFTLocal(12, DIM, DIM, s=4),
    }[name]()
    part = {
        "full": lambda: AFTFull(dim=DIM, length=12, rank=None),
        "simple": lambda: AFTSimple(dim=DIM),
        "local": lambda: AFTLocal(dim=DIM, length=12, window=4),
    }[name]()
    pairs = {"query": other.to_q, "key": other.to_k, "value": other.to_v, "out": other.project}
    for mine, its in pairs.items():
        getattr(part, mine).load_state_dict(its.state_dict())
    with torch.no_grad():
        if name == "full":
            part.pairs.copy_(other.wbias)
        if name == "local":
            i = torch.arange(12)
            part.band.copy_(other.wbias[i[:, None], (i[:, None] + torch.arange(-3, 4)).clamp(0, 11)])
        x = tokens(11)
        torch.testing.assert_close(part(x, Context.of(x)), other(x))


def test_a_vision_model_with_a_grid_builds_square_kernels_and_runs():
    config = TransformerConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        use_grid=True,
        hidden_size=DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        mixer="aft-conv(kernel=3)",
        num_labels=3,
        position="none",
    )
    model = TransformerForImageClassification(config).eval()
    assert model.model.encoder.mixers[0].raw.shape == (2, 3, 3)
    assert model(pixel_values=torch.zeros(2, 1, 8, 8)).logits.shape == (2, 3)
