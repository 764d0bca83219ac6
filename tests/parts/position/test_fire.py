"""FIRE: exact properties, then an independent implementation."""

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext, dense
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.position.alibi import ALiBi
from formwright.parts.position.fire import EPSILON, FIRE, FIRES


def part(*, threshold=16.0, heads=4, seed=0, kind=FIRE, **options):
    torch.manual_seed(seed)
    return kind(heads=heads, threshold=threshold, **options)


def ratio(made, n, queries=None):
    """z by its definition, (queries, n)."""
    i, j = torch.arange(n)[-(queries or n) :, None].float(), torch.arange(n).float()
    c, limit = made.c.abs(), made.limit()
    top = torch.log(c * (i - j).abs() + 1)
    return (i - j).sign() * top / (torch.log(c * torch.maximum(limit, torch.maximum(i, j)) + 1) + EPSILON)


def network(made, z):
    """f with all its hidden units."""
    return made.out(made.hidden(z[..., None]).relu()).movedim(-1, 0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 63), (7, 7), (63, 63), (9, 40)])
@pytest.mark.parametrize("threshold", [16.0, 512.0])
def test_the_bias_is_the_network_of_the_ratio(queries, keys, threshold):
    made = part(threshold=threshold)
    found = dense(made.bias(Context(queries=queries, keys=keys)))[0]
    torch.testing.assert_close(found, network(made, ratio(made, keys, queries)), atol=1e-6, rtol=1e-5)


def test_gradients_are_the_networks():
    made = part().double()
    cotangent = torch.randn(4, 40, 40, dtype=torch.float64)
    (dense(made.bias(Context(queries=40, keys=40)))[0] * cotangent).sum().backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    (network(made, ratio(made, 40).double()) * cotangent).sum().backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(
            found[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert p.grad.abs().max() > 0


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.0, 2.0], [1e-9, -3.0], [4.0, 4.0]])
def test_units_without_a_kink_or_with_one_in_common_are_counted_too(weights):
    made = part(heads=2, width=2)
    with torch.no_grad():
        made.hidden.weight.copy_(torch.tensor(weights)[:, None])
        made.hidden.bias.copy_(torch.tensor([0.5, -1.0]))
    z = torch.linspace(-1, 1, 101)
    torch.testing.assert_close(made.function(z).T, network(made, z), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_what_the_network_sees_is_from_0_to_1_at_any_length(n):
    made = part()
    lags = torch.arange(n)
    z = made._ratio(lags[:, None] - lags, torch.maximum(torch.maximum(lags[:, None], lags).float(), made.limit()))
    past = z.tril()
    assert past.min() >= 0
    assert past.max() <= 1 + 1e-6
    assert z.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("threshold", [16.0, 512.0])
def test_a_longer_text_leaves_earlier_rows_as_they_are(threshold):
    made = part(threshold=threshold)
    short, long = (dense(made.bias(Context(queries=n, keys=n)))[0] for n in (64, 256))
    torch.testing.assert_close(short, long[:, :64, :64], atol=1e-6, rtol=1e-5)
    step = dense(made.bias(Context(queries=1, keys=64, causal=True)))[0]
    torch.testing.assert_close(step[:, 0], long[:, 63, :64], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("n", "diagonal"), [(16, True), (17, True), (18, False)])
def test_it_is_toeplitz_as_long_as_no_position_is_beyond_the_threshold(n, diagonal):
    found = part(threshold=16.0).bias(Context(queries=n, keys=n))
    assert isinstance(found, Toeplitz) == diagonal
    full = dense(found)[0]
    assert torch.allclose(full[:, 1:, 1:], full[:, :-1, :-1], atol=1e-6) == diagonal


def test_given_positions_count_from_the_start_of_the_text():
    made = part()
    positions = torch.stack([torch.arange(40), torch.arange(40) + 7])
    found = made.bias(Context(queries=9, keys=40, positions=positions))
    torch.testing.assert_close(found[0], dense(made.bias(Context(queries=9, keys=40)))[0], atol=1e-6, rtol=1e-5)
    later = dense(made.bias(Context(queries=9, keys=47)))[0]
    torch.testing.assert_close(found[1], later[:, :, 7:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_c_and_the_threshold_count_by_their_size(sign):
    made, plain = part(), part()
    with torch.no_grad():
        made.c.mul_(sign)
        made.multiple.mul_(sign)
    context = Context(queries=40, keys=40)
    torch.testing.assert_close(made.bias(context), plain.bias(context))


def test_the_threshold_learns_from_rows_below_it_alone():
    """Later rows are divided by their own position."""
    made = part(threshold=15.5)
    past = torch.ones(40, 40).tril()
    for rows, learns in ((slice(0, 16), True), (slice(16, None), False)):
        made.zero_grad()
        (made.bias(Context(queries=40, keys=40)) * past)[:, :, rows].square().sum().backward()
        assert bool(made.multiple.grad != 0) == learns
        assert made.c.grad != 0


def test_with_the_distance_as_it_is_a_network_of_this_kind_is_alibi():
    """psi(x) = x in place of the logarithm and positions up to L: f(x / L) = -slope L (x / L)."""
    alibi, made = ALiBi(heads=4), part(threshold=64.0)
    made.psi = lambda x: x
    with torch.no_grad():
        for weight in (made.hidden.weight, made.hidden.bias, made.out.weight, made.out.bias):
            weight.zero_()
        made.hidden.weight[0] = 1.0
        made.out.weight[:, 0] = -64.0 * torch.tensor(alibi.slopes)
    context = Context(queries=64, keys=64, causal=True)
    ours, theirs = made.bias(context).dense().tril(), alibi.bias(context).dense().tril()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "width"), [(4, 32), (12, 8)])
def test_the_number_of_parameters_is_the_papers(heads, width):
    made = part(heads=heads, width=width)
    assert sum(p.numel() for p in made.parameters()) == 2 * width + width * heads + heads + 2


def model(position, layers=3, **more):
    torch.manual_seed(0)
    config = {"vocab_size": 11, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64} | more
    return TransformerForCausalLM(
        TransformerConfig(architecture="decoder", num_hidden_layers=layers, position=position, **config)
    ).eval()


def test_every_layer_has_its_own_and_fire_s_one_for_all():
    own = model("fire").model.decoder
    assert len({id(layer.block.mixer.position.c) for layer in own.layers}) == 3
    one = model("fire-s").model.decoder
    assert sum(isinstance(module, FIRES) for module in one.modules()) == 1
    assert all(layer.uses_position and layer.block.mixer.position is None for layer in one.layers)


def test_fire_s_makes_its_bias_once_a_pass(monkeypatch):
    calls = []
    made = FIRE.bias
    monkeypatch.setattr(FIRE, "bias", lambda self, context: calls.append(1) or made(self, context))
    ids = torch.randint(11, (2, 30))
    built = model("fire-s(threshold=8)")
    built(ids)
    assert len(calls) == 1
    built(ids)
    assert len(calls) == 2


@pytest.mark.parametrize("position", ["fire(threshold=8)", "fire-s(threshold=8)", "urpe(inner=fire-s)"])
def test_a_decoder_with_a_cache_equals_the_full_pass(position):
    built = model(position)
    ids = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = built(ids, use_cache=False).logits
        step = built(ids[:, :5], use_cache=True)
        found = [step.logits]
        for t in range(5, 30):
            step = built(ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            found.append(step.logits)
    torch.testing.assert_close(torch.cat(found, 1), full, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", ["fire(threshold=8)", "fire-s(threshold=8)"])
def test_gradients_with_checkpointing_are_those_without(position):
    ids = torch.randint(11, (2, 30), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in (False, True):
        built = model(position).train()
        if checkpointing:
            built.gradient_checkpointing_enable()
        built(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in built.named_parameters() if "position" in name})
    assert found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_bfloat16_model_measures_in_fp32():
    made = part().bfloat16()
    found = made.bias(Context(queries=1, keys=3000))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, made.float().bias(Context(queries=1, keys=3000)))


@pytest.mark.reference
@pytest.mark.parametrize("n", [1, 7, 63])
def test_equal_to_a_network_of_scikit_learn(n):
    """Their multilayer perceptron with our weights, on the ratio computed in numpy."""
    numpy = pytest.importorskip("numpy")
    neural = pytest.importorskip("sklearn.neural_network")
    made = part(threshold=16.0)
    theirs = neural.MLPRegressor(hidden_layer_sizes=(32,), activation="relu", max_iter=1)
    theirs.partial_fit(numpy.zeros((4, 1)), numpy.zeros((4, 4)))  # sizes of one input and four outputs
    layers = [made.hidden, made.out]
    theirs.coefs_ = [layer.weight.detach().double().numpy().T for layer in layers]
    theirs.intercepts_ = [layer.bias.detach().double().numpy() for layer in layers]
    i, j = numpy.arange(n)[:, None], numpy.arange(n)[None]
    furthest = numpy.maximum(16.0, i)
    z = numpy.log(0.1 * numpy.maximum(i - j, 0) + 1) / (numpy.log(0.1 * furthest + 1) + 1e-6)
    expected = torch.from_numpy(theirs.predict(z.reshape(-1, 1)).reshape(n, n, 4)).movedim(-1, 0)
    found = dense(made.bias(Context(queries=n, keys=n, causal=True)))[0].double()
    past = torch.ones(n, n, dtype=torch.bool).tril()
    torch.testing.assert_close(found[:, past], expected[:, past], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("asked", "says"), [({"memory": torch.zeros(1, 5, 8)}, "cross"), ({"grid": (2, 2)}, "grid")])
def test_what_it_cannot_honour_raises(asked, says):
    with pytest.raises(UnsupportedContext, match=says):
        FIRE(heads=4).bias(Context(queries=4, keys=4, **asked))


@pytest.mark.parametrize("options", [{"heads": 0}, {"width": 0}, {"threshold": 0.0}, {"c": 0.0}])
def test_impossible_options_are_named(options):
    with pytest.raises(FormwrightError, match="FIRE needs heads and width from 1"):
        FIRE(**({"heads": 4} | options))
