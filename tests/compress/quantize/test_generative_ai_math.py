"""SAQ: the stairs, their bytes, and decoding with them."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

from formwright.compress.quantize.generative_ai_math import (
    Groups,
    StaircaseLayer,
    dequantise,
    pack,
    quantise,
    staircase_cache,
    unpack,
)
from formwright.contracts import UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM


def states(n, seed=0, heads=1, d=16):
    return torch.randn(2, heads, n, d, generator=torch.Generator().manual_seed(seed))


def filled(n, *, at_once=1, **options):
    """A layer that has read n tokens, some at a time, and what it last gave back."""
    layer, keys, values = StaircaseLayer(**{"width": 16, "group": 8} | options), states(n), states(n, 1)
    for start in range(0, n, at_once):
        read = layer.update(keys[..., start : start + at_once, :], values[..., start : start + at_once, :])
    return layer, read, (keys, values)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_packed_codes_come_back_from_their_share_of_the_bytes(bits):
    codes = torch.randint(2**bits, (3, 5, 16), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    assert pack(codes, bits).numel() == codes.numel() * bits // 8


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_group_has_a_grid_from_its_smallest_to_its_largest(bits, keys):
    x = states(32)
    back = dequantise(quantise(x, bits, 8, keys=keys, scales=torch.float32), bits, x.dtype, keys=keys)
    lines, read = (y.mT.unflatten(-1, (-1, 8)) if keys else y.unflatten(-1, (-1, 8)) for y in (x, back))
    step = (lines.amax(-1) - lines.amin(-1)) / (2**bits - 1)
    assert ((lines - read).abs().amax(-1) <= step / 2 + 1e-5).all()
    torch.testing.assert_close(read.amin(-1), lines.amin(-1))
    torch.testing.assert_close(read.amax(-1), lines.amax(-1))


@pytest.mark.parametrize("at_once", [1, 5, 57])
@pytest.mark.parametrize("n", [3, 16, 57])
def test_stairs_that_keep_all_bits_are_exact(n, at_once):
    _, read, given = filled(n, at_once=at_once, bits=(16, 16, 16))
    assert all(torch.equal(a, b) for a, b in zip(read, given, strict=True))


@pytest.mark.parametrize("flushes", range(1, 11))
def test_a_block_stands_on_the_stair_of_its_age(flushes):
    layer, _, _ = filled(16 * flushes + 5, at_once=16)
    for stairs in (layer.key_stairs, layer.value_stairs):
        held = [stairs.tokens(stair) for stair in stairs.levels]
        assert held == [16, 16 if flushes > 1 else 0, max(0, 16 * (flushes - 2))]
        assert stairs.newest.shape[-2] == 5


def test_tokens_one_by_one_and_all_at_once_are_stored_alike():
    (one, read, _), (all_, other, _) = filled(100), filled(100, at_once=100)
    assert all(torch.equal(a, b) for a, b in zip(read, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one._tensors(), all_._tensors(), strict=True))


@pytest.mark.reference
@pytest.mark.parametrize("which", [0, 1])
def test_going_down_the_stairs_is_going_to_two_bits_at_once(which):
    _, read, given = filled(112, at_once=16, scales=torch.float32)
    lines = given[which].mT if which == 0 else given[which]
    grouped = lines.unflatten(-1, (-1, 8)).double()
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (most - least) / 3
    direct = (((grouped - least) / step).round() * step + least).flatten(-2)
    direct = direct.mT if which == 0 else direct
    oldest = slice(0, 16 * 5)  # of seven blocks two are above the last stair
    torch.testing.assert_close(read[which][..., oldest, :].double(), direct[..., oldest, :], rtol=1e-4, atol=1e-4)


@pytest.mark.reference
def test_with_two_levels_it_is_kivis_cache():
    """Keys by channel, values by token, asymmetric, the newest S in full precision: written down anew."""

    def by_line(x):
        lines = x.unflatten(-1, (-1, 8))
        least, most = lines.amin(-1, keepdim=True), lines.amax(-1, keepdim=True)
        return (((lines - least) * 3 / (most - least)).round() * (most - least) / 3 + least).flatten(-2)

    _, (keys, values), (k, v) = filled(40, bits=(16, 2), scales=torch.float32)
    whole = slice(0, 32)
    torch.testing.assert_close(keys[..., whole, :], by_line(k[..., whole, :].mT).mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[..., whole, :], by_line(v[..., whole, :]), rtol=1e-4, atol=1e-5)
    assert torch.equal(keys[..., 32:, :], k[..., 32:, :])


@pytest.mark.parametrize("n", [2048, 8192])
def test_the_bytes_are_those_of_the_formula(n):
    layer = StaircaseLayer()
    x = torch.randn(1, 1, n, 64).half()
    layer.update(x, x)
    bits = (128 * (8 + 1) + 128 * (4 + 1) + (n - 256) * (2 + 1)) / n
    assert layer.nbytes == 2 * 64 * n * bits / 8
    assert bits == {2048: 3.5, 8192: 3.125}[n]
    layer.update(x[..., :100, :], x[..., :100, :])
    assert layer.nbytes == 2 * 64 * n * bits / 8 + 2 * 64 * 100 * 2


def test_attention_over_the_cache_is_attention_over_what_it_reads():
    layer, (keys, values), _ = filled(50)
    q = states(1, 3)
    k, v = layer.stored()
    assert torch.equal(k, keys)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, k, v), (q @ keys.mT / 4).softmax(-1) @ values, rtol=1e-5, atol=1e-5
    )


def test_keys_are_stored_unturned_so_that_a_constant_channel_costs_nothing():
    """A key of one large channel: turned, it swings within a group; turned back, it is a constant."""
    keys = torch.zeros(1, 1, 64, 8)
    angles = torch.arange(64) * 0.7
    keys[..., 0], keys[..., 4] = 10 * angles.cos(), 10 * angles.sin()
    given = {"width": 16, "group": 8, "bits": (16, 2)}
    errors = []
    for frequencies in (None, (0.7, 0.0, 0.0, 0.0)):
        layer = StaircaseLayer(**given, frequencies=frequencies)
        read, _ = layer.update(keys, keys)
        errors.append(float((read - keys).abs().max()))
    assert errors[0] > 1
    assert errors[1] < 1e-2


def small(position, **more):
    torch.manual_seed(0)
    config = TransformerConfig(
        architecture="decoder", vocab_size=31, hidden_size=32, num_attention_heads=2, position=position, **more
    )
    return TransformerForCausalLM(config).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: small("rope", num_key_value_heads=1), lambda: small("rope-alibi"), llama])
def test_with_all_bits_generate_says_what_it_says_with_its_own_cache(make):
    model = make()
    ids = torch.randint(31, (2, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    facts = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    own = model.generate(ids, **facts)
    cache = staircase_cache(model=model, width=16, group=8, bits=(16, 16, 16))
    assert torch.equal(model.generate(ids, past_key_values=cache, **facts), own)
    beams = {**facts, "num_beams": 2, "max_new_tokens": 6}
    cache = staircase_cache(model=model, width=16, group=8, bits=(16, 16, 16))
    assert torch.equal(model.generate(ids, past_key_values=cache, **beams), model.generate(ids, **beams))


@pytest.mark.parametrize("make", [lambda: small("rope", num_key_value_heads=1), llama])
def test_with_fewer_bits_the_logits_are_near_and_the_cache_is_small(make):
    model = make()
    ids = torch.randint(31, (1, 300), generator=torch.Generator().manual_seed(0))
    full = DynamicCache(config=model.config) if isinstance(model, LlamaForCausalLM) else model.model.new_cache()
    caches = {"stairs": staircase_cache(model=model, width=16, group=8), "full": full}
    with torch.no_grad():
        last = {}
        for name, cache in caches.items():
            model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
            last[name] = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert not torch.equal(last["stairs"], last["full"])
    torch.testing.assert_close(last["stairs"], last["full"], rtol=0.2, atol=0.1)
    assert sum(layer.nbytes for layer in caches["stairs"].layers) < 0.25 * 2 * 2 * 4 * 300 * 16


def test_rows_are_selected_repeated_and_reordered():
    layer, read, _ = filled(40)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.stored()[0], read[0][[1, 0]])
    layer.batch_repeat_interleave(2)
    assert layer.batch == 4
    layer.batch_select_indices(torch.tensor([0]))
    assert torch.equal(layer.stored()[1], read[1][[1]])


def test_only_tokens_above_the_first_stair_can_be_taken_back():
    layer, read, _ = filled(40)
    layer.crop(-3)
    assert layer.get_seq_length() == 37
    assert torch.equal(layer.stored()[0], read[0][..., :37, :])
    with pytest.raises(UnsupportedContext, match="assisted"):
        layer.crop(-8)
    layer.reset()
    assert layer.stored() is None
    assert layer.nbytes == 0


def test_gradients_are_refused():
    x = states(4).requires_grad_()
    with pytest.raises(UnsupportedContext, match="gradient"):
        StaircaseLayer().update(x, x)


@pytest.mark.parametrize(
    "wrong", [{"group": 12}, {"width": 100}, {"bits": (16,)}, {"bits": (8, 4)}, {"bits": (16, 2, 4)}, {"bits": (16, 3)}]
)
def test_impossible_stairs_are_refused(wrong):
    with pytest.raises(FormwrightError):
        StaircaseLayer(**wrong)


def test_models_it_cannot_serve_are_refused():
    with pytest.raises(FormwrightError, match="keeps keys"):
        staircase_cache(model=small("none", mixer="mamba"))
    with pytest.raises(FormwrightError, match="turns keys"):
        staircase_cache(model=small("rope-ntk(factor=2.0)"))
    with pytest.raises(FormwrightError, match="do not split"):
        StaircaseLayer().update(states(4, d=20), states(4, d=20))


def test_a_cache_of_layers_is_transformers_own():
    cache = staircase_cache(model=llama())
    assert isinstance(cache, Cache)
    assert cache.get_seq_length() == 0
    assert isinstance(quantise(states(8), 4, 8, keys=True, scales=torch.float16), Groups)
