"""Receptive fields: theirs by formula, by counting, and of models whose reach is known."""

import math

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM, TransformerModel
from formwright.parts.position.alibi import ALiBi, alibi_slopes
from formwright.parts.position.exploring_extrapolation import Decay
from formwright.parts.position.fire import FIRE, FIRES
from formwright.parts.position.kerple import KERPLE
from formwright.parts.position.roformer import RoPE
from formwright.parts.position.sinusoidal import Sinusoidal
from formwright.parts.position.t5 import T5Bias
from formwright.parts.position.urpe import URPE
from formwright.theory.receptive_field import (
    empirical_receptive_field,
    extrapolates,
    main,
    reach,
    receptive_fields,
    windowed,
)


def kerple(r1, kernel="log"):
    part = KERPLE(heads=2, kernel=kernel)
    part.load_state_dict({"r1": torch.tensor(r1), "r2": torch.tensor([0.5, 0.5])})
    return part


@pytest.mark.parametrize(
    ("position", "verdict"),
    [
        (lambda: None, False),
        (lambda: ALiBi(heads=4), True),
        (lambda: Decay(heads=4, kernel="type-1"), True),
        (lambda: Decay(heads=4, kernel="type-2"), True),
        (lambda: Decay(heads=4, kernel="inverse"), False),
        (lambda: Decay(heads=4, kernel="inverse-log"), False),
        (lambda: kerple([1.5, 1.1]), True),
        (lambda: kerple([1.5, 0.9]), False),
        (lambda: kerple([0.5, 0.9], "power"), True),
        (lambda: T5Bias(dim=16, heads=4, causal=True), False),
        (lambda: FIRE(heads=4), False),
        (lambda: FIRES(heads=4), False),
        (lambda: RoPE(head_dim=8), False),
        (lambda: Sinusoidal(dim=16), False),
        (lambda: URPE(heads=4, length=9, inner="alibi"), True),
        (lambda: URPE(heads=4, length=9, inner="none"), False),
    ],
)
def test_the_criterion(position, verdict):
    made = position()
    assert extrapolates(made) == verdict
    assert all(head.converges for head in reach(made, heads=4, length=100)) == verdict


@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_alibis_fields_are_those_of_its_slopes(epsilon):
    found = reach(ALiBi(heads=4), heads=4, epsilon=epsilon, length=20_000)
    expected = [math.ceil(math.log(1 / epsilon) / slope) for slope in alibi_slopes(4)]
    assert [head.field for head in found] == expected
    assert [head.within for head in found] == expected  # a long text holds nearly the whole sum


@pytest.mark.parametrize(("length", "epsilon"), [(100, 0.1), (100, 0.01), (1, 0.5)])
def test_without_a_bias_a_share_of_the_text_is_reached(length, epsilon):
    for position in (None, RoPE(head_dim=8), Sinusoidal(dim=16)):
        found = reach(position, heads=3, epsilon=epsilon, length=length)
        assert len(found) == 3
        assert {head.within for head in found} <= {round((1 - epsilon) * length), round((1 - epsilon) * length) + 1}
        assert all(math.isinf(head.field) for head in found)


@pytest.mark.parametrize("position", [T5Bias(dim=16, heads=4, causal=True), FIRE(heads=4, threshold=20.0)])
def test_a_learned_bias_is_read_off_the_part(position):
    from formwright.contracts import Context, dense

    with torch.no_grad():
        for parameter in position.parameters():
            parameter.mul_(3)
        row = dense(position.bias(Context(queries=1, keys=200, causal=True)))[0, :, 0].flip(-1).double().exp()
    for weights, head in zip(row, reach(position, heads=4, epsilon=0.05, length=200), strict=True):
        beyond = [float(weights[j:].sum() / weights.sum()) for j in range(201)]
        assert head.within == next(j for j in range(201) if beyond[j] < 0.05)


def test_factors_count_too():
    plain, part = (URPE(heads=2, length=50, causal=True, inner="alibi") for _ in range(2))
    with torch.no_grad():
        part.c[5:] = 0
    assert [head.within for head in reach(plain, heads=2, length=400)] == [
        head.within for head in reach(ALiBi(heads=2), heads=2, length=400)
    ]
    assert max(head.within for head in reach(part, heads=2, length=400)) <= 5


def decoder(position="none", layers=2, kind=TransformerForCausalLM, **more):
    torch.manual_seed(0)
    config = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32} | more
    return kind(TransformerConfig(architecture="decoder", num_hidden_layers=layers, position=position, **config)).eval()


@pytest.mark.parametrize(
    "position",
    ["none", "alibi", "rope", "kerple", "t5", "fire(threshold=8)", "fire-s(threshold=8)", "urpe", "sinusoidal"],
)
def test_a_window_hides_what_is_beyond_and_nothing_else(position):
    model = decoder(position, layers=1)
    ids = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, :10] = (ids[:, :10] + 1) % 11
    with torch.no_grad():
        full = model(ids).logits
        with windowed(model, 20):
            torch.testing.assert_close(model(ids).logits, full)
        with windowed(model, 5):
            near, changed = model(ids).logits, model(other).logits
            torch.testing.assert_close(near[:, :5], full[:, :5])
        torch.testing.assert_close(near[:, 14:], changed[:, 14:])
        assert not torch.allclose(near[:, 13], changed[:, 13])
        torch.testing.assert_close(model(ids).logits, full)  # and everything is as before


def reads_back(distance):
    """A decoder of one layer that looks at the token `distance` places back and foretells it."""
    model = decoder("decay", layers=1, hidden_size=22, num_attention_heads=1, tie_word_embeddings=False)
    body = model.model
    mixer = body.decoder.layers[0].block.mixer

    class Back(torch.nn.Module):
        def bias(self, context):
            lags = context.query_positions()[0][:, None] - torch.arange(context.keys)
            return torch.where(lags == distance, 50.0, 0.0)[None, None]

    mixer.position = Back()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        body.embeddings.tokens.weight[:, :11] = torch.eye(11)
        for module in model.modules():
            if hasattr(module, "eps"):
                module.weight.fill_(1.0)
        mixer.query_key_value.weight[44:55, :11] = torch.eye(11)
        mixer.out.weight[11:, :11] = 5 * torch.eye(11)
        model.lm_head.weight[:, 11:] = 5 * torch.eye(11)
    return model


@pytest.mark.parametrize("distance", [1, 3, 7])
def test_a_model_that_reads_so_many_tokens_back_has_that_field(distance):
    """In a text that repeats every distance + 1 tokens the next token is that of `distance` places back."""
    word = torch.randperm(11, generator=torch.Generator().manual_seed(0))[: distance + 1]
    ids = word.repeat(12)[None, :40]
    assert empirical_receptive_field(reads_back(distance), ids) == distance + 1


def test_a_model_that_heeds_nothing_has_a_field_of_one():
    model = decoder()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.block.mixer.out.weight.zero_()
            layer.block.mixer.out.bias.zero_()
    model.train()
    assert empirical_receptive_field(model, torch.randint(11, (1, 9))) == 1
    assert model.training


def test_every_layer_of_a_model_is_listed():
    found = receptive_fields(decoder(["alibi", "decay(kernel=inverse)", "none"], layers=3), length=100)
    assert [[head.converges for head in layer] for layer in found] == [[True] * 2, [False] * 2, [False] * 2]


def test_a_saved_model_is_read_from_the_command_line(tmp_path, capsys):
    decoder("alibi", kind=TransformerModel).save_pretrained(tmp_path)
    main([str(tmp_path), "--length", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["layer", "head", "converges", "field", "field within the length"]
    assert lines[1].split("\t") == ["0", "0", "yes", "74", "47"]
    assert len(lines) == 5


def encoder():
    return TransformerModel(
        TransformerConfig(architecture="encoder", vocab_size=5, hidden_size=16, num_attention_heads=2)
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: reach(None, heads=1, epsilon=1.0), "epsilon is 1.0"),
        (lambda: reach(None, heads=1, length=0), "length is 0"),
        (lambda: receptive_fields(encoder()), "TransformerModel is none"),
        (lambda: receptive_fields(decoder(mixer="aft-simple")), "Layer 0 mixes tokens by AFTSimple"),
        (lambda: windowed(decoder(), 0).__enter__(), "window is 0"),
    ],
)
def test_what_cannot_be_is_a_sentence(call, says):
    with pytest.raises(FormwrightError, match=says):
        call()
