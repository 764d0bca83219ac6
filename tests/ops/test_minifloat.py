"""Minifloats: exact properties, then an enumeration of all values and the formats of ml_dtypes."""

import pytest
import torch

from formwright.errors import FormwrightError
from formwright.ops.minifloat import Minifloat, decode, encode, nearest, pack, quantise, unit, unpack

FORMS = [Minifloat(e, m) for e, m in ((1, 2), (2, 1), (3, 0), (1, 6), (2, 3), (3, 2), (4, 3), (5, 2))]


def numbers(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """All sizes: far below the smallest value to far above the largest, zero, and powers of two."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(63, 7, generator=seeded, dtype=dtype) * torch.exp2(torch.randint(-12, 9, (63, 1), generator=seeded))
    return torch.cat([x.flatten(), torch.zeros(1), torch.exp2(torch.arange(-10.0, 10)), torch.tensor([1e30])]).to(dtype)


def value(s: int, p: int, m: int, form: Minifloat, b: float) -> float:
    """The definition, read literally."""
    digits = m / 2**form.mantissa
    return (-1) ** s * (2.0 ** (p - b) * (1 + digits) if p else 2.0 ** (1 - b) * digits)


def every(form: Minifloat, b: float) -> list[float]:
    return [value(s, p, m, form, b) for s in (0, 1) for p in range(2**form.exponent) for m in range(2**form.mantissa)]


@pytest.mark.parametrize(
    ("form", "b", "positive"),
    [
        (Minifloat(2, 1), 1.0, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (Minifloat(3, 0), 1.0, [0, 1, 2, 4, 8, 16, 32, 64]),
        (Minifloat(1, 2), 0.0, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
    ],
)
def test_the_values_of_the_four_bit_formats(form, b, positive) -> None:
    codes = torch.arange(2**form.bits, dtype=torch.uint8)
    assert decode(codes, form, unit(torch.tensor(b), torch.float64)).tolist() == [*positive, *(-v for v in positive)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_values_are_the_definition_and_at_most_two_to_the_bits_less_one(form) -> None:
    assert form.values() == every(form, 0.0)
    assert len(set(form.values())) == 2**form.bits - 1
    assert max(form.values()) == form.top


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("b", [0.0, 1.0, -2.3, 5.71])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_idempotent_odd_and_what_the_codes_say(form, b, dtype) -> None:
    x, bias = numbers(dtype), torch.tensor(b)
    once = quantise(x, form, bias)
    assert torch.equal(quantise(once, form, bias), once)
    assert torch.equal(quantise(-x, form, bias), -once)
    assert torch.equal(decode(encode(x, form, bias), form, unit(bias, dtype)), once)
    assert torch.equal(encode(once, form, bias), encode(x, form, bias))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_scale_is_a_bias(form) -> None:
    x, b = numbers(torch.float64), torch.tensor(1.37, dtype=torch.float64)
    for t in (-3, 5):  # exact
        assert torch.equal(quantise(x * 2.0**t, form, b), 2.0**t * quantise(x, form, b + t))
    t = torch.tensor(0.613, dtype=torch.float64)
    ours, theirs = quantise(x * torch.exp2(t), form, b), torch.exp2(t) * quantise(x, form, b + t)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_error_of_normal_numbers_is_half_a_step(form) -> None:
    b = torch.tensor(2.2, dtype=torch.float64)
    smallest, largest = 2.0 ** (1 - b), form.top * 2.0**-b
    x = torch.exp2(torch.linspace(float(smallest.log2()), float(largest.log2()), 1001, dtype=torch.float64))
    assert ((quantise(x, form, b) - x).abs() / x).max() <= 2.0 ** -(form.mantissa + 1) * (1 + 1e-12)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_one_exponent_bit_is_the_uniform_grid(bits) -> None:
    form, x = Minifloat(1, bits - 2), numbers(torch.float64)
    largest = torch.tensor(3.7, dtype=torch.float64)
    step = largest / (2 ** (bits - 1) - 1)
    uniform = (x / step).round().clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1) * step
    torch.testing.assert_close(quantise(x, form, form.bias(largest)), uniform, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_bias_of_a_largest_value_puts_it_there_and_all_above_saturates(form) -> None:
    largest = torch.tensor([0.013, 1.0, 77.7], dtype=torch.float64)
    bias = form.bias(largest)
    for x in (largest, largest * 1e6, torch.full_like(largest, torch.inf)):
        torch.testing.assert_close(quantise(x, form, bias), largest, rtol=1e-14, atol=0.0)


def test_small_numbers_get_no_finer_steps() -> None:
    x = torch.tensor([0.24, 0.26, 1e-9])
    assert quantise(x, Minifloat(2, 1), torch.tensor(1.0)).tolist() == [0.0, 0.5, 0.0]


def test_one_bias_a_row() -> None:
    x, bias = torch.randn(3, 5), torch.tensor([[0.0], [1.5], [-2.0]])
    rows = [quantise(row, Minifloat(2, 1), b) for row, b in zip(x, bias, strict=True)]
    assert torch.equal(quantise(x, Minifloat(2, 1), bias), torch.stack(rows))


@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_packing_takes_half_a_byte_a_code_and_gives_it_back(width) -> None:
    codes = torch.randint(16, (3, width), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (3, (width + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, width), codes)


def test_bfloat16_is_rounded_from_float32() -> None:
    x = numbers(torch.bfloat16)
    ours = quantise(x, Minifloat(2, 1), torch.tensor(0.4))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, quantise(x.float(), Minifloat(2, 1), torch.tensor(0.4)).bfloat16())


@pytest.mark.parametrize(("e", "m"), [(0, 3), (2, -1), (4, 4)])
def test_what_is_no_small_float_is_refused(e, m) -> None:
    with pytest.raises(FormwrightError, match=f"E{e}M{m}"):
        Minifloat(e, m)


@pytest.mark.reference
@pytest.mark.parametrize("form", FORMS[:5], ids=str)
@pytest.mark.parametrize("b", [1.0, -2.3, 5.71])
def test_the_nearest_of_all_values(form, b) -> None:
    table = torch.tensor(every(form, b), dtype=torch.float64)
    x = numbers(torch.float64)
    distance = (x[:, None] - table).abs().min(dim=1).values
    ours = quantise(x, form, torch.tensor(b, dtype=torch.float64))
    torch.testing.assert_close((x - ours).abs(), distance, rtol=1e-12, atol=1e-12)
    assert (ours[:, None] - table).abs().min(dim=1).values.max() < 1e-12


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "form", "b"),
    [
        ("float4_e2m1fn", Minifloat(2, 1), 1),
        ("float6_e2m3fn", Minifloat(2, 3), 1),
        ("float6_e3m2fn", Minifloat(3, 2), 3),
        ("float8_e4m3fn", Minifloat(4, 3), 7),
    ],
)
def test_ml_dtypes(name, form, b) -> None:
    theirs = getattr(pytest.importorskip("ml_dtypes"), name)
    # E4M3fn gives its topmost code to NaN, so ours reaches one step further.
    x = numbers() if form.bits < 8 else numbers().clamp(-448, 448)
    ours = quantise(x, form, torch.tensor(float(b)))
    expected = torch.from_numpy(
        x.clamp(-form.top * 2.0**-b, form.top * 2.0**-b).numpy().astype(theirs).astype("float32")
    )
    assert torch.equal(ours, expected)


@pytest.mark.reference
def test_torch_float8() -> None:
    x = numbers().clamp(-448, 448)
    assert torch.equal(quantise(x, Minifloat(4, 3), torch.tensor(7.0)), x.to(torch.float8_e4m3fn).float())


def test_nearest_is_quantising_at_bias_zero() -> None:
    x = numbers()
    assert torch.equal(nearest(x, Minifloat(2, 1)), quantise(x, Minifloat(2, 1), torch.tensor(0.0)))
