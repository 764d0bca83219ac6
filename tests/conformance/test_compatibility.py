"""The compatibility page is what the code says today, and a dropped part or a wrong result does not get into it."""

import pytest
import torch

from formwright.catalog.evidence import checkout
from formwright.conformance import compatibility
from formwright.models.transformer import TransformerModel


def test_the_committed_page_is_not_stale():
    path = checkout() / compatibility.PAGE
    assert path.is_file(), "Run python -m formwright.conformance.compatibility."
    stale = "docs/generated/compatibility.md is stale: run python -m formwright.conformance.compatibility."
    assert path.read_text(encoding="utf-8") == compatibility.page(), stale


def test_a_refusal_is_a_dot_and_its_sentence_is_kept():
    reasons = []
    assert compatibility.cell({"mixer": "softmax", "position": "rope"}, reasons) == "`BP CPD`"
    assert reasons == []
    assert compatibility.cell({"mixer": "aft-simple", "position": "rope"}, reasons) == "`.. ...`"
    assert len(reasons) == 1
    assert "works on attention scores" in reasons[0]


def test_a_part_dropped_in_silence_is_an_error(monkeypatch):
    plain = compatibility.model("encoder", {"mixer": "softmax"})
    monkeypatch.setattr(compatibility, "model", lambda *_: plain)
    with pytest.raises(AssertionError, match="rope was dropped in silence"):
        compatibility.cell({"mixer": "softmax", "position": "rope"}, [])


def test_a_cache_that_changes_the_result_is_an_error(monkeypatch):
    forward = TransformerModel.forward

    def wrong(self, **arguments):
        output = forward(self, **arguments)
        if arguments.get("past_key_values") is not None:
            output.last_hidden_state = output.last_hidden_state + torch.ones(1)
        return output

    monkeypatch.setattr(TransformerModel, "forward", wrong)
    with pytest.raises(AssertionError, match="Decoding with the cache differs"):
        compatibility.cell({"mixer": "softmax"}, [])
