"""The native kernels against plain tensor operations, and what packing promises."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from formwright.ops import varlen
from formwright.ops.varlen import add_norm, add_norm_reference, varlen_attention, varlen_attention_reference

LENGTHS = [5, 1, 0, 17, 61, 130, 33, 16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

needs_kernels = pytest.mark.skipif(varlen._attention() is None, reason="The native kernels are not built.")


def border(lengths: list[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


def packed(heads: int, width: int, lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(sum(lengths), 3 * heads * width).to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("heads", "width"), [(3, 8), (2, 32), (2, 64), (1, 80), (2, 7), (1, 1)])
@pytest.mark.parametrize("window", [None, 0, 3, 20])
@pytest.mark.parametrize("more", ["nothing", "bias", "rotation"])
def test_the_kernel_equals_the_plain_form(dtype, heads, width, window, more) -> None:
    if more == "rotation":
        width += width % 2  # pairs of features are turned
    qkv, cu = packed(heads, width, LENGTHS, dtype), border(LENGTHS)
    angle = torch.rand(140, width // 2).repeat(1, 2)
    given = {
        "nothing": {},
        "bias": {"bias": torch.randn(heads, 140, 140)},
        "rotation": {"rotation": (angle.cos(), angle.sin())},
    }[more]
    given |= {"heads": heads, "scaling": width**-0.5, "window": window, "weigh": True}
    mixed, received = varlen_attention(qkv, cu, **given)
    expected, weights = varlen_attention_reference(qkv.float(), cu, **given)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), expected, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    torch.testing.assert_close(received, weights, atol=CLOSE[dtype] / 10, rtol=CLOSE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", CLOSE)
def test_weighing_changes_nothing_of_the_result(dtype) -> None:
    qkv, cu = packed(2, 32, LENGTHS, dtype), border(LENGTHS)
    plain, _ = varlen_attention(qkv, cu, heads=2, scaling=0.2)
    weighed, received = varlen_attention(qkv, cu, heads=2, scaling=0.2, weigh=True)
    torch.testing.assert_close(plain, weighed, atol=CLOSE[dtype] / 10, rtol=0.0)
    shares = [float(received[start:end].sum()) for start, end in itertools.pairwise(cu.tolist()) if end > start]
    assert shares == pytest.approx([1.0] * len(shares), abs=1e-3)


@pytest.mark.reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_text_sees_no_other(dtype) -> None:
    """Against one padded call of PyTorch with a mask."""
    heads, width = 2, 16
    qkv, cu = packed(heads, width, [4, 9, 1], dtype), border([4, 9, 1])
    mixed, _ = varlen_attention(qkv, cu, heads=heads, scaling=width**-0.5)
    text = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 9, 1]))
    q, k, v = qkv.view(14, 3, heads, width).permute(1, 2, 0, 3)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=text[:, None] == text)
    close = 1e-12 if dtype == torch.float64 else CLOSE[dtype]
    torch.testing.assert_close(mixed, whole.transpose(0, 1).flatten(1), atol=close, rtol=close)


@needs_kernels
def test_large_scores_stay_finite() -> None:
    for dtype in CLOSE:
        qkv = packed(1, 16, [40], dtype) * 60
        mixed, _ = varlen_attention(qkv, border([40]), heads=1, scaling=1.0)
        assert mixed.isfinite().all()


def test_no_text_and_no_token() -> None:
    mixed, received = varlen_attention(torch.empty(0, 24), border([0, 0]), heads=2, scaling=1.0, weigh=True)
    assert mixed.shape == (0, 8)
    assert received.shape == (0,)


@needs_kernels
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("width", [384, 30, 7])
@pytest.mark.parametrize(("centred", "shifted"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("added", [True, False])
def test_the_norm_equals_the_plain_form(dtype, width, centred, shifted, added) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 77, width).to(dtype)
    gain, shift = torch.randn(2, width)
    given = {"eps": 1e-5, "centred": centred, "total": added}
    residual, shift = residual if added else None, shift if shifted else None
    normal, total = add_norm(x, residual, gain, shift, **given)
    wide = None if residual is None else residual.float()
    expected, summed = add_norm_reference(x.float(), wide, gain, shift, **given)
    torch.testing.assert_close(normal.float(), expected, atol=2 * CLOSE[dtype], rtol=CLOSE[dtype])
    if added:
        torch.testing.assert_close(total.float(), summed, atol=CLOSE[dtype], rtol=CLOSE[dtype])
    else:
        assert total is None
