"""The two-matrix layer: its equation, its activations, and GPT-2's."""

import pytest
import torch
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from formwright.errors import FormwrightError
from formwright.parts.feedforward.mlp import GELUMLP, ReLUMLP, TanhGELUMLP


@pytest.mark.parametrize("kind", [ReLUMLP, GELUMLP, TanhGELUMLP])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_two_matrices_with_an_activation_between(kind, bias):
    layer, x = kind(dim=6, hidden=10, bias=bias).double(), torch.randn(2, 7, 6, dtype=torch.double)
    act = {
        ReLUMLP: lambda t: t.clamp(min=0),
        GELUMLP: lambda t: t * torch.special.ndtr(t),
        TanhGELUMLP: lambda t: t / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))),
    }[kind]
    hidden = x @ layer.up.weight.T + (layer.up.bias if bias else 0)
    torch.testing.assert_close(layer(x), act(hidden) @ layer.down.weight.T + (layer.down.bias if bias else 0))
    assert sum(weight.numel() for weight in layer.parameters()) == 120 + (16 if bias else 0)


@pytest.mark.reference
def test_the_tanh_one_equals_gpt2():
    theirs, ours = GPT2MLP(10, GPT2Config(n_embd=6, resid_pdrop=0.0)).eval(), TanhGELUMLP(dim=6, hidden=10)
    with torch.no_grad():
        for mine, other in ((ours.up, theirs.c_fc), (ours.down, theirs.c_proj)):
            mine.weight.copy_(other.weight.T), mine.bias.copy_(other.bias)
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_layer_without_neurons_is_refused():
    with pytest.raises(FormwrightError, match="at least 1"):
        GELUMLP(dim=6, hidden=0)
