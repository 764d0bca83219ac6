"""Scaled RoPE: exact properties, then transformers' tables."""

import math

import pytest
import torch

from formwright.contracts import Context, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.position.roformer import RoPE
from formwright.parts.position.yarn import DynamicRoPE, LinearRoPE, NTKRoPE, YaRN

ROW, COLUMN = torch.arange(12) // 6, torch.arange(12) % 6
KINDS = (LinearRoPE, NTKRoPE, DynamicRoPE, YaRN)


def rates(part, keys=8):
    """Radians a step of every pair, in float64."""
    return part.rates(part.rotary_dim, torch.full((1, 1, 1), keys, dtype=torch.float64)).flatten()


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_one_is_rope(kind):
    x, context = draw(1, 2, 63, 16), Context(queries=63, keys=63)
    assert torch.equal(
        kind(head_dim=16, factor=1.0).rotate(x, x, context)[0], RoPE(head_dim=16).rotate(x, x, context)[0]
    )


def test_interpolation_puts_far_positions_where_training_had_them():
    x = draw(1, 2, 9, 16)
    slow = LinearRoPE(head_dim=16, factor=4.0).rotate(
        x, x, Context(queries=9, keys=9, positions=4 * torch.arange(9)[None])
    )
    torch.testing.assert_close(slow, RoPE(head_dim=16).rotate(x, x, Context(queries=9, keys=9)))


@pytest.mark.parametrize("base", [100.0, 10000.0])
def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_by_the_factor(base):
    plain, scaled = (
        rates(part) for part in (RoPE(head_dim=16, base=base), NTKRoPE(head_dim=16, base=base, factor=8.0))
    )
    assert scaled[0] == plain[0] == 1
    assert (plain[-1] / scaled[-1]).item() == pytest.approx(8)
    assert ((plain / scaled).diff() > 0).all()


def test_dynamic_is_rope_up_to_the_trained_length_and_ntk_beyond():
    part = DynamicRoPE(head_dim=16, trained=10, factor=2.0)
    assert torch.equal(rates(part, keys=10), rates(RoPE(head_dim=16)))
    torch.testing.assert_close(rates(part, keys=25), rates(NTKRoPE(head_dim=16, factor=2 * 2.5 - 1)))


def test_dynamic_gives_every_row_the_frequencies_of_its_own_length():
    part, x = DynamicRoPE(head_dim=16, trained=4), draw(2, 2, 9, 16)
    padding = torch.arange(9) >= torch.tensor([[3], [0]])
    for positions in (None, (padding.long().cumsum(-1) - 1).clamp(min=0)):
        q, _ = part.rotate(x, x, Context(queries=9, keys=9, padding=padding, positions=positions))
        alone, _ = part.rotate(x[1:], x[1:], Context(queries=9, keys=9))
        torch.testing.assert_close(q[1:], alone)
    row, _ = part.rotate(x[:1, :, 3:], x[:1, :, 3:], Context(queries=6, keys=6))
    torch.testing.assert_close(q[:1, :, 3:], row)


def steps_and_passes(model, lengths, kv_heads=None, layers=1):
    """The last token's logits, decoded with a cache and by a pass over all so far, at every length."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    config = TransformerConfig(architecture="decoder", position=model, num_hidden_layers=layers, **sizes)
    lm, ids = TransformerForCausalLM(config).double().eval(), torch.randint(0, 11, (2, lengths[-1]))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        cache, start = lm.model.new_cache(), 0
        for end in lengths:
            stepped = lm(ids[:, start:end], past_key_values=cache, use_cache=True).logits[:, -1]
            yield end, stepped, lm(ids[:, :end], use_cache=False).logits[:, -1]
            start = end


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_dynamic_step_turns_all_keys_as_its_query(kv_heads):
    for _, stepped, whole in steps_and_passes("rope-dynamic(trained=4)", (3, 4, 5, 8, 9), kv_heads):
        torch.testing.assert_close(stepped, whole)


def test_beyond_the_trained_length_what_earlier_tokens_became_stays():
    for end, stepped, whole in steps_and_passes("rope-dynamic(trained=4)", (3, 4, 5, 8, 9), layers=2):
        away = (stepped - whole).abs().max()
        assert away < 1e-12 if end <= 4 else 1e-9 < away < 0.05


@pytest.mark.parametrize("name", ["rope-linear", "rope-ntk", "rope-yarn(trained=4)"])
def test_a_fixed_stretch_decodes_as_one_pass(name):
    for _, stepped, whole in steps_and_passes(name, (3, 4, 5, 8, 9), kv_heads=2, layers=2):
        torch.testing.assert_close(stepped, whole)


def test_dynamic_turns_all_keys_or_none():
    new = draw(1, 2, 1, 16)
    with pytest.raises(UnsupportedContext, match="1 of 9 keys"):
        DynamicRoPE(head_dim=16).rotate(new, new, Context(queries=1, keys=9))


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    part = YaRN(head_dim=64, factor=8.0, trained=4096)
    slowed = rates(RoPE(head_dim=64)) / rates(part)
    turns = 4096 * rates(RoPE(head_dim=64)) / (2 * math.pi)
    assert (slowed[turns > 45] == 1).all()  # 32 turns, rounded outwards to a whole pair
    torch.testing.assert_close(slowed[turns < 0.7], torch.full_like(slowed[turns < 0.7], 8))
    assert (slowed.diff() >= 0).all()


def test_yarn_multiplies_scores_by_its_squared_temperature():
    x, context = draw(1, 2, 7, 16), Context(queries=7, keys=7)
    sharp, even = (YaRN(head_dim=16, factor=8.0, temperature=t).rotate(x, x, context) for t in (None, 1.0))
    torch.testing.assert_close(sharp[0] @ sharp[1].mT, (even[0] @ even[1].mT) * (0.1 * math.log(8) + 1) ** 2)


def test_on_a_grid_the_trained_length_is_an_axis():
    part, x = DynamicRoPE(head_dim=16, trained=4), draw(1, 2, 12, 16)
    context = Context(queries=12, keys=12, grid=(2, 6))
    short = RoPE(head_dim=8).rotate(x[..., :8], x[..., :8], Context(queries=12, keys=12, positions=ROW[None]))[0]
    long = NTKRoPE(head_dim=8, factor=1.5).rotate(
        x[..., 8:], x[..., 8:], Context(queries=12, keys=12, positions=COLUMN[None])
    )[0]
    torch.testing.assert_close(part.rotate(x, x, context)[0], torch.cat((short, long), -1))


@pytest.mark.reference
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize(
    ("name", "kind", "options", "seen"),
    [
        ("linear", LinearRoPE, {"factor": 4.0}, 300),
        ("dynamic", DynamicRoPE, {"factor": 2.0, "trained": 128}, 100),
        ("dynamic", DynamicRoPE, {"factor": 2.0, "trained": 128}, 300),
        ("dynamic", NTKRoPE, {"factor": 4 * 300 / 128 - 3}, 300),
        ("yarn", YaRN, {"factor": 4.0, "trained": 128}, 300),
        ("yarn", YaRN, {"factor": 16.0, "trained": 4096}, 300),
        ("yarn", YaRN, {"factor": 4.0, "trained": 512, "fast": 16.0, "slow": 2.0, "temperature": 1.5}, 300),
    ],
)
def test_equal_to_transformers(name, kind, options, seen, base, fraction):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    theirs = {"rope_type": name, "rope_theta": base, "partial_rotary_factor": fraction}
    theirs["factor"] = 4.0 if kind is NTKRoPE else options["factor"]
    trained = options.get("trained", 128)
    if name == "yarn":
        theirs["original_max_position_embeddings"] = trained
        theirs |= {"beta_fast": options.get("fast", 32.0), "beta_slow": options.get("slow", 1.0)}
        if "temperature" in options:
            theirs["attention_factor"] = options["temperature"]
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=trained if name == "dynamic" else int(trained * options["factor"]),
        rope_parameters=theirs,
    )
    expected, gain = rope_utils.ROPE_INIT_FUNCTIONS[name](config, device=torch.device("cpu"), seq_len=seen)
    part = kind(head_dim=64, base=base, fraction=fraction, **options)
    torch.testing.assert_close(rates(part, keys=seen).float(), expected, atol=0, rtol=2e-6)
    assert part.gain == pytest.approx(gain)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: LinearRoPE(head_dim=8, factor=0.5), "factor >= 1"),
        (lambda: DynamicRoPE(head_dim=8, trained=0), "from 1"),
        (lambda: YaRN(head_dim=8, fast=1.0, slow=2.0), "0 < slow < fast"),
        (lambda: YaRN(head_dim=8, temperature=0.0), "temperature above 0"),
    ],
)
def test_impossible_options_are_named(build, says):
    with pytest.raises(FormwrightError, match=says):
        build()
