"""Cutting what carries least: the right parts go, and a model of zeroed parts keeps its outputs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.anatomy import describe
from formwright.compress.modifier import Data
from formwright.compress.prune.structured import importance, weakest_heads, weakest_neurons
from formwright.compress.structure import load
from formwright.errors import FormwrightError

from .. import zoo


@pytest.fixture
def data() -> Data:
    rows = TensorDataset(torch.arange(1, 9).repeat(6, 1) + torch.arange(6)[:, None])
    task = SimpleNamespace(
        name="rows", head="causal-lm", train=rows, validation=None, test=rows, score=None, summary=None,
        collate=lambda items: {"input_ids": torch.stack([one[0] for one in items])},
    )  # fmt: skip
    return Data(task=task, kind="causal-lm")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "modernbert"])
def test_parts_of_zeros_go_first_and_nothing_changes(family: str, data: Data) -> None:
    model = zoo.build(family)
    for layer in describe(model).layers:
        down = model.get_submodule(layer.feedforward.down)
        out = model.get_submodule(layer.attention.output)
        for module, count in ((down, 6), (out, layer.attention.heads // 2 * layer.attention.head_dim)):
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            weight.data[:, :count] = 0
    before = zoo.outputs(model, family)
    pipeline.apply(model, build("modifier", "cut(neurons=0.25, heads=0.5)"), data)
    torch.testing.assert_close(zoo.outputs(model, family), before, atol=1e-5, rtol=1e-5)
    layer = describe(model).layers[0]
    assert (layer.feedforward.width, layer.attention.heads) == (18, 2)


def test_the_weakest_are_found() -> None:
    model = zoo.build("bert")
    layer = describe(model).layers[0]
    model.get_submodule(layer.feedforward.up).weight.data[[3, 7]] *= 1e-3
    model.get_submodule(layer.attention.value).weight.data[4:8] *= 1e-3
    assert weakest_neurons(model, layer.feedforward, 2 / 24) == [3, 7]
    assert weakest_heads(model, layer.attention, 0.25) == [1]
    assert len(weakest_neurons(model, layer.feedforward, 0.99)) == 23


def test_the_layer_that_does_nothing_goes(tmp_path, data: Data) -> None:
    model = zoo.build("llama")
    block = model.model.layers[1]
    for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
        weight.data.zero_()
    scores = importance(model, data, 2)
    assert scores[1] == pytest.approx(0, abs=1e-6)
    assert min(scores[0], scores[2]) > 1e-3
    before = zoo.outputs(model, "llama")
    pipeline.apply(model, build("modifier", "cut(layers=1)"), data)
    torch.testing.assert_close(zoo.outputs(model, "llama"), before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(zoo.outputs(load(tmp_path).eval(), "llama"), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", ["cut", "cut(neurons=1.0)", "cut(layers=-1)", "cut(heads=-0.1)"])
def test_what_makes_no_sense_is_refused(spec: str) -> None:
    with pytest.raises(FormwrightError):
        build("modifier", spec)


def test_a_model_cannot_lose_all_layers(data: Data) -> None:
    with pytest.raises(FormwrightError, match="would leave none"):
        pipeline.apply(zoo.build("bert"), build("modifier", "cut(layers=3)"), data)
    with pytest.raises(FormwrightError, match="one and the same"):
        importance(zoo.build("albert"), data, 1)
