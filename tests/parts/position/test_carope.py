"""CARoPE: exact properties, then RoPE of transformers in the constant case."""

import pytest
import torch

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.cache import KeyValues
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel
from formwright.ops.rotary import rotate, rotation
from formwright.parts.position.carope import CARoPE


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def part(*, heads=3, head_dim=8, scale=20.0, **options):
    """With W large enough for f to vary."""
    torch.manual_seed(0)
    made = CARoPE(dim=6, heads=heads, head_dim=head_dim, **options).double()
    with torch.no_grad():
        made.weight.add_(0.02 * scale * torch.randn_like(made.weight))
    return made


def over(x, **facts):
    return Context.of(x, **({"tokens": x} | facts))


def phases(carope, x, **facts):
    return carope._phases(x, over(x, **facts))


def test_the_phase_is_the_running_sum_of_powers_of_one_number_a_head():
    carope, x = part(), draw(2, 7, 6)
    for head in range(3):
        f = 1 / (1 + (1 + (x @ carope.weight[head]).exp()).log())
        assert ((f > 0) & (f < 1)).all()
        for pair in range(4):
            torch.testing.assert_close(phases(carope, x)[:, head, :, pair], (f ** (pair + 1)).cumsum(-1))


@pytest.mark.parametrize(("head_dim", "base"), [(8, None), (64, None), (16, 500.0)])
def test_from_ropes_start_angles_and_rotation_are_ropes(head_dim, base):
    carope = CARoPE(dim=6, heads=3, head_dim=head_dim, start="rope", base=base).double()
    x, q, k = draw(2, 63, 6), draw(2, 3, 63, head_dim), draw(2, 3, 63, head_dim).flip(0)
    exponents = torch.arange(1, head_dim // 2 + 1, dtype=torch.float64)
    rates = (base or 10000.0) ** (-2 * exponents / head_dim)
    angles = torch.arange(1, 64)[:, None] * rates
    torch.testing.assert_close(phases(carope, x)[0, 0], angles, atol=1e-6, rtol=1e-6)
    turned_q, turned_k = carope.rotate(q, k, over(x))
    by = rotation(angles[None])
    torch.testing.assert_close(turned_q @ turned_k.mT, rotate(q, by) @ rotate(k, by).mT, atol=1e-5, rtol=1e-5)


def test_what_comes_before_both_tokens_adds_nothing_to_their_score():
    carope, x, q, k = part(), draw(2, 20, 6), draw(2, 3, 20, 8), draw(2, 3, 20, 8).flip(0)
    other = torch.cat((draw(2, 11, 6, seed=3), x[:, 4:]), 1)
    long = [torch.cat((draw(2, 3, 11, 8, seed=4), y[:, :, 4:]), 2) for y in (q, k)]
    first, second = (a @ b.mT for a, b in (carope.rotate(q, k, over(x)), carope.rotate(*long, over(other))))
    torch.testing.assert_close(first[..., 4:, 4:], second[..., 11:, 11:], atol=1e-8, rtol=0)


def test_the_tokens_between_set_the_distance():
    carope, x, q = part(), draw(1, 9, 6), draw(1, 3, 9, 8)
    other = x.clone()
    other[:, 4] += 1
    first, second = (a @ b.mT for a, b in (carope.rotate(q, q, over(y)) for y in (x, other)))
    torch.testing.assert_close(first[..., 5:, 5:], second[..., 5:, 5:])
    torch.testing.assert_close(first[..., :4, :4], second[..., :4, :4])
    assert ((first - second)[..., 5:, :4].abs() > 1e-6).all()


def test_norms_are_kept():
    carope, x, q = part(), draw(2, 9, 6), draw(2, 3, 9, 8)
    torch.testing.assert_close(carope.rotate(q, q, over(x))[0].norm(dim=-1), q.norm(dim=-1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("counted", [True, False])
def test_pads_add_no_angle(side, counted):
    carope, x = part(), draw(1, 9, 6)
    real = (torch.arange(9) >= 4 if side == "left" else torch.arange(9) < 5)[None]
    positions = (real.long().cumsum(-1) - 1).clamp(min=0) if counted else None
    padded = phases(carope, x, padding=real, positions=positions)[:, :, real[0]]
    alone = phases(carope, x[:, real[0]])
    torch.testing.assert_close(padded - padded[:, :, :1], alone - alone[:, :, :1])


def test_a_token_three_places_on_adds_three_steps():
    carope, x = part(), draw(1, 5, 6)
    stretched = phases(carope, x, positions=3 * torch.arange(5)[None])
    steps = phases(carope, x).diff(dim=2)
    torch.testing.assert_close(stretched.diff(dim=2), 3 * steps)


def test_the_cache_carries_the_sum():
    carope, x, q = part(), draw(2, 9, 6), draw(2, 3, 9, 8)
    whole, cache, end = carope.rotate(q, q, over(x))[1], KeyValues(), 0
    for count in (4, 1, 3, 1):
        here = slice(end, end + count)
        end += count
        context = Context(queries=count, keys=end, causal=True, tokens=x[:, here], cache=cache)
        torch.testing.assert_close(carope.rotate(q[:, :, here], q[:, :, here], context)[1], whole[:, :, here])
    assert cache.carried.shape == (2, 3, 4)


def model(**sizes):
    torch.manual_seed(0)
    given = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 4, "architecture": "decoder", **sizes}
    made = TransformerForCausalLM(TransformerConfig(position="carope", pad_token_id=0, **given)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole_with_shared_key_heads_and_left_padding(kv_heads):
    lm, ids = model(num_key_value_heads=kv_heads), torch.randint(1, 11, (2, 9))
    assert lm.model.decoder.mixers[0].position.weight.shape == (kv_heads, 16)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    alone, cache, end, steps = lm(ids[1:, 4:], use_cache=False).logits, lm.model.new_cache(), 0, []
    for count in (5, 1, 2, 1):
        end += count
        piece = {"input_ids": ids[:, end - count : end], "attention_mask": mask[:, :end]}
        steps.append(lm(**piece, past_key_values=cache, use_cache=True).logits)
    stepped = torch.cat(steps, 1)
    torch.testing.assert_close(stepped, lm(ids, attention_mask=mask, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stepped[1:, 4:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_beams_take_their_sums_along_and_nothing_is_rolled_back():
    lm, ids = model(), torch.randint(1, 11, (2, 4))
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(lm.generate(ids, **options), lm.generate(ids, use_cache=False, **options))
    cache = lm.model.new_cache()
    lm(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(UnsupportedContext, match="cannot be rolled back"):
        cache.layers[0].crop(-1)
    cache.layers[0].reset()
    assert cache.layers[0].carried is None


@torch.no_grad()
def test_both_directions_know_the_way_between_two_tokens():
    encoder = TransformerModel(TransformerConfig(position="carope", vocab_size=11, hidden_size=16)).eval()
    ids = torch.randint(0, 11, (1, 9))
    seen = encoder(ids).last_hidden_state
    assert not torch.allclose(encoder(ids.flip(1)).last_hidden_state.flip(1), seen, atol=1e-5)


@pytest.mark.parametrize(("kv_heads", "start"), [(None, "random"), (2, "random"), (None, "rope")])
def test_parameters_are_a_column_for_each_key_head(kv_heads, start):
    carope = CARoPE(dim=10, heads=4, head_dim=6, kv_heads=kv_heads, start=start)
    assert sum(p.numel() for p in carope.parameters()) == (kv_heads or 4) * (11 if start == "rope" else 10)


def test_first_frequencies_are_near_one_over_one_plus_ln_two():
    torch.manual_seed(0)
    f = CARoPE(dim=256, heads=8, head_dim=8).frequency(torch.randn(4, 100, 256))
    assert f.mean().item() == pytest.approx(0.591, abs=0.01)
    assert 0.02 < f.std().item() < 0.1


def test_gradients_stay_finite_where_f_saturates():
    carope = part(scale=0.0)
    x = (draw(1, 9, 6) * 1e4).requires_grad_()
    with torch.no_grad():
        carope.weight.fill_(1.0)
    phases(carope, x).sum().backward()
    assert torch.isfinite(carope.weight.grad).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.reference
def test_with_constant_steps_scores_equal_roformers_but_for_the_first_exponent():
    modeling = pytest.importorskip("transformers.models.roformer.modeling_roformer")
    q, k, x = draw(2, 3, 63, 8), draw(2, 3, 63, 8).flip(0), draw(2, 63, 6)
    table = modeling.RoFormerSinusoidalPositionalEmbedding(63, 10).create_weight().double()  # 10 channels: its second
    sin, cos = table.chunk(2, -1)  # to fifth pairs turn by 10000^(-2i/10), i from 1, as ours do with that base
    table = torch.cat((sin[:, 1:], cos[:, 1:]), -1)[None, None]
    theirs = modeling.RoFormerSelfAttention.apply_rotary_position_embeddings(table, q, k)
    carope = CARoPE(dim=6, heads=3, head_dim=8, start="rope", base=10000.0 ** (8 / 10)).double()
    ours = carope.rotate(q, k, over(x))
    torch.testing.assert_close(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"memory": torch.zeros(1, 4, 6)}, "cross"), ({"grid": (2, 2)}, "grid"), ({"tokens": None}, "show the tokens")],
)
def test_what_it_cannot_honour_raises(asked, says):
    q = torch.zeros(1, 3, 4, 8)
    with pytest.raises(UnsupportedContext, match=says):
        CARoPE(dim=6, heads=3, head_dim=8).rotate(q, q, over(torch.zeros(1, 4, 6), **asked))


@pytest.mark.parametrize(
    ("options", "says"),
    [({"kv_heads": 2}, "divide the heads"), ({"head_dim": 7}, "pairs of"), ({"base": 100.0}, "with start=")],
)
def test_impossible_options_are_named(options, says):
    with pytest.raises(FormwrightError, match=says):
        CARoPE(**{"dim": 6, "heads": 3, "head_dim": 8} | options)
