"""Measurements whose answers are counted by hand."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from formwright.bench import measure
from formwright.contracts import Context


class Line(nn.Module):
    """One matrix of d x d and the sum of what it gives."""

    def __init__(self, dim=100, attends=False):
        super().__init__()
        self.matrix, self.attends = nn.Linear(dim, dim, bias=False), attends

    def forward(self, x):
        y = self.matrix(x)
        if self.attends:
            y = F.scaled_dot_product_attention(y[None, None], y[None, None], y[None, None])
        return types.SimpleNamespace(loss=y.sum(), logits=y)


def test_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False))
    model[1].weight = model[0].weight
    model[0].weight.requires_grad_(False)
    assert measure.parameters(model) == (49, 0)
    assert measure.disk(model) < 2 * 49 * 4 + 200


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rows", [1, 7, 63])
def test_flops_are_two_a_multiply_add_on_every_device(device, rows):
    model, x = Line(attends=True).to(device), torch.zeros(rows, 100, device=device)
    assert measure.flops(model, {"x": x}) == 2 * rows * 100 * 100 + 2 * 2 * rows * rows * 100


def test_a_part_adds_what_torch_cannot_see():
    class Part(nn.Module):
        def forward(self, x, context):
            return x + context.keys

        def extra_flops(self, context):
            return 3 * context.keys

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Part(), Part()])

        def forward(self, x):
            for part in self.parts:
                x = part(x, Context.of(x))
            return x

    assert measure.flops(Model(), {"x": torch.zeros(5, 7, 2)}) == 2 * 5 * 3 * 7


def test_peak_memory_is_what_lives_at_once():
    a = torch.zeros(50, 50)  # 10,000 bytes

    def run():
        b = a @ a
        c = b @ a
        del b
        return c @ a

    assert measure.peak_memory(run, held=[a]) == 30_000


def test_a_view_holds_no_memory_of_its_own():
    a = torch.zeros(50, 50)
    assert measure.peak_memory(lambda: a.t()[:10].reshape(-1, 2, 5)[0], held=[a]) == 10_000 + 2_000


def test_a_training_step_holds_weights_gradients_and_two_moments():
    model, batch = Line(), {"x": torch.zeros(1, 100)}
    weights = 100 * 100 * 4
    peak = measure.step_memory(model, batch)
    assert 4 * weights <= peak <= 6.1 * weights
    assert measure.forward_memory(model, batch) < 1.1 * weights


def test_measuring_leaves_the_model_as_it_was():
    model, batch = Line(), {"x": torch.randn(3, 100)}
    before, state = model.matrix.weight.clone(), torch.get_rng_state()
    measure.cost(model, batch)
    assert torch.equal(model.matrix.weight, before)
    assert model.matrix.weight.grad is None
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_latency_is_a_ratio_to_the_first():
    small, large = torch.randn(16, 16), torch.randn(400, 400)
    found = measure.latency({"small": lambda: small @ small, "large": lambda: large @ large}, rounds=5, least=1e-3)
    assert found["small"][1] == 1.0
    assert found["large"][1] > 3
    assert found["large"][0] > found["small"][0] > 0
