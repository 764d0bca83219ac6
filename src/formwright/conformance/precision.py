"""Precisions: float64, float32 and bfloat16 agree as far as their digits go."""

import torch

from formwright.conformance.check import check, ensure, ensure_close
from formwright.conformance.subject import Stand, Subject, lengths_to_padding, padding_to_positions, tokens
from formwright.contracts import Context

# Relative to the norm of the float64 output: float32 keeps 7 digits and loses some in sums, bfloat16 keeps 2 to 3.
ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05}


@torch.no_grad()
def _rounded(subject: Subject, causal: bool, **dimensions: int) -> Stand:
    """A part in float64 whose parameters bfloat16 can hold."""
    stand = subject.stand(causal=causal, dtype=torch.float64, **dimensions)
    for parameter in stand.parameters():
        parameter.copy_(parameter.bfloat16())
    return stand


@check()
def precisions_agree(subject: Subject) -> None:
    """Same weights and tokens in three precisions: the dtype is kept, all is finite, values are close to float64."""
    for causal in subject.causals or (False,):
        stand, x = _rounded(subject, causal), tokens(63).bfloat16().double()
        with torch.no_grad():
            exact = stand(x, Context.of(x, causal=causal))
            for dtype in ALLOWED:
                y = stand.twin(dtype)(x.to(dtype), Context.of(x, causal=causal))
                ensure(y.dtype == dtype, f"{subject} turns {dtype} into {y.dtype}.")
                ensure(bool(torch.isfinite(y).all()), f"{subject} overflows in {dtype} (causal={causal}).")
                away = ((y.double() - exact).norm() / exact.norm().clamp(min=1e-6)).item()
                ensure(
                    away <= ALLOWED[dtype],
                    f"{subject} in {dtype} is {away:.1e} away from float64, allowed {ALLOWED[dtype]:.0e} "
                    f"(causal={causal}).",
                )


@check()
def large_inputs_stay_finite(subject: Subject) -> None:
    """Tokens a hundred times as large give no NaN or infinity, in float32 and bfloat16, nor do their gradients in
    float32.
    """
    for causal in subject.causals or (False,):
        for dtype in (torch.float32, torch.bfloat16):
            stand, x = subject.stand(causal=causal, dtype=dtype), 100 * tokens(9, dtype=dtype)
            y = stand(x.requires_grad_(), Context.of(x, causal=causal))
            ensure(
                bool(torch.isfinite(y).all()),
                f"{subject} overflows in {dtype} when its input is large (causal={causal}).",
            )
            if dtype == torch.float32:
                y.sum().backward()
                ensure(
                    bool(torch.isfinite(x.grad).all()), f"{subject} has an infinite gradient when its input is large."
                )


@check()
def autocast_is_taken(subject: Subject) -> None:
    """Under bfloat16 autocast a training step runs and comes out near the float32 one."""
    for causal in subject.causals or (False,):
        stand, x = subject.stand(causal=causal).train(), tokens(63)
        context = Context.of(x, causal=causal)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exact = stand(x, context)
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = stand(x, context)
        away = ((y.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-6)).item()
        ensure(
            away <= ALLOWED[torch.bfloat16],
            f"{subject} under autocast is {away:.1e} away from float32 (causal={causal}).",
        )
        y.float().sum().backward()
        wild = [name for name, p in stand.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        ensure(not wild, f"{subject}: under autocast the gradient of {', '.join(wild)} is not finite.")


@check()
def moving_keeps_constants(subject: Subject) -> None:
    """A trip to bfloat16 and back costs what the parameters' rounding costs and nothing more: no constant may lie in
    a rounded buffer.
    """
    for causal in subject.causals or (False,):
        stand, x = _rounded(subject, causal), tokens(63, dtype=torch.float64)
        positions = (torch.arange(63) + 50)[None]
        context = Context.of(x, causal=causal, positions=positions)
        with torch.no_grad():
            there_and_back = stand.twin(torch.bfloat16).double()(x, context)
            ensure_close(
                there_and_back,
                stand(x, context),
                f"{subject} keeps a constant in a buffer that .bfloat16() rounds.",
                tolerance=1e-6,
            )


@check("padding", slots=("mixer", "attention"))
def bfloat16_honours_padding(subject: Subject) -> None:
    """The mask holds in bfloat16 too, where a large negative number may not be -inf."""
    for causal in subject.causals:
        stand, x = subject.stand(causal=causal, dtype=torch.bfloat16), tokens(11, dtype=torch.bfloat16)
        padding = lengths_to_padding((3, 11, 6), 11, "left")
        other = torch.where(padding[..., None], x, 10 * tokens(11, seed=7, dtype=torch.bfloat16))
        context = Context.of(x, causal=causal, padding=padding, positions=padding_to_positions(padding))
        with torch.no_grad():
            first, second = stand(x, context), stand(other, context)
        ensure(bool(torch.isfinite(first).all()), f"{subject} gives NaN or infinity in bfloat16 under padding.")
        ensure_close(second[padding], first[padding], f"{subject} reads pads in bfloat16.", tolerance=1e-2)


@check("causal", slots=("position",))
def far_positions_keep_their_digits(subject: Subject) -> None:
    """Around position 3,000 a bfloat16 model is as near to float64 as at the start: positions are counted in integers
    and fp32.
    """
    start, n = 3000, 16
    try:
        stand = _rounded(subject, True, length=start + n)
    except ValueError:  # a part may refuse the length
        return
    x = tokens(n).bfloat16().double()
    positions = (torch.arange(n) + start)[None]
    context = Context.of(x, causal=True, positions=positions)
    with torch.no_grad():
        exact = stand(x, context)
        y = stand.twin(torch.bfloat16)(x.bfloat16(), context)
    away = ((y.double() - exact).norm() / exact.norm().clamp(min=1e-6)).item()
    ensure(
        away <= ALLOWED[torch.bfloat16], f"{subject} in bfloat16 is {away:.1e} away from float64 at position {start}."
    )
