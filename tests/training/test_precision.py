"""Attention under bfloat16 autocast on a CPU: in float32 while it lasts, as before afterwards."""

import copy
from dataclasses import replace

import pytest
import torch

from formwright.ops import attention
from formwright.training import fit
from formwright.training.precision import attention_in_float32


def seen_types(model):
    """The types in which attention was given its queries, and answered."""
    found = []
    for module in model.modules():
        if hasattr(type(module), "grouped"):
            module.register_forward_hook(lambda _m, args, out: found.append((args[0].dtype, out.dtype)))
    return found


def test_attention_computes_in_float32_only_while_it_lasts(worker):
    model = worker.small(dropout=0.0)
    tokens = worker.ragged().test.columns["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = seen_types(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(input_ids=tokens).logits
        with attention_in_float32(model):
            kept = model(input_ids=tokens).logits
        again = model(input_ids=tokens).logits
    assert [out for _, out in found] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert torch.equal(plain, again)
    torch.testing.assert_close(kept, plain, rtol=0.05, atol=0.05)  # bfloat16 keeps 8 bits
    assert before.keys() == model.state_dict().keys()


@pytest.mark.skipif(attention._forward() is None, reason="The native kernels are not built.")
def test_our_own_kernel_takes_bfloat16_as_it_is(worker, monkeypatch):
    monkeypatch.setattr(attention, "served", lambda: (torch.float32, torch.bfloat16))
    monkeypatch.setattr(attention, "FEWEST_QUERIES", 0)
    monkeypatch.setattr(attention, "LEAST", 0)
    model, tokens = worker.small(dropout=0.0), worker.ragged().test.columns["input_ids"]
    wide = model(input_ids=tokens).logits
    found = seen_types(model)
    with torch.autocast("cpu", torch.bfloat16), attention_in_float32(model):
        narrow = model(input_ids=tokens).logits
    assert set(found) == {(torch.bfloat16, torch.bfloat16)}
    torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.05)


def test_a_bfloat16_run_keeps_float32_weights_and_nearly_the_losses(worker):
    settings = replace(worker.SETTINGS, steps=10, save_every=0)
    model = worker.small(dropout=0.0)
    wide = fit(copy.deepcopy(model), worker.ragged(), settings)
    narrow = fit(model, worker.ragged(), replace(settings, precision="bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert narrow.losses == pytest.approx(wide.losses, rel=0.05)
    assert narrow.losses != wide.losses
