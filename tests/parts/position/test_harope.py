"""HARoPE: exact properties, then the formula by other means."""

import math

import pytest
import torch

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel
from formwright.parts.position.harope import HARoPE, fold
from formwright.parts.position.roformer import RoPE

WIRINGS = ("conjugate", "shared")
GRID = (3, 5)
PLANE = {"queries": 15, "keys": 15, "grid": GRID}


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def part(*, heads=3, head_dim=8, noise=0.5, **options):
    torch.manual_seed(0)
    made = HARoPE(heads=heads, head_dim=head_dim, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return made


def scores(position, q, k, context):
    turned_q, turned_k = position.rotate(q, k, context)
    return turned_q @ turned_k.mT / math.sqrt(q.shape[-1])


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("grid", [None, GRID])
def test_it_starts_as_rope(wiring, grid):
    q, k = draw(2, 3, 15, 8), draw(2, 3, 15, 8).flip(0)
    context = Context(queries=15, keys=15, grid=grid)
    ours, plain = (scores(position, q, k, context) for position in (part(noise=0, wiring=wiring), RoPE(head_dim=8)))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)  # s is 1 + 1e-6


def test_the_factors_are_orthogonal_and_the_inverse_is_exact():
    harope = part()
    u = torch.linalg.matrix_exp((harope.A_u - harope.A_u.mT) / 2)
    torch.testing.assert_close(u.mT @ u, torch.eye(8, dtype=u.dtype).expand(3, 8, 8))
    of_queries, of_keys = harope.maps()
    torch.testing.assert_close(of_queries.mT @ of_keys, torch.eye(8, dtype=u.dtype).expand(3, 8, 8))
    assert (torch.linalg.det(u) > 0).all()


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("grid", [(2, 14), (4, 7), (2, 2, 7)])
def test_scores_know_the_offset_along_every_axis_alone(wiring, grid):
    harope = part(head_dim=12, wiring=wiring)
    q, k = (draw(12) * sign for sign in (1.0, -0.5))
    q, k = (x.roll(i).expand(1, 3, 28, 12) for i, x in enumerate((q, k)))
    found = scores(harope, q, k, Context(queries=28, keys=28, grid=grid))[0].view(3, *grid, *grid)
    last = len(grid)
    for axis in range(1, last + 1):
        here, there = (found.narrow(axis, start, grid[axis - 1] - 1) for start in (0, 1))
        torch.testing.assert_close(
            here.narrow(axis + last, 0, grid[axis - 1] - 1), there.narrow(axis + last, 1, grid[axis - 1] - 1)
        )
    first = found.flatten(1, last)[:, 0].view(3, *grid)
    assert not torch.allclose(first.select(1, 1), first.select(1, 0))


@pytest.mark.parametrize("grid", [None, GRID])
def test_a_token_meets_itself_as_without_a_position(grid):
    q, k = draw(2, 3, 15, 8), draw(2, 3, 15, 8).flip(0)
    found = scores(part(), q, k, Context(queries=15, keys=15, grid=grid)).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, (q * k).sum(-1) / math.sqrt(8))


def test_heads_differ_and_axes_mix():
    x = draw(15, 8).expand(1, 3, 15, 8)
    found = scores(part(), x, x, Context(**PLANE))
    assert not torch.allclose(found[:, 0], found[:, 1])
    q = torch.zeros(1, 3, 15, 8, dtype=torch.float64)
    q[..., 0] = 1  # a channel of the rows: under RoPE columns do not move it
    still, moved = (scores(p, q, q, Context(**PLANE))[0, 0, 0, :5] for p in (RoPE(head_dim=8), part()))
    torch.testing.assert_close(still, still[:1].expand(5))
    assert moved.std() > 0.01


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_wirings_are_one_when_the_map_is_orthogonal(kv_heads):
    conjugate, shared = (part(kv_heads=kv_heads, wiring=wiring) for wiring in WIRINGS)
    for harope in (conjugate, shared):
        torch.nn.init.constant_(harope.sigma, math.log(math.e - 1))
    q, k = draw(2, 3, 15, 8), draw(2, kv_heads or 3, 15, 8).flip(0)
    found = [harope.rotate(q, k, Context(**PLANE)) for harope in (conjugate, shared)]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)  # s is 1 + 1e-6


def test_only_the_shared_wiring_has_a_temperature():
    q, k = draw(2, 3, 15, 8), draw(2, 3, 15, 8).flip(0)
    for wiring, power in zip(WIRINGS, (0, 2), strict=True):
        harope = part(wiring=wiring)
        before = scores(harope, q, k, Context(**PLANE))
        with torch.no_grad():
            s = torch.nn.functional.softplus(harope.sigma) + 1e-6
            harope.sigma.copy_((3 * s - 1e-6).expm1().log())
        torch.testing.assert_close(scores(harope, q, k, Context(**PLANE)), before * 3**power)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_parameters_are_two_matrices_and_a_row_for_each_key_head(kv_heads):
    harope = HARoPE(heads=4, head_dim=6, kv_heads=kv_heads)
    assert sum(p.numel() for p in harope.parameters()) == (kv_heads or 4) * (2 * 36 + 6)


def test_the_two_rotations_start_with_opposite_gradients():
    harope, x = part(noise=0), draw(2, 3, 15, 8)
    scores(harope, x, x.flip(0), Context(**PLANE)).square().sum().backward()
    torch.testing.assert_close(harope.A_u.grad, -harope.A_v.grad)
    assert harope.A_u.grad.abs().max() > 1e-3


def test_queries_that_share_a_key_head_share_its_map():
    grouped, q, k = part(heads=4, kv_heads=2), draw(2, 4, 15, 8), draw(2, 2, 15, 8).flip(0)
    turned_q, turned_k = grouped.rotate(q, k, Context(**PLANE))
    single = part(heads=1)
    for head in range(2):
        single.load_state_dict({name: value[head : head + 1] for name, value in grouped.state_dict().items()})
        of_q, of_k = single.rotate(q[:, 2 * head : 2 * head + 1], k[:, head : head + 1], Context(**PLANE))
        torch.testing.assert_close(turned_q[:, 2 * head : 2 * head + 1], of_q)
        torch.testing.assert_close(turned_k[:, head : head + 1], of_k)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_folded_into_the_projections_it_is_rope_with_the_same_outputs(wiring, kv_heads, bias):
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture="decoder",
        position=f"harope(wiring={wiring})",
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        qkv_bias=bias,
    )
    model, ids = TransformerModel(config).double().eval(), torch.randint(0, 256, (2, 9))
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    before = model(ids, use_cache=False).last_hidden_state
    fold(model)
    torch.testing.assert_close(model(ids, use_cache=False).last_hidden_state, before)
    assert all(isinstance(mixer.position, RoPE) for mixer in model.decoder.mixers)
    with pytest.raises(FormwrightError, match="no HARoPE to fold"):
        fold(model)


def test_a_layer_that_projects_in_another_way_is_not_folded():
    model = TransformerModel(TransformerConfig(position="harope"))
    model.encoder.mixers[1].query_key_value = torch.nn.Sequential(model.encoder.mixers[1].query_key_value)
    weight = model.encoder.mixers[0].query_key_value.weight.clone()
    with pytest.raises(FormwrightError, match="merge adapters"):
        fold(model)
    assert torch.equal(model.encoder.mixers[0].query_key_value.weight, weight)


@torch.no_grad()
def test_a_vision_encoder_reads_its_patches_on_a_plane():
    torch.manual_seed(0)
    sizes = {"vocab_size": 0, "image_size": 8, "patch_size": 2, "hidden_size": 32, "num_attention_heads": 4}
    images = torch.randn(2, 3, 8, 8)
    outputs = []
    for grid in (True, False):
        torch.manual_seed(0)
        model = TransformerModel(TransformerConfig(position="harope", use_grid=grid, **sizes)).eval()
        outputs.append(model(pixel_values=images).last_hidden_state)
    assert not torch.allclose(*outputs, atol=1e-3)


@pytest.mark.reference
@pytest.mark.parametrize("wiring", WIRINGS)
def test_equal_to_scipys_matrix_exponential_an_inverse_and_complex_numbers(wiring):
    linalg = pytest.importorskip("scipy.linalg")
    np = pytest.importorskip("numpy")
    harope, q, k = part(wiring=wiring), draw(2, 3, 15, 8), draw(2, 3, 15, 8).flip(0)
    turned = harope.rotate(q, k, Context(**PLANE))
    rates = 10000.0 ** (-2 * np.arange(2) / 4)
    row, column = np.divmod(np.arange(15), 5)
    turns = np.exp(1j * np.concatenate((row[:, None] * rates, column[:, None] * rates), -1))
    for head in range(3):
        a_u, a_v, sigma = (p[head].detach().numpy() for p in (harope.A_u, harope.A_v, harope.sigma))
        u, v = (linalg.expm(0.5 * (a - a.T)) for a in (a_u, a_v))
        m = u @ np.diag(np.log1p(np.exp(sigma)) + 1e-6) @ v.T
        of_keys = np.linalg.inv(m).T if wiring == "conjugate" else m
        for x, by, got in ((q, m, turned[0]), (k, of_keys, turned[1])):
            mapped = x[:, head].numpy() @ by.T
            pairs = (mapped[..., 0::2] + 1j * mapped[..., 1::2]) * turns
            wanted = np.stack((pairs.real, pairs.imag), -1).reshape(mapped.shape)
            np.testing.assert_allclose(got[:, head].detach().numpy(), wanted, atol=1e-9)


def test_cross_attention_is_refused():
    x = torch.zeros(1, 3, 4, 8)
    with pytest.raises(UnsupportedContext, match="cross"):
        HARoPE(heads=3, head_dim=8).rotate(x, x, Context(queries=4, keys=4, memory=torch.zeros(1, 4, 24)))


def test_impossible_options_are_named():
    with pytest.raises(FormwrightError, match="divide the heads"):
        HARoPE(heads=4, head_dim=8, kv_heads=3)
    with pytest.raises(FormwrightError, match="pairs of channels"):
        HARoPE(heads=4, head_dim=7)
    with pytest.raises((FormwrightError, TypeError), match="conjugate"):  # the type first where types are checked
        HARoPE(heads=4, head_dim=8, wiring="both")
