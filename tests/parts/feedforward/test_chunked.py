"""Chunks change memory and nothing else."""

import pytest
import torch

from formwright.bench.measure import peak_memory
from formwright.build import build
from formwright.errors import FormwrightError
from formwright.parts.feedforward.chunked import ChunkedFeedForward


def layer(**options):
    torch.manual_seed(0)
    return ChunkedFeedForward(dim=8, hidden=32, **options)


@pytest.mark.reference
@pytest.mark.parametrize("form", ["gelu", "gelu-tanh", "relu", "swiglu", "geglu"])
@pytest.mark.parametrize("tokens", [3, 8, 21])
def test_the_outputs_and_gradients_are_those_of_the_whole_layer(form, tokens):
    part, x = layer(form=form, chunk=4), torch.randn(2, tokens, 8)
    found, expected = (one.train()(x) for one in (part, part.layer))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(part.parameters())) for y in (found, expected)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(part.eval()(x), expected)


def test_the_hidden_layer_exists_for_a_chunk_alone():
    x = torch.randn(1, 512, 8, requires_grad=True)
    whole, chunked = (
        peak_memory(lambda chunk=chunk: layer(chunk=chunk).train()(x).square().sum().backward(), held=[x])
        for chunk in (512, 32)
    )
    assert chunked < 0.5 * whole


def test_bad_options_are_sentences():
    with pytest.raises(FormwrightError, match="chunk=0"):
        layer(chunk=0)
    with pytest.raises(FormwrightError, match="form is 'moe'"):
        build("feedforward", "chunked(form=moe)", dim=8, hidden=32)
