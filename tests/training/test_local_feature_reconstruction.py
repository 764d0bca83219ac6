"""Local learning: no gradient crosses a module, each is freed before the next; then the same written out by hand."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from formwright import tasks
from formwright.bench.measure import peak_memory
from formwright.build import build
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForImageClassification
from formwright.training import Settings, evaluate, fit
from formwright.training.local_feature_reconstruction import (
    LocalLearning,
    _kept,
    balanced,
    even,
    normal,
    supervised_contrast,
)
from formwright.training.method import Pass

SETTINGS = Settings(steps=3, batch_size=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def task():
    """Digits of 16 x 16 pixels in three colours."""
    found = tasks.load("digits(examples=64)")
    columns = {"pixel_values": found.train.columns["pixel_values"], "labels": found.train.columns["labels"]}
    pixels = F.interpolate(columns["pixel_values"], size=(16, 16)).expand(-1, 3, -1, -1)
    rows = type(found.train)(pixel_values=pixels.contiguous(), labels=columns["labels"])
    return replace(found, train=rows, test=rows.select(torch.arange(16)))


def vit(layers=4):
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **sizes))


def swin():
    sizes = {"embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 4], "window_size": 2, "drop_path_rate": 0.0}
    return SwinForImageClassification(SwinConfig(image_size=16, patch_size=2, num_labels=10, **sizes))


def ours(**fields):
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    return TransformerForImageClassification(
        TransformerConfig(**{"vocab_size": 0, "num_labels": 10, "init": "fan-in"} | sizes | fields)
    )


MODELS = {"vit": vit, "swin": swin, "ours": ours, "class token": lambda: ours(class_token=True, pooling="first")}


def prepared(name, task, seed=0, **options):
    torch.manual_seed(seed)
    model, method = MODELS[name]().train(), LocalLearning(**options)
    method.check(model, task, SETTINGS)
    method.prepare(model, task, SETTINGS)
    return model, method


def batch_of(task, count=8):
    return task.collate([task.train[i] for i in range(count)])


def passed(model, method, task, parts=None):
    """One forward pass; the parts of the loss are propagated at once, or kept in the list."""
    backward = (lambda loss: loss.backward()) if parts is None else parts.append
    given = Pass(model=model, batch=batch_of(task), step=1, run=lambda b: model(**b), backward=backward)
    return method.forward(given)


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def agree(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value is None) == (other is None), name
        if value is not None:
            torch.testing.assert_close(value, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_one_module_is_the_usual_training_step(name, task):
    model, method = prepared(name, task, modules=1)
    outputs = passed(model, method, task)
    outputs["loss"].backward()
    assert not outputs["extra_losses"]
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    model(**batch_of(task)).loss.backward()
    agree(found, gradients(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decoder", ["linear", "conv", "transformer", "image"])
def test_a_loss_moves_its_own_module_and_no_other(name, decoder, task):
    model, method = prepared(name, task, modules=3, decoder=decoder)
    parts = []
    outputs = passed(model, method, task, parts)
    moved = []
    for part in (*parts, outputs["loss"]):
        model.zero_grad(set_to_none=True)
        part.backward()
        moved.append({n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    assert len(moved) == 3
    for i, one in enumerate(moved):
        assert one
        assert all(not one & other for other in moved[i + 1 :])
    backbone = {n for n, _ in model.named_parameters()}
    spare = {
        n for n in backbone - set.union(*moved) if "key" not in n and "k_proj" not in n
    }  # a bias of keys is no use
    assert not spare


@pytest.mark.parametrize("name", MODELS)
def test_backward_at_once_and_one_backward_of_the_sum_agree(name, task):
    model, method = prepared(name, task, modules=3, decoder="conv")
    twin_method = copy.copy(method)
    parts = []
    state = copy.deepcopy(model.state_dict())
    (passed(model, twin_method, task, parts)["loss"] + sum(parts)).backward()
    together = gradients(model)
    model.load_state_dict(state)  # the statistics of batch norms, too
    model.zero_grad(set_to_none=True)
    passed(model, method, task)["loss"].backward()
    agree(gradients(model), together)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decoder", ["linear", "conv", "transformer"])
@pytest.mark.parametrize("cut", ["even", "balanced"])
def test_a_decoder_makes_what_the_module_read(name, decoder, cut, task):
    model, method = prepared(name, task, modules=3, decoder=decoder, cut=cut)
    seen = []
    for one in model.local_learning:
        plain = one.terms
        one.terms = lambda h, target, labels, one=one, plain=plain: (
            seen.append((one.decoder(one.now.of(h)).shape, target.shape)) or plain(h, target, labels)
        )
    passed(model, method, task)
    assert len(seen) == 2
    assert all(made == wanted for made, wanted in seen)
    if name == "swin" and cut == "even":
        assert [tuple(made[1:]) for made, _ in seen] == [(3 * 4, 8, 8), (16, 4, 4)]  # patches, then the first stage's


def test_grids_that_do_not_halve_and_images_that_patches_do_not_tile(task):
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "window_size": 2}
    model = SwinForImageClassification(SwinConfig(image_size=16, patch_size=3, num_labels=10, **sizes)).train()
    method = LocalLearning(modules=3)  # grids of 6, 3 and 2
    method.prepare(model, task, SETTINGS)
    passed(model, method, task)["loss"].backward()
    assert [one.now.grid for one in model.local_learning] == [(3, 3), (2, 2)]


def test_heads_and_decoders_do_not_touch_what_the_model_computes_and_go_at_the_end(task):
    model, method = prepared("ours", task, modules=4)
    batch = {"pixel_values": batch_of(task)["pixel_values"]}
    model.eval()
    before = model(**batch).logits
    for weight in model.local_learning.parameters():
        nn.init.zeros_(weight)
    assert torch.equal(model(**batch).logits, before)
    method.finish(model)
    assert not hasattr(model, "local_learning")
    assert not any(m._forward_hooks for m in model.modules())
    assert model.state_dict().keys() == ours().state_dict().keys()


def test_without_reconstruction_it_is_greedy_supervised_learning(task):
    model, method = prepared("ours", task, modules=2, weights=(0.0, 1.0))
    assert model.local_learning[0].decoder is None
    outputs = passed(model, method, task)
    assert set(outputs["extra_losses"]) == {"supervision 1"}
    batch = batch_of(task)
    x = model.model.embeddings(None, None, None, batch["pixel_values"])
    states = model(batch["pixel_values"], output_hidden_states=True).hidden_states
    assert x.shape == states[0].shape
    loss = F.cross_entropy(model.local_learning[0].head(states[2]), batch["labels"])
    torch.testing.assert_close(outputs["extra_losses"]["supervision 1"], loss.detach())


def test_weights_go_from_the_first_module_s_to_the_last_one_s(task):
    model, _ = prepared("ours", task, modules=4, weights=(5.0, 0.0), last_weights=(0.0, 1.0))
    assert [one.weights for one in model.local_learning] == [(5, 0), (2.5, 0.5), (0, 1)]
    assert [one.head is None for one in model.local_learning] == [True, False, False]


def test_where_to_cut():
    assert even(12, 4) == [3, 3, 3, 3]
    assert even(7, 2) == [3, 4]
    assert even(5, 1) == [5]
    assert balanced([1.0, 1.0, 1.0, 1.0], 2) == [2, 2]
    assert balanced([6.0, 1.0, 1.0, 1.0, 1.0], 2) == [1, 4]
    assert balanced([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3) == [3, 2, 1]
    assert balanced([4.0, 3.0], 2) == [1, 1]


def test_balanced_modules_keep_no_more_than_even_ones(task):
    model, method = prepared("swin", task, modules=2, cut="balanced")
    layers = method._layers(model)
    sizes = _kept(model, batch_of(task, 2), layers)
    assert len(sizes) == len(layers) == 4
    assert min(sizes) > 0

    def largest(ends):
        cut = 1 + layers.index(ends[0])
        return max(sum(sizes[:cut]), sum(sizes[cut:]))

    assert largest(method.ends) <= min(largest([layers[0]]), largest([layers[2]]))  # where even cuts may fall
    plain = ours().train()
    before, *middle, after = _kept(plain, batch_of(task, 2), list(plain.model.encoder.layers))
    assert middle[0] == middle[1]
    assert min(before, after) > middle[0]  # embeddings and head count with them


def test_memory_falls_because_a_module_is_freed_before_the_next_runs(task):
    def peak(modules):
        torch.manual_seed(0)
        model, method = ours(num_hidden_layers=8).train(), LocalLearning(modules=modules)
        method.prepare(model, task, SETTINGS)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        held = [t for p in model.parameters() for t in (p, p.grad)] + list(batch_of(task).values())
        return peak_memory(lambda: passed(model, method, task)["loss"].backward(), held=held) - sum(
            t.numel() * t.element_size() for t in held
        )

    whole, two, four = peak(1), peak(2), peak(4)
    assert two < 0.66 * whole
    assert four < 0.45 * whole


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("decoder", ["linear", "image"])
def test_training_moves_everything_and_tells_the_local_losses(name, decoder, task):
    torch.manual_seed(0)
    model = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    history = fit(model, task, replace(SETTINGS, methods=f"local-learning(modules=2, decoder={decoder})"))
    assert set(history.extras) == {"reconstruction 1", "supervision 1"}
    assert all(len(values) == 3 for values in history.extras.values())
    still = [n for n, v in model.state_dict().items() if v.is_floating_point() and torch.equal(v, before[n])]
    assert not still
    assert 0 <= evaluate(model, task).metrics["accuracy"] <= 1


def test_accumulated_batches_are_the_whole_batch(task):
    def trained(accumulate):
        torch.manual_seed(0)
        model = ours()
        fit(model, task, replace(SETTINGS, accumulate=accumulate, methods="local-learning(modules=2)"))
        return model.state_dict()

    for one, two in zip(trained(1).values(), trained(4).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_is_the_run_itself(task, tmp_path):
    settings = replace(SETTINGS, steps=4, save_every=2, methods="local-learning(modules=2, decoder=conv)")

    class Broken(RuntimeError):
        pass

    def stop(step, _steps, _loss):
        if step == 3:
            raise Broken

    def run(folder, progress=None):
        torch.manual_seed(0)
        model = ours()
        fit(model, task, settings, folder=folder, progress=progress)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(Broken):
        run(tmp_path / "broken", stop)
    for one, two in zip(whole.values(), run(tmp_path / "broken").values(), strict=True):
        assert torch.equal(one, two)


def test_bfloat16_trains_too(task):
    torch.manual_seed(0)
    fit(ours(), task, replace(SETTINGS, precision="bfloat16", methods="local-learning(modules=2, decoder=transformer)"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modules": 0}, "at least one"),
        ({"decoder": "unet"}, "'linear', 'conv', 'transformer' or 'image'"),
        ({"supervision": "none"}, "'classifier' or 'contrast'"),
        ({"cut": "odd"}, "'even' or 'balanced'"),
        ({"weights": (0.0, 0.0)}, "not both 0"),
        ({"last_weights": (-1.0, 1.0)}, "0 or more"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(FormwrightError, match=says):
        build("training", {"name": "local-learning", **options})


def test_what_it_cannot_train_is_refused(task, monkeypatch):
    bert = BertForSequenceClassification(
        BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    )
    with pytest.raises(FormwrightError, match="not Bert"):
        LocalLearning().check(bert, task, SETTINGS)
    with pytest.raises(FormwrightError, match='cut="balanced"'):
        LocalLearning(modules=4).check(swin(), task, SETTINGS)
    LocalLearning(modules=4, cut="balanced").check(swin(), task, SETTINGS)
    with pytest.raises(FormwrightError, match="needs one label"):
        LocalLearning().check(ours(problem_type="multi_label_classification"), task, SETTINGS)
    checkpointed = vit()
    checkpointed.gradient_checkpointing_enable()
    with pytest.raises(FormwrightError, match="checkpointing"):
        LocalLearning().check(checkpointed, task, SETTINGS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FormwrightError, match="start one process"):
        LocalLearning().check(vit(), task, SETTINGS)


def test_parts_with_losses_of_their_own_or_with_shared_maps_are_refused(task):
    for fields, says in (
        ({"feedforward": "fast-feedforward"}, "losses of their own"),
        ({"mixer": "partialformer", "feedforward": "none"}, "share nothing but the tokens"),
    ):
        torch.manual_seed(0)
        model, method = ours(**fields).train(), LocalLearning()
        method.prepare(model, task, SETTINGS)
        with pytest.raises(FormwrightError, match=says):
            passed(model, method, task)


@pytest.mark.reference
@pytest.mark.parametrize("decoder", ["linear", "conv", "image"])
def test_it_is_module_by_module_training_written_out(decoder, task):
    """ViT's own layers, called one after the other on detached tokens; InfoPro's decoder and loss with the image."""
    model, method = prepared("vit", task, modules=3, decoder=decoder)
    outputs = passed(model, method, task)
    outputs["loss"].backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    batch, base, helpers = batch_of(task), model.vit, model.local_learning
    pixels, labels = batch["pixel_values"], batch["labels"]
    patches = pixels.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3)  # (b, 4, 4, c p p)
    read = F.layer_norm(patches, patches.shape[-1:]).permute(0, 3, 1, 2)
    groups = even(len(base.layers), 3)
    h, start = base.embeddings(pixels), 0
    for k, count in enumerate(groups):
        for layer in base.layers[start : start + count]:
            h = layer(h)
        start += count
        if k == 2:
            loss = F.cross_entropy(model.classifier(base.layernorm(h)[:, 0]), labels)
        else:
            one = helpers[k]
            square = h[:, 1:].transpose(1, 2).reshape(8, 16, 4, 4)
            if decoder == "linear":
                made = (square.permute(0, 2, 3, 1) @ one.decoder.linear.weight[:, :, 0, 0].T).permute(0, 3, 1, 2)
                loss = F.mse_loss(made + one.decoder.linear.bias[:, None, None], read)
            elif decoder == "conv":
                norm = one.decoder.norm
                first = one.decoder.first(square)
                wide = F.gelu(F.batch_norm(first, None, None, norm.weight, norm.bias, training=True))
                loss = F.mse_loss(one.decoder.second(wide), read)
            else:
                low, high = helpers.low, helpers.high
                large = F.interpolate(square, size=(16, 16), mode="bilinear", align_corners=True)
                image = ((pixels - low) / (high - low)).clamp(0, 1)
                loss = F.binary_cross_entropy(one.decoder.layers(large).sigmoid(), image)
            loss = loss + F.cross_entropy(one.head.outer(F.gelu(one.head.inner(one.head.norm(h).mean(1)))), labels)
        loss.backward()
        h = h.detach()
        read = F.layer_norm(h[:, 1:], (16,)).transpose(1, 2).reshape(8, 16, 4, 4)
    torch.testing.assert_close(outputs["loss"].detach(), loss.detach())
    agree(found, gradients(model))


@pytest.mark.reference
def test_supervised_contrast_is_its_sum_over_pairs():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    labels, losses = torch.tensor([0, 1, 0, 2, 1, 0, 3]), []
    unit = x / x.norm(dim=1, keepdim=True)
    for i in range(7):
        alike = [j for j in range(7) if j != i and labels[j] == labels[i]]
        others = torch.stack([(unit[i] @ unit[j] / 0.07).exp() for j in range(7) if j != i]).sum()
        if alike:
            losses.append(-sum(((unit[i] @ unit[j] / 0.07).exp() / others).log() for j in alike) / len(alike))
    torch.testing.assert_close(supervised_contrast(x, labels), torch.stack(losses).mean())
    assert supervised_contrast(x, torch.arange(7)) == 0  # nobody is alike


def test_contrast_and_targets(task):
    model, method = prepared("swin", task, modules=2, supervision="contrast")
    passed(model, method, task)["loss"].backward()
    assert model.local_learning[0].head.outer.out_features == 128
    x = normal(7 * torch.randn(2, 6, 3, 3) + 4)
    torch.testing.assert_close(x.mean(1), torch.zeros(2, 3, 3), atol=1e-5, rtol=0)
