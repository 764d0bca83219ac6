"""T5 bias: exact properties, then an independent implementation."""

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel
from formwright.parts.position.t5 import T5Bias, t5_buckets


def test_near_distances_have_a_bucket_each():
    assert t5_buckets(torch.arange(16), causal=True).tolist() == list(range(16))
    assert t5_buckets(torch.arange(8)).tolist() == list(range(8))
    assert t5_buckets(-torch.arange(1, 8)).tolist() == list(range(17, 24))


def test_far_distances_share_the_last_bucket():
    assert t5_buckets(torch.tensor([127, 128, 10**6]), causal=True).tolist() == [31, 31, 31]
    assert t5_buckets(torch.tensor([128, 10**6, -128, -(10**6)])).tolist() == [15, 15, 31, 31]


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_never_fall_with_distance_and_all_are_used(causal):
    past = t5_buckets(torch.arange(500), causal=causal)
    assert (past.diff() >= 0).all()
    ahead = t5_buckets(-torch.arange(500), causal=causal)
    assert torch.cat((past, ahead)).unique().numel() == (32 if causal else 31)  # 16 would be "0 steps ahead"


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (63, 63), (3, 200)])
def test_given_positions_find_what_the_diagonals_hold(causal, queries, keys):
    part = T5Bias(dim=8, heads=3, causal=causal)
    diagonals = part.bias(Context(queries=queries, keys=keys, causal=causal))
    positions = torch.arange(keys).expand(2, keys) + 1000
    given = part.bias(Context(queries=queries, keys=keys, causal=causal, positions=positions))
    assert isinstance(diagonals, Toeplitz)
    assert torch.equal(given[1], diagonals.dense())


@pytest.mark.reference
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000)])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 300), (300, 300)])
def test_equal_to_transformers(causal, buckets, max_distance, queries, keys):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    from transformers import T5Config

    config = T5Config(
        d_model=16,
        num_heads=4,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        is_decoder=causal,
    )
    theirs = modeling.T5Attention(config, has_relative_attention_bias=True)
    ours = T5Bias(dim=16, heads=4, causal=causal, buckets=buckets, max_distance=max_distance)
    ours.load_state_dict({"weight": theirs.relative_attention_bias.weight})
    expected = theirs.compute_bias(queries, keys, past_seen_tokens=keys - queries)
    got = ours.bias(Context(queries=queries, keys=keys, causal=causal)).dense()[None]
    assert torch.equal(got, expected)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        torch.autograd.grad(got, ours.weight, cotangent)[0],
        torch.autograd.grad(expected, theirs.relative_attention_bias.weight, cotangent)[0],
        atol=1e-4,  # sums of up to 300 * 300 numbers in another order
        rtol=1e-5,
    )


def test_first_values_scale_with_the_width():
    torch.manual_seed(0)
    assert T5Bias(dim=400, heads=1000).weight.std().item() == pytest.approx(0.05, rel=0.02)


@pytest.mark.reference
@pytest.mark.parametrize(("queries", "memory", "past"), [(5, 200, 0), (200, 5, 0), (1, 200, 40)])
def test_in_cross_attention_equal_to_transformers_buckets_between_queries_and_memory(queries, memory, past):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    from transformers import T5Config

    config = T5Config(d_model=16, num_heads=4)  # both directions
    theirs = modeling.T5Attention(config, has_relative_attention_bias=True)
    ours = T5Bias(dim=16, heads=4)
    ours.load_state_dict({"weight": theirs.relative_attention_bias.weight})
    expected = theirs.compute_bias(queries, memory, past_seen_tokens=past)
    context = Context(
        queries=queries,
        keys=memory,
        memory=torch.zeros(1, memory, 16),
        query_places=torch.arange(past, past + queries)[None] if past else None,
    )
    assert torch.equal(ours.bias(context), expected)


@pytest.mark.reference
def test_t5_itself_has_no_bias_in_cross_attention():
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    from transformers import T5Config

    theirs = modeling.T5LayerCrossAttention(T5Config(d_model=16, num_heads=4))
    assert not theirs.EncDecAttention.has_relative_attention_bias
    decoder = TransformerModel(TransformerConfig(architecture="encoder-decoder", position="t5")).decoder
    assert decoder.cross_position is None


def translator(cross_position):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = TransformerConfig(architecture="encoder-decoder", position="t5", cross_position=cross_position, **sizes)
    return TransformerModel(config).eval()


@torch.no_grad()
def test_a_decoder_that_reads_a_memory_by_distance_decodes_step_by_step_and_skips_left_pads():
    model, plain = translator("t5(buckets=8)"), translator("none")
    ids, target = torch.randint(0, 11, (2, 9)), torch.randint(0, 11, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    memory = {"attention_mask": mask, "encoder_outputs": model.encode(ids, mask)}
    full = model(decoder_input_ids=target, use_cache=False, **memory).last_hidden_state
    cache, steps = model.new_cache(), []
    for piece in target.split([4, 1, 2], dim=1):
        steps.append(model(decoder_input_ids=piece, past_key_values=cache, **memory).last_hidden_state)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-5)
    alone = model(ids[1:, 4:], decoder_input_ids=target[1:], use_cache=False).last_hidden_state
    torch.testing.assert_close(full[1:], alone, atol=1e-5, rtol=1e-5)
    model.decoder.cross_position.weight.zero_()
    silent = model(decoder_input_ids=target, use_cache=False, **memory).last_hidden_state
    assert not torch.allclose(silent, full, atol=1e-3)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(plain(decoder_input_ids=target, use_cache=False, **memory).last_hidden_state, silent)


def test_a_position_added_to_the_tokens_is_none_for_cross_attention():
    with pytest.raises(UnsupportedContext, match="give it as position"):
        translator("sinusoidal")


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"memory": torch.zeros(1, 5, 8)}, "cross"), ({"grid": (2, 2)}, "grid"), ({"causal": False}, "both directions")],
)
def test_what_it_cannot_honour_raises(asked, says):
    with pytest.raises(UnsupportedContext, match=says):
        T5Bias(dim=8, heads=4, causal=True).bias(Context(**{"queries": 4, "keys": 4, "causal": True} | asked))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"buckets": 6}, "multiple of 4"),
        ({"causal": True, "buckets": 3}, "multiple of 2"),
        ({"max_distance": 8}, "> 8"),
    ],
)
def test_impossible_options_are_named(options, says):
    with pytest.raises(FormwrightError, match=says):
        T5Bias(dim=8, heads=4, **options)
