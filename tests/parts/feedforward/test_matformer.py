"""MatFormer's layer: exact properties, then transformers' own layers as twins."""

import pytest
import torch
from torch import nn

from formwright.build import build
from formwright.errors import FormwrightError
from formwright.parts.feedforward.matformer import MatFormerFeedForward
from formwright.parts.feedforward.mlp import ReLUMLP

FORMS = ("gelu", "gelu-tanh", "relu", "swiglu", "geglu")


def layer(form="gelu", hidden=32, seed=0, **options):
    torch.manual_seed(seed)
    return MatFormerFeedForward(dim=8, hidden=hidden, form=form, **options).double()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("hidden", "granularities", "widths"),
    [(32, 4, [4, 8, 16, 32]), (13, 3, [3, 6, 13]), (7, 1, [7]), (8, 4, [1, 2, 4, 8])],
)
def test_granularities_are_halvings_rounded_down(hidden, granularities, widths):
    assert layer(hidden=hidden, granularities=granularities).widths == widths


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_largest_is_the_plain_layer_and_each_smaller_one_a_plain_layer_of_the_first_units(form, bias):
    nested, x = layer(form, bias=bias), tokens(2, 7, 8)
    for granularity, width in enumerate(nested.widths, 1):
        nested.granularity = granularity
        plain = build("feedforward", form, dim=8, hidden=width, bias=bias).double()
        plain.load_state_dict(nested.cut(granularity))
        torch.testing.assert_close(nested(x), plain(x), rtol=1e-12, atol=1e-12)


def units(nested, width):
    """The weights of the hidden units from `width` on: rows of up (of the gate, too) and columns of down."""
    up, down = nested.layer.up, nested.layer.down
    rows = [part[width:] for one in (up.weight, up.bias) for part in one.chunk(2 if nested.gated else 1)]
    return [*rows, down.weight[:, width:]]


@pytest.mark.parametrize("form", ["relu", "swiglu"])
@pytest.mark.parametrize("granularity", [1, 2, 3])
def test_later_units_are_neither_read_nor_trained(form, granularity):
    nested, x = layer(form), tokens(2, 7, 8)
    nested.granularity = granularity
    width = nested.widths[granularity - 1]
    before = nested(x)
    with torch.no_grad():
        for unit in units(nested, width):
            unit.fill_(float("nan"))
    y = nested(x)
    assert torch.equal(y, before)
    y.square().sum().backward()
    gradients = layer(form)
    with torch.no_grad():
        for mine, its in zip(gradients.parameters(), nested.parameters(), strict=True):
            mine.copy_(its.grad)
    assert not any(unit.any() for unit in units(gradients, width))
    assert all(unit.any() for unit in (gradients.layer.up.weight[0], gradients.layer.down.weight[:, 0]))
    assert gradients.layer.down.bias.all()


def test_the_output_bias_is_added_whole():
    nested = layer("relu")
    nested.granularity = 1
    with torch.no_grad():
        nested.layer.up.weight.zero_()
        nested.layer.up.bias.zero_()
        nested.layer.down.bias.copy_(torch.arange(8))
    assert torch.equal(nested(tokens(1, 2, 8)), torch.arange(8).double().expand(1, 2, 8))


def test_the_granularity_stays_until_another_is_chosen():
    nested, x = layer(), tokens(2, 7, 8)
    nested.granularity = 2
    assert torch.equal(nested(x), nested(x))
    assert nested.granularity == 2


def test_what_is_impossible_is_refused():
    with pytest.raises(FormwrightError, match="hidden=7"):
        layer(hidden=7, granularities=4)
    with pytest.raises(FormwrightError, match="granularities=0"):
        layer(granularities=0)
    with pytest.raises((FormwrightError, TypeError), match="geglu"):
        layer("polynorm")
    nested = layer()
    nested.layer.down = nn.Sequential(nested.layer.down)
    nested(tokens(1, 2, 8))
    nested.granularity = 1
    with pytest.raises(FormwrightError, match="Sequential is none"):
        nested(tokens(1, 2, 8))


@pytest.mark.reference
@pytest.mark.parametrize("granularity", [1, 3, 4])
def test_a_gated_layer_equals_a_llama_layer_of_the_cut_weights(granularity):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    width = 4 * 2 ** (granularity - 1)
    config = llama.LlamaConfig(hidden_size=8, intermediate_size=width, hidden_act="silu", num_attention_heads=2)
    theirs, ours, x = llama.LlamaMLP(config).double(), layer("swiglu", bias=False), tokens(2, 7, 8)
    ours.granularity = granularity
    gate, value = ours.layer.up.weight.chunk(2)
    with torch.no_grad():
        theirs.gate_proj.weight.copy_(gate[:width])
        theirs.up_proj.weight.copy_(value[:width])
        theirs.down_proj.weight.copy_(ours.layer.down.weight[:, :width])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.reference
def test_it_equals_a_plain_layer_whose_later_units_are_masked():
    """ReLU of a later unit forced to 0 by its weights: masking in place of slicing."""
    nested, x = layer("relu"), tokens(2, 7, 8)
    nested.granularity = 2
    masked = ReLUMLP(dim=8, hidden=32).double()
    masked.load_state_dict(nested.layer.state_dict())
    with torch.no_grad():
        masked.up.weight[8:] = 0
        masked.up.bias[8:] = 0
    torch.testing.assert_close(nested(x), masked(x), rtol=1e-12, atol=1e-12)
