"""Selective scan: chunked and native against the plain recurrence, with every gradient, and exact limits."""

import os
import subprocess
import sys

import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from formwright.ops import native
from formwright.ops import selective_scan as ops
from formwright.ops.selective_scan import selective_scan, selective_scan_chunked, selective_scan_reference


@pytest.fixture
def untyped(monkeypatch):
    """No shape checks: they wrap functions in code that dynamo cannot trace."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


needs_native = pytest.mark.skipif(native.library() is None, reason=f"The native kernels are {native.describe()}.")
SIZES = [(1, 1, 1, 1), (2, 7, 5, 3), (2, 63, 9, 16), (1, 300, 33, 4), (5, 65, 8, 16)]  # b, l, c, n


def inputs(batch, length, channels, states, dtype=torch.float32):
    g = torch.Generator().manual_seed(length)
    x, delta, B, C, D, state = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in [
            (batch, length, channels),
            (batch, length, channels),
            (batch, length, states),
            (batch, length, states),
            (channels,),
            (batch, channels, states),
        ]
    )
    A = -4 * torch.rand(channels, states, generator=g, dtype=torch.float64) - 0.1
    return [values.to(dtype) for values in (x, F.softplus(delta - 1), A, B, C, D, state)]


def outputs_and_gradients(scan, values, **options):
    leaves = [value.clone().requires_grad_() for value in values]
    y, h = scan(*leaves[:6], state=leaves[6], **options)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=g, dtype=torch.float64).to(out) for out in (y, h)]
    loss = (y * weights[0]).sum() + (h * weights[1]).sum()
    return [y.detach(), h.detach(), *torch.autograd.grad(loss, leaves)]


NAMES = ["y", "h", "dx", "ddelta", "dA", "dB", "dC", "dD", "dstate"]


def assert_same(ours, theirs, tolerance):
    for name, our, their in zip(NAMES, ours, theirs, strict=True):
        error = (our.double() - their).abs().max() / their.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_chunked_equals_the_recurrence_in_double_precision(size, discretization, monkeypatch):
    monkeypatch.setattr(
        ops, "CHUNK_ELEMENTS", 16 * size[0] * size[2] * size[3]
    )  # chunks of 16 tokens: several, and a ragged last
    values = inputs(*size, dtype=torch.float64)
    theirs = outputs_and_gradients(selective_scan_reference, values, discretization=discretization)
    ours = outputs_and_gradients(selective_scan_chunked, values, discretization=discretization)
    assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scan", [selective_scan_chunked, pytest.param(ops.selective_scan_native, marks=needs_native)])
def test_single_precision_stays_within_rounding(size, scan):
    values = inputs(*size)
    theirs = outputs_and_gradients(selective_scan_reference, [value.double() for value in values])
    assert_same(outputs_and_gradients(scan, values), theirs, 3e-6)


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_chunked_gradients_are_those_of_finite_differences(discretization):
    values = [value.requires_grad_() for value in inputs(2, 11, 3, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *v: selective_scan_chunked(*v[:6], state=v[6], discretization=discretization), values
    )


SCANS = [selective_scan_reference, selective_scan_chunked, pytest.param(selective_scan, marks=needs_native)]


@pytest.mark.parametrize("scan", SCANS)
def test_a_step_of_zero_keeps_the_state_exactly(scan):
    x, delta, A, B, C, D, state = inputs(2, 37, 9, 16)
    y, h = scan(x, torch.zeros_like(delta), A, B, C, D, state=state)
    assert torch.equal(h, state)
    torch.testing.assert_close(y, torch.einsum("bcn,bln->blc", state, C) + D * x)


@pytest.mark.parametrize("scan", SCANS)
def test_a_large_step_forgets_the_state_and_a_decay_that_underflows_is_no_nan(scan):
    x, delta, A, B, C, _, state = inputs(2, 37, 9, 16)
    delta = torch.full_like(delta, 2000.0)  # exp(-200) and less; a division by a product of decays would be 0 / 0
    _, h = scan(x, delta, A, B, C, state=state * 1e3)
    torch.testing.assert_close(h, 2000 * x[:, -1, :, None] * B[:, -1, None, :])


@pytest.mark.parametrize("scan", [selective_scan_reference, selective_scan_chunked])
def test_a_gated_recurrence_is_the_zero_order_hold_of_one_state(scan):
    """Theorem 1: n = 1, A = -1, B = 1 gives h = (1 - g) h + g x with g = sigmoid(z) when delta = softplus(z)."""
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 63, 5, generator=g, dtype=torch.float64) for _ in range(2))
    one = torch.ones(2, 63, 1, dtype=torch.float64)
    y, _ = scan(x, F.softplus(z), -torch.ones(5, 1, dtype=torch.float64), one, one, discretization="zoh")
    h, gate = torch.zeros(2, 5, dtype=torch.float64), torch.sigmoid(z)
    for t in range(63):
        h = (1 - gate[:, t]) * h + gate[:, t] * x[:, t]
        torch.testing.assert_close(y[:, t], h)


@pytest.mark.parametrize("scan", SCANS)
def test_a_cut_sequence_continues_from_the_state(scan):
    x, delta, A, B, C, D, state = inputs(2, 70, 9, 16)
    whole, last = scan(x, delta, A, B, C, D, state=state)
    parts, h = [], state
    for cut in (slice(0, 33), slice(33, 34), slice(34, 70)):
        y, h = scan(x[:, cut], delta[:, cut], A, B[:, cut], C[:, cut], D, state=h)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("scan", SCANS)
def test_an_empty_sequence_returns_the_state(scan):
    *values, state = inputs(2, 0, 9, 16)
    y, h = scan(*values, state=state)
    assert y.shape == (2, 0, 9)
    assert torch.equal(h, state)


@pytest.mark.parametrize("scan", [selective_scan_chunked, pytest.param(selective_scan, marks=needs_native)])
def test_what_is_kept_for_the_backward_pass_does_not_hold_the_hidden_states(scan, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 64 * 32 * 16)
    values = [value.requires_grad_() for value in inputs(1, 1024, 32, 16)]
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(*values[:6], state=values[6])
    inputs_kept = sum(value.numel() for value in values)
    assert sum(kept.values()) <= 2 * inputs_kept < 1024 * 32 * 16 / 2


def test_autocast_does_not_touch_the_scan():
    values = inputs(2, 40, 9, 16)
    plain, _ = selective_scan_chunked(*values[:6])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = selective_scan_chunked(*values[:6])
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("tokens", [1, 7])
def test_an_unknown_discretization_is_named(tokens, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(ValueError, match="tustin"):
        selective_scan(*inputs(1, tokens, 2, 2)[:6], discretization="tustin")


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work_without_changing_it(threads):
    before, values = torch.get_num_threads(), inputs(2, 63, 75, 16)
    try:
        torch.set_num_threads(threads)
        ours = outputs_and_gradients(ops.selective_scan_native, values)
        again = outputs_and_gradients(ops.selective_scan_native, values)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    assert_same(ours, outputs_and_gradients(selective_scan_reference, [value.double() for value in values]), 3e-6)


@needs_native
def test_the_kernel_reads_views_and_expanded_gradients():
    values = inputs(3, 40, 12, 16)
    views = [value.transpose(0, 1).contiguous().transpose(0, 1) for value in values[:5]]
    leaves, plain = (
        [v.clone(memory_format=torch.preserve_format).requires_grad_() for v in vs] for vs in (views, values[:5])
    )
    for arguments in (leaves, plain):
        ops.selective_scan_native(*arguments)[0].sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, plain, strict=True))


@needs_native
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 7, 5, 3), (2, 63, 9, 16)])
def test_the_operator_is_sound(size):
    values = [value.requires_grad_() for value in inputs(*size)]
    torch.library.opcheck(ops._native_forward, values)
    y, h, borders = (out.detach() for out in ops._native_forward(*values))
    detached = [value.detach() for value in values[:6]]
    torch.library.opcheck(ops._native_backward, [*detached, borders, torch.ones_like(y), torch.ones_like(h)])


@needs_native
def test_the_operator_refuses_other_types():
    with pytest.raises(ValueError, match="float32"):
        ops.selective_scan_native(*inputs(1, 7, 2, 2, dtype=torch.float64)[:6])


@needs_native
@pytest.mark.usefixtures("untyped")
def test_compiles_without_a_break_with_gradients():
    compiled = torch.compile(
        lambda *v: selective_scan(*v[:6], state=v[6]), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in [(2, 7, 5, 3), (2, 70, 9, 16)]:
        values = inputs(*size)
        ours = outputs_and_gradients(lambda *v, state: compiled(*v, state), values)
        theirs = outputs_and_gradients(selective_scan_reference, [value.double() for value in values])
        assert_same(ours, theirs, 3e-6)


@needs_native
def test_exports_with_any_batch_and_length():
    class Scan(torch.nn.Module):
        def forward(self, x, delta, A, B, C):
            return selective_scan(x, delta, A, B, C)[0]

    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = torch.export.export(Scan(), tuple(inputs(2, 7, 5, 3)[:5]), dynamic_shapes=(free, free, None, free, free))
    longer = inputs(3, 70, 5, 3)[:5]
    torch.testing.assert_close(program.module()(*longer), Scan()(*longer))


def test_switched_off_it_says_so_and_still_answers():
    code = (
        "import torch; from formwright.ops import native; from formwright.ops.selective_scan import selective_scan;"
        "x = torch.ones(1, 3, 2); b = torch.ones(1, 3, 1); print(native.library(), native.describe());"
        "print(selective_scan(x, x, -torch.ones(2, 1), b, b)[0].shape)"
    )
    environment = {**os.environ, "FORMWRIGHT_NATIVE": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "None switched off by FORMWRIGHT_NATIVE=0" in run.stdout
    assert "[1, 3, 2]" in run.stdout


def test_the_state_of_the_kernels_is_put_in_words():
    assert native.describe().startswith("in use, " if native.library() is not None else ("not", "switched off"))
