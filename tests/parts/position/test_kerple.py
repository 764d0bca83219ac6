"""KERPLE: exact properties."""

import pytest
import torch

from formwright.contracts import Context, Toeplitz, UnsupportedContext
from formwright.errors import FormwrightError
from formwright.parts.position.alibi import ALiBi
from formwright.parts.position.kerple import KERPLE


def with_numbers(kernel, r1, r2):
    part = KERPLE(heads=len(r1), kernel=kernel)
    part.load_state_dict({"r1": torch.tensor(r1), "r2": torch.tensor(r2)})
    return part


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 63)])
def test_both_kernels_are_the_papers(queries, keys):
    r1, r2 = [0.5, 1.5], [0.25, 1.75]
    distance = (torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)).abs().float()
    context = Context(queries=queries, keys=keys)
    for head in range(2):
        log = with_numbers("log", r1, r2).bias(context).dense()[head]
        torch.testing.assert_close(log, -r1[head] * torch.log(1 + r2[head] * distance))
        power = with_numbers("power", r1, r2).bias(context).dense()[head]
        torch.testing.assert_close(power, -r1[head] * distance ** r2[head])


def test_alibi_is_the_power_kernel_with_exponent_one():
    alibi = ALiBi(heads=4, max_bias=4.0)
    context = Context(queries=7, keys=9)
    ours = with_numbers("power", alibi.slopes, [1.0] * 4).bias(context).dense()
    torch.testing.assert_close(ours, alibi.bias(context).dense())


@pytest.mark.parametrize("kernel", ["log", "power"])
def test_given_positions_find_what_the_diagonals_hold(kernel):
    part = KERPLE(heads=3, kernel=kernel)
    positions = torch.arange(9).expand(2, 9) + 1000
    given = part.bias(Context(queries=4, keys=9, positions=positions))
    diagonals = part.bias(Context(queries=4, keys=9))
    assert isinstance(diagonals, Toeplitz)
    torch.testing.assert_close(given[1], diagonals.dense())


@pytest.mark.parametrize("kernel", ["log", "power"])
def test_a_number_below_its_limit_is_used_at_the_limit_and_still_learns(kernel):
    part = with_numbers(kernel, [-1.0], [-1.0])
    bias = part.bias(Context(queries=7, keys=7)).dense()
    torch.testing.assert_close(bias, with_numbers(kernel, [0.01], [0.01]).bias(Context(queries=7, keys=7)).dense())
    bias.sum().backward()
    assert part.r1.grad.isfinite().all()
    assert part.r2.grad.isfinite().all()
    assert part.r1.grad.abs().min() > 0
    assert part.r2.grad.abs().min() > 0


def test_only_the_exponent_has_an_upper_limit():
    context = Context(queries=7, keys=7)
    far = with_numbers("power", [9.0], [9.0]).bias(context).dense()
    torch.testing.assert_close(far, with_numbers("power", [9.0], [2.0]).bias(context).dense())
    far = with_numbers("log", [1.0], [9.0]).bias(context).dense()
    assert not torch.allclose(far, with_numbers("log", [1.0], [2.0]).bias(context).dense())


def test_gradients_equal_finite_differences():
    for kernel in ("log", "power"):
        part = with_numbers(kernel, [0.5, 1.5], [0.25, 1.75]).double()
        context = Context(queries=3, keys=5)

        def bias(r1, r2, part=part, context=context):
            return torch.func.functional_call(_Bias(part), {"part.r1": r1, "part.r2": r2}, (context,))

        assert torch.autograd.gradcheck(bias, (part.r1, part.r2))


class _Bias(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, context):
        return self.part.bias(context).dense()


def test_first_values_fill_the_releases_ranges():
    torch.manual_seed(0)
    for kernel, most in (("log", (2.0, 1.0)), ("power", (1.0, 2.0))):
        part = KERPLE(heads=1000, kernel=kernel)
        for r, top in zip((part.r1, part.r2), most, strict=True):
            assert r.min().item() == pytest.approx(0, abs=0.02)
            assert r.max().item() == pytest.approx(top, abs=0.02)


def test_a_bfloat16_model_measures_distance_in_fp32():
    bias = with_numbers("log", [1.0], [1.0]).bfloat16().bias(Context(queries=1, keys=3000)).dense()
    torch.testing.assert_close(bias[0, 0], -torch.log(1 + torch.arange(2999.0, -1, -1)))


@pytest.mark.parametrize(("asked", "says"), [({"memory": torch.zeros(1, 5, 8)}, "cross"), ({"grid": (2, 2)}, "grid")])
def test_what_it_cannot_honour_raises(asked, says):
    with pytest.raises(UnsupportedContext, match=says):
        KERPLE(heads=4).bias(Context(queries=4, keys=4, **asked))


def test_impossible_options_are_named():
    with pytest.raises(FormwrightError, match="heads >= 1"):
        KERPLE(heads=0)
    with pytest.raises((FormwrightError, TypeError), match="power"):  # the type first where types are checked
        KERPLE(heads=1, kernel="exp")
