"""Sharing in trained models: the mean of the weights, saved once; checked by the mean over a state dict."""

import os

import pytest
import torch
import transformers

import formwright
from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.structure import load
from formwright.compress.surgery import remove_layers
from formwright.errors import FormwrightError
from formwright.models.convert import from_transformers

from ..classifiers import data, rows, tiny
from ..zoo import batch_for, outputs
from ..zoo import build as make


def sizes(folder):
    return os.path.getsize(folder / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["all", "all-but-last"])
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "electra", "vit", "dinov2", "gpt2", "opt", "llama"]
)
def test_a_file_holds_the_shared_weights_once_and_loads_as_the_same_model(tmp_path, family, scheme):
    plain, model = make(family), make(family)
    plain.save_pretrained(tmp_path / "plain")
    change = pipeline.apply(model, build("modifier", f"share(scheme={scheme})"), data())
    before, after = outputs(plain, family), outputs(model, family)
    assert not torch.allclose(before, after)
    assert change.parameters[1] < change.parameters[0]
    model.save_pretrained(tmp_path / "shared")
    saved = sizes(tmp_path / "plain") - sizes(tmp_path / "shared")
    counted = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in model.parameters())
    assert saved == pytest.approx(4 * counted, rel=0.5)  # the header and the config's names differ, too
    back = load(tmp_path / "shared")
    assert torch.equal(outputs(back, family), after)
    assert sum(p.numel() for p in back.parameters()) == sum(p.numel() for p in model.parameters())


@torch.no_grad()
@pytest.mark.reference
@pytest.mark.parametrize("scheme", ["sandwich", "all-but-last"])
def test_weights_are_the_mean_and_norms_stay(scheme):
    plain, model = tiny(), tiny()
    pipeline.apply(model, build("modifier", f"share(scheme={scheme})"), data())
    states = plain.state_dict()
    shared = {"sandwich": [1, 2], "all-but-last": [0, 1, 2]}[scheme]
    for name, value in model.state_dict().items():
        parts = name.split(".")
        layer = int(parts[3]) if "layer" in parts[:3] else None
        if layer not in shared or "LayerNorm" in name:
            assert torch.equal(value, states[name])
        else:
            names = [".".join([*parts[:3], str(i), *parts[4:]]) for i in shared]
            torch.testing.assert_close(value, torch.stack([states[one] for one in names]).mean(0))


@torch.no_grad()
def test_equal_layers_share_without_a_change_in_output():
    model = tiny()
    layers = model.bert.encoder.layer
    for other in layers[2:-1]:
        other.load_state_dict(layers[1].state_dict())
    before = model(**rows()).logits
    build("modifier", "share").apply(model)
    torch.testing.assert_close(model(**rows()).logits, before, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_our_own_model_shares_and_comes_back(tmp_path):
    model = from_transformers(make("gpt2"))
    pipeline.apply(model, build("modifier", "share(scheme=all)"), data())
    ids = batch_for("gpt2")["input_ids"]
    model.save_pretrained(tmp_path)
    back = formwright.load(tmp_path)
    assert torch.equal(back(ids).logits, model(ids).logits)
    layers = back.model.decoder.layers
    assert layers[2].block.mixer.out.weight is layers[0].block.mixer.out.weight
    assert layers[2].block.mixer_norm.weight is not layers[0].block.mixer_norm.weight
    assert torch.equal(back.generate(ids[:, :3], max_new_tokens=4, do_sample=False)[:, :3], ids[:, :3])


def test_a_recipe_shares_and_trains_and_the_ties_hold(tmp_path):
    model = tiny()
    model, changes = pipeline.run(model, ["share", "finetune(steps=3)"], data())
    assert changes[0].bytes[1] < changes[0].bytes[0]
    assert changes[1].parameters[0] == changes[1].parameters[1] == changes[0].parameters[1]
    layers = model.bert.encoder.layer
    assert layers[1].output.dense.weight is layers[2].output.dense.weight
    model.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert torch.equal(back(**rows()).logits, model(**rows()).logits)


def test_layers_cut_out_afterwards_leave_the_others_tied(tmp_path):
    model = tiny(layers=5)
    pipeline.apply(model, build("modifier", "share"), data())
    remove_layers(model, [1])
    model.save_pretrained(tmp_path)
    back = load(tmp_path)
    assert torch.equal(back(**rows()).logits, model(**rows()).logits)
    layers = back.bert.encoder.layer
    assert layers[1].output.dense.weight is layers[2].output.dense.weight
    back.resize_token_embeddings(60)
    assert torch.equal(back(**rows()).logits, model(**rows()).logits)


def test_the_base_model_reads_a_shared_classifier(tmp_path):
    model = tiny()
    pipeline.apply(model, build("modifier", "share"), data())
    model.save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    layers = base.encoder.layer
    assert layers[1].output.dense.weight is layers[2].output.dense.weight
    batch = rows()
    torch.testing.assert_close(base(**batch).last_hidden_state, model.bert(**batch).last_hidden_state)


def test_bad_input_is_refused():
    with pytest.raises(FormwrightError, match="one of"):
        build("modifier", "share(scheme=most)")
    for model, said in ((make("albert"), "shared already"), (tiny(layers=2), "3 or more"), (tiny(layers=3), "nothing")):
        with pytest.raises(FormwrightError, match=said):
            build("modifier", "share").check(model)
    with pytest.raises(FormwrightError, match="cannot share"):
        build("modifier", "share(scheme=all)").check(make("t5"))
    shared = tiny()
    build("modifier", "share").apply(shared)
    with pytest.raises(FormwrightError, match="nothing"):
        build("modifier", "share").check(shared)
