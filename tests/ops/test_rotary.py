"""Rotary linear attention: chunks and running sums against all n x n weights. Plain rotation: test_roformer.py."""

import pytest
import torch

from formwright.ops.rotary import rotary_angles, rotary_linear_attention, rotary_linear_attention_reference, rotation


def draw(n, d=8, e=6):
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(2, 3, n, width, generator=generator, dtype=torch.float64) for width in (d, d, e)]


def angles_at(n, start=0, d=8):
    return rotary_angles(torch.arange(start, start + n)[None], dim=d, dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 7, 63, 64, 200])
def test_equal_to_all_weights_written_out_with_gradients(causal, n):
    ours, theirs = ([x.requires_grad_() for x in draw(n)] for _ in range(2))
    out = rotary_linear_attention(*ours, rotation(angles_at(n)), causal=causal)
    expected = rotary_linear_attention_reference(*theirs, angles_at(n), causal=causal)
    torch.testing.assert_close(out, expected)
    cotangent = torch.ones_like(out).cumsum(-1)
    torch.testing.assert_close(
        torch.autograd.grad(out, ours, cotangent), torch.autograd.grad(expected, theirs, cotangent)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_a_common_shift_changes_nothing_and_a_single_one_does(causal):
    q, k, v = draw(63)
    here, there = (rotary_linear_attention(q, k, v, rotation(angles_at(63, s)), causal=causal) for s in (0, 1000))
    torch.testing.assert_close(here, there)
    plain = rotary_linear_attention(q, k, v, None, causal=causal)
    assert not torch.allclose(here, plain)


def test_without_rotation_the_weights_are_a_distribution():
    q, k, _ = draw(63)
    ones = torch.ones(2, 3, 63, 1, dtype=torch.float64)
    torch.testing.assert_close(rotary_linear_attention(q, k, ones, None, causal=True), ones)


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_the_chunk_moves_nothing(chunk):
    q, k, v = draw(63)
    by = rotation(angles_at(63))
    torch.testing.assert_close(
        rotary_linear_attention(q, k, v, by, causal=True, chunk=chunk),
        rotary_linear_attention(q, k, v, by, causal=True),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_padded_keys_have_no_part_and_lonely_rows_give_zero(causal):
    q, k, v = draw(9)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :4] = False
    padding[1, 7:] = False
    out = rotary_linear_attention(q, k, v, rotation(angles_at(9)), causal=causal, padding=padding)
    expected = rotary_linear_attention_reference(q, k, v, angles_at(9), causal=causal, padding=padding)
    torch.testing.assert_close(out, expected.nan_to_num())
    assert not causal or torch.equal(out[0, :, :4], torch.zeros_like(out[0, :, :4]))


def test_half_precision_sums_in_fp32():
    q, k, v = (x.bfloat16() for x in draw(200))
    by = rotation(rotary_angles(torch.arange(200)[None], dim=8))
    out = rotary_linear_attention(q, k, v, by, causal=True)
    assert out.dtype == torch.bfloat16
    expected = rotary_linear_attention(q.float(), k.float(), v.float(), by, causal=True)
    assert torch.equal(out, expected.bfloat16())
