"""Gated layers: the equation, the parameters, and LLaMA's."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerModel
from formwright.parts.feedforward.glu import GEGLU, SwiGLU


@pytest.mark.parametrize("kind", [SwiGLU, GEGLU])
def test_one_projection_gates_the_other(kind):
    layer, x = kind(dim=6, hidden=10).double(), torch.randn(2, 7, 6, dtype=torch.double)
    gate, value = (x @ weight.T for weight in layer.up.weight.split(10))
    gate = gate * gate.sigmoid() if kind is SwiGLU else gate * torch.special.ndtr(gate)
    torch.testing.assert_close(layer(x), (gate * value) @ layer.down.weight.T)


@pytest.mark.reference
def test_swiglu_equals_llama():
    theirs = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=2, hidden_act="silu"))
    ours = SwiGLU(dim=6, hidden=10)
    with torch.no_grad():
        ours.up.weight.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
        ours.down.weight.copy_(theirs.down_proj.weight)
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(ours(x), theirs(x))


def test_by_default_it_has_two_thirds_of_the_hidden_width():
    def parameters(name):
        model = TransformerModel(TransformerConfig(hidden_size=48, feedforward=name))
        return sum(weight.numel() for weight in model.encoder.layers[0].block.feedforward.parameters())

    assert parameters("swiglu") == 3 * 48 * 128 == parameters("gelu(bias=false)")


def test_a_layer_without_neurons_is_refused():
    with pytest.raises(FormwrightError, match="at least 1"):
        SwiGLU(dim=6, hidden=0)
