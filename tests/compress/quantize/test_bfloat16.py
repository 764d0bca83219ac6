"""bfloat16: every family, its saved form, and what must not be rounded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

import formwright
from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.modifier import Data
from formwright.compress.quantize.bfloat16 import BFloat16
from formwright.errors import FormwrightError

from .. import zoo

SOUND = {"whisper": "input_features", "wav2vec2": "input_values"}


def data() -> Data:
    names = ("train", "validation", "test", "collate", "score", "summary")
    task: Any = SimpleNamespace(name="none", head="", **dict.fromkeys(names))
    return Data(task=task, kind="text-classification")


def batch_for(family: str) -> dict[str, torch.Tensor]:
    """The zoo's batch; sound in the model's dtype, which is all that those two read."""
    batch = zoo.batch_for(family)
    if family in SOUND:
        batch[SOUND[family]] = batch[SOUND[family]].bfloat16()
    return batch


@torch.no_grad()
def answers(model: Any, family: str) -> torch.Tensor:
    return model(**batch_for(family))[0]


@pytest.mark.parametrize("family", zoo.MODELS)
def test_every_family_keeps_its_answers_and_comes_back_with_its_dtype(family, tmp_path) -> None:
    model = zoo.build(family)
    before = zoo.outputs(model, family)
    size = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    change = pipeline.apply(model, BFloat16(), data())
    assert change.bytes[1] <= 0.51 * change.bytes[0] <= 0.51 * size
    after = answers(model, family)
    assert after.dtype == torch.bfloat16
    assert float((after.float() - before).norm() / before.norm()) < 0.04
    model.save_pretrained(tmp_path)
    back = formwright.load(tmp_path).eval()
    assert back.dtype == torch.bfloat16
    assert torch.equal(answers(back, family), after)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_the_auto_classes_load_it(family, tmp_path) -> None:
    model = zoo.build(family)
    pipeline.apply(model, BFloat16(), data())
    model.save_pretrained(tmp_path)
    auto = {"vit": hf.AutoModelForImageClassification, "bert": hf.AutoModelForSequenceClassification}
    back = auto.get(family, hf.AutoModelForCausalLM).from_pretrained(tmp_path).eval()
    assert torch.equal(answers(back, family), answers(model, family))


@pytest.mark.reference
@pytest.mark.parametrize("family", ["bert", "llama", "modernbert", "t5"])
def test_it_is_what_transformers_loads_in_bfloat16(family, tmp_path) -> None:
    model = zoo.build(family)
    model.save_pretrained(tmp_path)
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    pipeline.apply(model, BFloat16(), data())
    assert torch.equal(answers(model, family), answers(theirs, family))


def test_the_frequencies_of_rotary_positions_are_not_rounded() -> None:
    model = zoo.build("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    BFloat16().apply(model)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_what_a_family_keeps_in_float32_stays() -> None:
    model = zoo.build("bert")
    model._keep_in_fp32_modules_strict = {"LayerNorm"}
    BFloat16().apply(model)
    assert model.bert.embeddings.LayerNorm.weight.dtype == torch.float32
    assert model.classifier.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert"])
def test_padding_changes_nothing(family) -> None:
    model = zoo.build(family)
    BFloat16().apply(model)
    ids = torch.randint(3, 40, (1, 5))
    padded = torch.cat([ids, torch.full((1, 3), model.config.pad_token_id)], 1)
    mask = (torch.arange(8) < 5).long()[None]
    with torch.no_grad():
        alone = model.base_model(ids, attention_mask=torch.ones_like(ids))[0].float()
        long = model.base_model(padded, attention_mask=mask)[0][:, :5].float()
    assert float((alone - long).norm() / alone.norm()) < 0.02


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_tied_weights_stay_tied_and_text_is_generated(family) -> None:
    model = zoo.build(family)
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tied = head is table
    BFloat16().apply(model)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    ids = torch.randint(3, 40, (2, 5))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 9)


def test_half_precision_turns_too_and_twice_is_refused() -> None:
    model = zoo.build("bert").half()
    pipeline.apply(model, BFloat16(), data())
    assert model.dtype == torch.bfloat16
    with pytest.raises(FormwrightError, match="no floating-point weight but bfloat16"):
        pipeline.apply(model, BFloat16(), data())


def test_the_modifier_is_in_the_catalogue() -> None:
    assert isinstance(build("modifier", "bfloat16"), BFloat16)
