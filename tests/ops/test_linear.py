"""The product through oneDNN against PyTorch's own, forward and backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from formwright.ops import linear as module
from formwright.ops.linear import linear, project


@pytest.fixture
def everywhere(monkeypatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN here.")
    monkeypatch.setattr(module, "onednn_is_quicker", lambda: True)
    monkeypatch.setattr(module, "LEAST", 0)


def results(function, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    given = [one if one is None else one.detach().clone().requires_grad_() for one in (x, weight, bias)]
    y = function(*given)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(one.grad for one in given if one is not None)]


@pytest.mark.reference
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (12,)])
@pytest.mark.parametrize("outputs", [5, 40])
@pytest.mark.parametrize("biased", [True, False])
def test_it_equals_pytorchs_own(shape, outputs, biased) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(outputs, shape[-1]), torch.randn(outputs)
    for ours, theirs in zip(
        results(linear, x, weight, bias if biased else None),
        results(F.linear, x, weight, bias if biased else None),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_only_what_is_asked_for_gets_a_gradient() -> None:
    layer = nn.Linear(6, 4)
    layer.weight.requires_grad_(False)
    project(layer, torch.randn(3, 6)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.tolist() == [3.0] * 4


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast_are_pytorchs(dtype) -> None:
    layer, x = nn.Linear(6, 4).to(dtype), torch.randn(3, 6).to(dtype)
    assert torch.equal(project(layer, x), F.linear(x, layer.weight, layer.bias))
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert project(layer, x).dtype == torch.bfloat16


@pytest.mark.usefixtures("everywhere")
def test_transforms_and_compilers_see_pytorchs_own() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return project(self.layer, x)

    around, x = Around(), torch.randn(3, 6)
    assert torch.func.vmap(around)(x).shape == (3, 4)
    assert "mkldnn" not in torch.export.export(around, (x,)).graph_module.code


@pytest.mark.usefixtures("everywhere")
def test_a_layer_that_is_watched_or_another_runs_by_itself(monkeypatch) -> None:
    layer, x, seen = nn.Linear(6, 4), torch.randn(3, 6), []
    expected = layer(x)
    hook = layer.register_forward_hook(lambda *given: seen.append(given))
    torch.testing.assert_close(project(layer, x), expected)
    assert len(seen) == 1
    hook.remove()
    monkeypatch.setattr(module, "linear", lambda *_: pytest.fail("It is no plain layer."))
    assert project(nn.Identity(), x) is x


@pytest.mark.usefixtures("everywhere")
def test_its_operations_are_counted() -> None:
    x, weight = torch.randn(256, 128, requires_grad=True), torch.randn(128, 128, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 256 * 128 * 128
