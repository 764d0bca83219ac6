"""RoPE: exact properties, then independent implementations."""

import math

import pytest
import torch

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.ops.rotary import rotary_angles, rotate, rotate_reference, rotation
from formwright.parts.position.roformer import RoPE

LAYOUTS = ("interleaved", "half")


def at(part, x, start):
    """x (b, h, n, d), each of its tokens turned as if it stood at `start`."""
    n = x.shape[2]
    context = Context(queries=n, keys=n, positions=torch.full((1, n), start))
    return part.rotate(x, x, context)[0]


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [1, 63, 5000])
def test_scores_know_differences_alone(layout, offset):
    part = RoPE(head_dim=16, layout=layout)
    x, y = draw(2, 3, 7, 16, dtype=torch.float64), draw(2, 3, 9, 16, dtype=torch.float64).flip(-1)
    near = at(part, x, 12) @ at(part, y, 5).mT
    far = at(part, x, 12 + offset) @ at(part, y, 5 + offset).mT
    torch.testing.assert_close(near, far, atol=1e-10, rtol=0)
    assert not torch.allclose(near, at(part, x, 13) @ at(part, y, 5).mT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_position_zero_is_the_identity(layout):
    x = draw(1, 2, 7, 16)
    assert torch.equal(at(RoPE(head_dim=16, layout=layout), x, 0), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_are_kept_and_turns_add_up(layout):
    part, x = RoPE(head_dim=16, layout=layout), draw(1, 2, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(at(part, x, 77).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(at(part, at(part, x, 33), 44), at(part, x, 77))


def test_the_layouts_are_one_function_of_permuted_channels():
    x = draw(2, 3, 7, 16)
    order = torch.cat((torch.arange(0, 16, 2), torch.arange(1, 16, 2)))
    context = Context(queries=7, keys=7)
    interleaved = RoPE(head_dim=16).rotate(x, x, context)[0]
    half = RoPE(head_dim=16, layout="half").rotate(x[..., order], x, context)[0]
    torch.testing.assert_close(interleaved[..., order], half)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, None), (16, None), (16, 6), (7, 4)])
@pytest.mark.parametrize("n", [1, 7, 63])
def test_equal_to_block_diagonal_matrices_with_gradients(layout, head_dim, rotary_dim, n):
    part = RoPE(head_dim=head_dim, layout=layout, rotary_dim=rotary_dim, base=500.0)
    positions = torch.stack((torch.arange(n), torch.arange(n) * 3 + 2))
    angles = rotary_angles(positions, dim=part.rotary_dim, base=500.0, dtype=torch.float64)
    q, k = draw(2, 4, n, head_dim, dtype=torch.float64), draw(2, 2, n, head_dim, dtype=torch.float64)
    q.requires_grad_()
    turned_q, turned_k = part.rotate(q, k, Context(queries=n, keys=n, positions=positions))
    expected = rotate_reference(q, angles, layout=layout)
    torch.testing.assert_close(turned_q, expected)
    torch.testing.assert_close(turned_k, rotate_reference(k, angles, layout=layout))
    cotangent = q.detach().cos()
    torch.testing.assert_close(
        torch.autograd.grad(turned_q, q, cotangent)[0], torch.autograd.grad(expected, q, cotangent)[0]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cached_step_is_a_row_of_the_whole(layout):
    part, x = RoPE(head_dim=8, layout=layout), draw(1, 2, 63, 8)
    whole = part.rotate(x, x, Context(queries=63, keys=63, causal=True))[1]
    for step in (0, 1, 62):
        new = x[:, :, step : step + 1]
        alone = part.rotate(new, new, Context(queries=1, keys=step + 1))[1]
        torch.testing.assert_close(alone, whole[:, :, step : step + 1])


def test_left_padding_counts_from_the_first_real_token():
    part, x = RoPE(head_dim=8), draw(1, 2, 5, 8)
    positions = torch.tensor([[0, 0, 0, 1, 2]])
    padded = part.rotate(x, x, Context(queries=5, keys=5, positions=positions))[0]
    alone = part.rotate(x[:, :, 2:], x[:, :, 2:], Context(queries=3, keys=3))[0]
    torch.testing.assert_close(padded[:, :, 2:], alone)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_loses_no_angle_far_out(layout, dtype):
    part, x = RoPE(head_dim=16, layout=layout).to(dtype), draw(1, 2, 1, 16).to(dtype)
    out = at(part, x, 30_001)
    assert out.dtype == dtype
    torch.testing.assert_close(out, at(part, x.double(), 30_001).to(dtype), atol=0.02, rtol=0.01)  # fp32 angle + cast


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_split_view_and_an_odd_offset_are_turned_like_their_copies(layout):
    part, context = RoPE(head_dim=16, layout=layout), Context(queries=7, keys=7)
    packed = draw(2, 7, 3 * 32).unflatten(-1, (3, 2, 16)).movedim(2, 0).transpose(2, 3)
    shifted = draw(2, 3, 7, 17)[..., 1:]
    for x in (packed[1], shifted):
        assert torch.equal(part.rotate(x, x, context)[0], part.rotate(x.contiguous(), x, context)[0])


def test_layers_share_the_angles_of_one_forward_pass_and_no_others():
    first, second, other = RoPE(head_dim=8), RoPE(head_dim=8), RoPE(head_dim=8, base=100.0)
    x, context = draw(1, 2, 3, 8), Context(queries=3, keys=3)
    one = first.rotate(x, x, context)[0]
    assert len(context.carry) == 1
    assert torch.equal(second.rotate(x, x, context)[0], one)
    assert len(context.carry) == 1
    assert not torch.equal(other.rotate(x, x, context)[0], one)
    moved = Context(queries=3, keys=3, positions=torch.tensor([[5, 7, 9]]), carry=context.carry)
    assert torch.equal(
        first.rotate(x, x, moved)[0], first.rotate(x, x, Context(queries=3, keys=3, positions=moved.positions))[0]
    )


def test_the_form_for_compilers_equals_the_complex_one():
    x, by = draw(1, 2, 7, 8), rotation(rotary_angles(torch.arange(7)[None], dim=8))
    assert by.pairs is not None
    torch.testing.assert_close(rotate(x, by._replace(pairs=None)), rotate(x, by))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(3, 5), (5, 1), (2, 3, 4)])
def test_on_a_grid_scores_know_the_offset_along_every_axis_alone(layout, grid):
    axes, cells = len(grid), math.prod(grid)
    part = RoPE(head_dim=12, layout=layout)
    x, y = (draw(12, dtype=torch.float64) * sign for sign in (1, -0.5))
    x, y = (vector.roll(i).expand(1, 1, cells, 12) for i, vector in enumerate((x, y)))
    q, k = part.rotate(x, y, Context(queries=cells, keys=cells, grid=grid))
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    scores, seen = (q @ k.mT)[0, 0], {}
    for i in range(cells):
        for j in range(cells):
            offset = tuple((places[i] - places[j]).tolist())
            torch.testing.assert_close(seen.setdefault(offset, scores[i, j]), scores[i, j])
    assert len({round(score.item(), 9) for score in seen.values()}) == math.prod(2 * size - 1 for size in grid)
    assert axes == places.shape[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_an_axial_rotation_is_one_block_diagonal_matrix(layout, grid):
    cells, channels = math.prod(grid), 12 // len(grid)
    q, k = draw(2, 4, cells, 13, dtype=torch.float64), draw(2, 2, cells, 13, dtype=torch.float64)
    angles = [
        rotary_angles(places[None], dim=channels, base=50.0, dtype=torch.float64)
        for places in torch.cartesian_prod(*(torch.arange(size) for size in grid)).mT
    ]
    part = RoPE(head_dim=13, rotary_dim=12, base=50.0, layout=layout)
    turned = part.rotate(q, k, Context(queries=cells, keys=cells, grid=grid))
    for x, got in zip((q, k), turned, strict=True):
        torch.testing.assert_close(got, rotate_reference(x, torch.cat(angles, -1), layout=layout))


def test_a_grid_is_read_row_by_row_with_a_cache_and_by_positions_when_cells_are_left_out():
    part, x, grid = RoPE(head_dim=8), draw(1, 2, 12, 8), (3, 4)
    whole = part.rotate(x, x, Context(queries=12, keys=12, grid=grid))[1]
    step = part.rotate(x[:, :, 6:7], x[:, :, 6:7], Context(queries=1, keys=7, causal=True, grid=grid))[1]
    torch.testing.assert_close(step, whole[:, :, 6:7])
    kept = torch.tensor([[0, 5, 11]])
    some = part.rotate(x[:, :, kept[0]], x[:, :, kept[0]], Context(queries=3, keys=3, grid=grid, positions=kept))[1]
    torch.testing.assert_close(some, whole[:, :, kept[0]])


def test_a_fraction_of_the_head_is_its_first_channels():
    x, context = draw(1, 2, 7, 16), Context(queries=7, keys=7)
    quarter, first = RoPE(head_dim=16, fraction=0.25), RoPE(head_dim=16, rotary_dim=4)
    assert torch.equal(quarter.rotate(x, x, context)[0], first.rotate(x, x, context)[0])
    assert torch.equal(quarter.rotate(x, x, context)[0][..., 4:], x[..., 4:])
    with pytest.raises(FormwrightError, match="told twice"):
        RoPE(head_dim=16, rotary_dim=4, fraction=0.5)


@pytest.mark.reference
def test_a_plane_in_the_half_layout_equals_qwen2_vl_vision():
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config = modeling.Qwen2VLVisionConfig(embed_dim=32, num_heads=2)
    places = torch.cartesian_prod(torch.arange(3), torch.arange(5))
    q, k = draw(15, 2, 16), draw(15, 2, 16).flip(0)
    cos, sin = modeling.Qwen2VLVisionRotaryEmbedding(config)(q, places)
    expected = modeling.apply_rotary_pos_emb_vision(q, k, cos, sin)
    context = Context(queries=15, keys=15, grid=(3, 5))
    ours = RoPE(head_dim=16, layout="half").rotate(q.transpose(0, 1)[None], k.transpose(0, 1)[None], context)
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got[0].transpose(0, 1), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_fraction_equals_gpt_neox(fraction):
    modeling = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    from transformers import GPTNeoXConfig

    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": fraction}
    config = GPTNeoXConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    q, k = draw(2, 2, 63, 32), draw(2, 2, 63, 32).flip(0)
    cos, sin = modeling.GPTNeoXRotaryEmbedding(config)(q, torch.arange(63)[None])
    expected = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    ours = RoPE(head_dim=32, layout="half", fraction=fraction).rotate(q, k, Context(queries=63, keys=63))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_learned_or_stored():
    assert not RoPE(head_dim=8).state_dict()


def test_the_bound_on_a_score_falls_with_distance():
    """Section 3.4.3: a trend of the bound, the mean |S_i| of partial sums of e^(i lag f); no score itself need fall."""
    angles = rotary_angles(torch.arange(257)[None], dim=128, dtype=torch.float64)[0]
    bound = torch.polar(torch.ones_like(angles), angles).cumsum(-1).abs().mean(-1)
    means = [bound[start : 2 * start].mean().item() for start in (1, 2, 4, 8, 16, 32, 64, 128)]
    assert means == sorted(means, reverse=True)


@pytest.mark.reference
def test_equal_to_roformer_self_attention():
    modeling = pytest.importorskip("transformers.models.roformer.modeling_roformer")
    from transformers import RoFormerConfig

    config = RoFormerConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=63, embedding_size=32)
    torch.manual_seed(0)
    theirs = modeling.RoFormerSelfAttention(config).eval()
    table = modeling.RoFormerSinusoidalPositionalEmbedding(63, 8).create_weight()[None, None]
    x = draw(2, 63, 32)
    expected, weights = theirs(x, sinusoidal_pos=table)
    q, k, v = (linear(x).unflatten(-1, (4, 8)).transpose(1, 2) for linear in (theirs.query, theirs.key, theirs.value))
    q, k = RoPE(head_dim=8).rotate(q, k, Context.of(x))
    ours = (q @ k.mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(ours, weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((ours @ v).transpose(1, 2).flatten(2), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.reference
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_the_half_layout_equals_llama(base):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": base}
    )
    q, k = draw(2, 2, 63, 16), draw(2, 1, 63, 16)
    positions = torch.stack((torch.arange(63), torch.arange(63) + 100))
    cos, sin = modeling.LlamaRotaryEmbedding(config)(q, positions)
    expected = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    ours = RoPE(head_dim=16, base=base, layout="half").rotate(q, k, Context(queries=63, keys=63, positions=positions))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)  # angles up to 162 in fp32


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"memory": torch.zeros(1, 5, 8)}, "cross"),
        ({"grid": (2, 2, 1)}, "a multiple of 6"),
        ({"grid": (1, 3)}, "4 tokens on a grid"),
        ({"grid": (3, 3)}, "4 tokens on a grid"),
    ],
)
def test_what_it_cannot_honour_raises(asked, says):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UnsupportedContext, match=says):
        RoPE(head_dim=8).rotate(x, x, Context(queries=4, keys=4, **asked))


@pytest.mark.parametrize(
    "options", [{"head_dim": 7}, {"head_dim": 8, "rotary_dim": 3}, {"head_dim": 8, "rotary_dim": 10}]
)
def test_channels_that_make_no_pairs_are_refused(options):
    with pytest.raises(FormwrightError, match="choose an even rotary_dim from 2 to"):
        RoPE(**options)


def test_impossible_options_are_named():
    with pytest.raises(FormwrightError, match="needs base > 0"):
        RoPE(head_dim=8, base=0.0)
    with pytest.raises((FormwrightError, TypeError), match="interleaved"):  # the type first where types are checked
        RoPE(head_dim=8, layout="llama")
