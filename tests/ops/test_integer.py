"""Integer arithmetic: the paper's errors, exact identities, both carriers; then transformers' I-BERT modules."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from formwright.ops.integer import (
    dyadic,
    i_exp,
    i_gelu,
    i_layernorm,
    i_softmax,
    i_sqrt,
    i_tanh,
    int_matmul,
    padded,
    quantise,
    requantise,
    scale_of,
)

S = 2.0**-12


class WholeNumbers(TorchDispatchMode):
    """Fails where a tensor of floats goes in or comes out."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            assert not (isinstance(one, torch.Tensor) and one.is_floating_point()), function
        return result


def drawn(*shape, top, seed=0):
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed))


def test_gelu_is_within_the_papers_error_and_exact_far_out():
    q = torch.arange(-8 * 2**12, 8 * 2**12 + 1)
    value, unit = i_gelu(q, S)
    x = q.double() * S
    assert (value * unit - torch.nn.functional.gelu(x)).abs().max() <= 0.0183
    far = x.abs() / math.sqrt(2) >= 1.7695
    torch.testing.assert_close((value.double() * unit)[far], x.clamp_min(0)[far], atol=8 * 2.0**-14, rtol=0)


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**-12, 2.0**-16, 3e-5])
def test_gelu_keeps_its_error_at_every_scale_of_an_accumulator(scale):
    q = torch.arange(-round(4 / scale), round(4 / scale) + 1, max(1, round(2.0**-10 / scale)))
    value, unit = i_gelu(q, scale)
    assert (value * unit - torch.nn.functional.gelu(q.double() * scale)).abs().max() <= 0.0195


def test_exp_is_within_the_papers_error_below_zero():
    q = torch.arange(-25 * 2**12, 1)
    value, unit = i_exp(q, S)
    assert (value * unit - (q.double() * S).exp()).abs().max() <= 2.2e-3


def test_tanh_is_odd_bounded_and_close():
    q = torch.arange(-10 * 2**12, 10 * 2**12 + 1, 3)
    value, unit = i_tanh(q, S)
    assert torch.equal(value, -i_tanh(-q, S)[0])
    assert value.abs().max() <= 2**15
    assert (value * unit - (q.double() * S).tanh()).abs().max() <= 2.5e-3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sqrt_is_isqrt(dtype):
    powers = [2**k for k in range(31)]
    numbers = {0, 1, *powers, *(p - 1 for p in powers), *(k * k - 1 for k in range(1, 46000, 77))}
    numbers |= set(torch.randint(2**31 - 1, (3000,), generator=torch.Generator().manual_seed(0)).tolist())
    if dtype == torch.int64:
        numbers |= {2**56, 2**56 - 1, (2**27 + 3) ** 2 - 1, (2**27 + 3) ** 2}
    n = torch.tensor(sorted(numbers), dtype=dtype)
    assert i_sqrt(n).tolist() == [math.isqrt(one) for one in n.tolist()]


@pytest.mark.parametrize("ratio", [1.0, 0.5, 3e-4, -7e-3, 1.7e-9, 12.3, 1e-30, 0.0])
def test_requantisation_rounds_the_real_product(ratio):
    q = drawn(5000, top=2**31 - 1)
    m, e = dyadic(torch.tensor(ratio, dtype=torch.float64))
    expected = torch.floor(q.double() * ratio + 0.5)
    found = requantise(q, m, e, 40)
    assert (found - expected.clamp(-(2**39), 2**39 - 1)).abs().max() <= 1 + abs(ratio) * 2
    small = requantise(q, m, e, 8)
    assert small.min() >= -128
    assert small.max() <= 127


def test_an_offset_is_rounded_once_with_the_product():
    m, e = dyadic(torch.tensor([0.25, 0.0], dtype=torch.float64))
    offset = (torch.tensor([0.25, 3.4], dtype=torch.float64) * 2.0**e).round().long()
    assert requantise(torch.tensor([[1, 9]]), m, e, 8, offset).tolist() == [[1, 3]]  # 0.25 + 0.25 is half, up


@pytest.mark.parametrize("keys", [1, 7, 63])
def test_softmax_rows_sum_to_one_but_for_the_floors(keys):
    p = i_softmax(drawn(50, keys, top=4 * 2**12), S)
    total = p.double().sum(-1) / 256
    assert total.max() <= 1
    assert total.min() >= 1 - keys / 256 - 1e-4
    real = (drawn(50, keys, top=4 * 2**12).double() * S).softmax(-1)
    assert (p / 256 - real).abs().max() <= 0.01


def test_a_larger_score_is_never_less_probable():
    q = drawn(40, 33, top=6 * 2**12)
    order = q.argsort(-1)
    assert (i_softmax(q, S).gather(-1, order).diff(dim=-1) >= 0).all()


def test_masked_keys_get_nothing_and_change_nothing():
    q = drawn(3, 9, top=2**14)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[:, 6:] = False
    q[:, 7] = 2**15  # the largest, and masked
    p = i_softmax(q, S, mask)
    assert torch.equal(p[:, :6], i_softmax(q[:, :6], S))
    assert not p[:, 6:].any()
    assert not i_softmax(q, S, torch.zeros_like(mask)).any()


@pytest.mark.parametrize("width", [1, 7, 64, 768])
@pytest.mark.parametrize("bits", [16, 22])
def test_layernorm_is_layernorm(width, bits):
    q = drawn(20, width, top=2 ** (bits - 1) - 1)
    value, unit = i_layernorm(q)
    assert (value * unit - torch.nn.functional.layer_norm(q.double(), (width,))).abs().max() <= 1e-2


def test_layernorm_of_equal_numbers_is_zero():
    assert not i_layernorm(torch.full((2, 7), 900))[0].any()


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (7, 5, 3), (31, 33, 9), (17, 8, 8)])
def test_products_are_exact_also_with_zeros_around(m, k, n):
    a, b = drawn(m, k, top=127).to(torch.int8), drawn(k, n, top=127, seed=1).to(torch.int8)
    assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long())
    wide_a, wide_b = padded(a, b)
    assert wide_a.shape[0] > 16
    assert all(size % 8 == 0 for size in (*wide_a.shape, *wide_b.shape))
    assert torch.equal(int_matmul(wide_a, wide_b)[:m, :n].long(), a.long() @ b.long())


FUNCTIONS = {
    "exp": lambda q: i_exp(-q.abs(), S)[0],
    "softmax": lambda q: i_softmax(q, S, q[:1].abs() < 2**14),
    "gelu": lambda q: i_gelu(q, S)[0],
    "tanh": lambda q: i_tanh(q, S)[0],
    "sqrt": lambda q: i_sqrt(q.abs()),
    "layernorm": lambda q: i_layernorm(q)[0],
    "requantise": lambda q: requantise(q, torch.tensor(1518500250), torch.tensor(40), 8),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integers_stay_integers_and_floats_carry_the_same_numbers(name):
    q = drawn(11, 29, top=2**15)
    carried = FUNCTIONS[name](q.double().requires_grad_())
    with WholeNumbers():
        whole = FUNCTIONS[name](q)
    assert torch.equal(whole, carried.long())


@pytest.mark.parametrize(
    ("name", "smooth"),
    [
        ("exp", lambda x: (-x.abs()).exp()),
        ("gelu", torch.nn.functional.gelu),
        ("tanh", torch.tanh),
        ("layernorm", lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:])),
        ("softmax", lambda x: x.softmax(-1)),
    ],
)
def test_gradients_are_those_of_the_function(name, smooth):
    functions = {
        "exp": lambda q: i_exp(-q.abs(), S),
        "gelu": lambda q: i_gelu(q, S),
        "tanh": lambda q: i_tanh(q, S),
        "layernorm": i_layernorm,
        "softmax": lambda q: (i_softmax(q, S), 2.0**-8),
    }
    q = drawn(4, 9, top=2**13).double().requires_grad_()
    x = (q.detach() * S).requires_grad_()
    weight = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    value, unit = functions[name](q)
    (ours,) = torch.autograd.grad((value * unit * weight).sum(), q)
    (theirs,) = torch.autograd.grad((smooth(x) * weight).sum(), x)
    assert ((ours / S) - theirs).abs().max() <= 0.1 * theirs.abs().max()


def test_quantised_weights_stay_within_their_bits_and_half_a_step():
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = scale_of(x.abs().amax(1, keepdim=True), 8)
    q = quantise(x, scale, 8)
    assert q.abs().amax(1).tolist() == [127.0] * 6
    assert ((q * scale - x).abs() <= scale / 2 + 1e-12).all()
    assert not quantise(torch.zeros(3), scale_of(torch.zeros(()), 8), 8).any()


@pytest.mark.reference
def test_the_functions_are_those_of_transformers():
    modules = pytest.importorskip("transformers.models.ibert.quant_modules")
    scale = torch.tensor([1e-3], dtype=torch.float64)
    q = drawn(3, 5, 31, top=4000)
    x = q.double() * scale
    theirs, _ = modules.IntGELU(quant_mode=True)(x, scale)
    value, unit = i_gelu(q, 1e-3)
    assert (value * unit - theirs).abs().max() <= 8e-3  # two shifts of erf
    softmax = modules.IntSoftmax(8, quant_mode=True).double().train()
    theirs, _ = softmax(x, scale)
    assert (i_softmax(q, 1e-3) / 256 - theirs).abs().max() <= 2 / 256
    norm = modules.IntLayerNorm(31, 1e-5, quant_mode=True).double().eval()
    norm.weight.data.fill_(1)
    theirs, _ = norm(x, scale)
    value, unit = i_layernorm(q)
    assert (value * unit - theirs).abs().max() <= 1e-3


@pytest.mark.reference
def test_dyadic_numbers_are_those_of_transformers():
    modules = pytest.importorskip("transformers.models.ibert.quant_modules")
    ratio = torch.tensor([1.0, 0.5, 3e-4, 7e-3, 1.7e-6, 12.3], dtype=torch.float64)
    m, e = modules.batch_frexp(ratio)
    ours = dyadic(ratio)
    assert torch.equal(ours[0], torch.as_tensor(m).long())
    assert torch.equal(ours[1], torch.as_tensor(e).long())
