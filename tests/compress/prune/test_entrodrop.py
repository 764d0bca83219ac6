"""EntroDrop: estimators against brute force, the right blocks chosen, and what a dropped attention leaves behind."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.anatomy import describe
from formwright.compress.modifier import Data
from formwright.compress.prune.entrodrop import (
    EntroDrop,
    bucket_entropy,
    cosine_score,
    knn_entropy,
    renyi_entropy,
    streams,
)
from formwright.compress.structure import load
from formwright.errors import FormwrightError

from .. import zoo

ESTIMATORS = {"bucket": bucket_entropy, "knn": lambda x: knn_entropy(x, 5), "renyi": renyi_entropy}


@pytest.fixture
def data() -> Data:
    torch.manual_seed(0)
    rows = TensorDataset(torch.randint(3, 40, (4, 12)))
    task = SimpleNamespace(
        name="rows", head="causal-lm", train=rows, validation=None, test=rows, score=None, summary=None,
        collate=lambda items: {"input_ids": torch.stack([one[0] for one in items])},
    )  # fmt: skip
    return Data(task=task, kind="causal-lm")


# Estimators


def test_bucket_by_hand() -> None:
    grid = torch.linspace(0, 1, 2001)[:2000]
    assert bucket_entropy(torch.stack([grid, grid * 3 - 1], 1), 20) == pytest.approx(2 * math.log(20), rel=1e-3)
    assert bucket_entropy((torch.arange(40.0) + 0.5)[:, None], 20) == pytest.approx(math.log(20), rel=1e-6)
    assert 0 <= bucket_entropy(torch.full((30, 1), 7.0), 20) < 1e-7


def test_bucket_does_not_see_affine_maps_and_adds_over_dimensions() -> None:
    torch.manual_seed(0)
    points = torch.randint(0, 1024, (300, 5)).float()  # exact under powers of two
    assert bucket_entropy(points * torch.tensor([1.0, 2.0, 8.0, 0.5, 4.0]) + 16) == bucket_entropy(points)
    apart = sum(bucket_entropy(points[:, i : i + 1]) for i in range(5))
    assert bucket_entropy(points) == pytest.approx(apart, rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_knn_grows_by_the_logarithm_of_a_scale(scale: float) -> None:
    torch.manual_seed(0)
    points = torch.randn(200, 6)
    assert knn_entropy(points * scale) - knn_entropy(points) == pytest.approx(6 * math.log(scale), abs=1e-4)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_knn_of_a_gaussian(width: int) -> None:
    torch.manual_seed(0)
    exact = width / 2 * math.log(2 * math.pi * math.e)
    assert knn_entropy(torch.randn(4000, width)) == pytest.approx(exact, rel=0.05)


def test_knn_needs_more_points_than_neighbours() -> None:
    knn_entropy(torch.randn(26, 3))
    with pytest.raises(FormwrightError, match="has no 25 neighbours"):
        knn_entropy(torch.randn(25, 3))
    assert math.isfinite(knn_entropy(torch.ones(30, 3)))


@pytest.mark.reference
def test_estimators_equal_brute_force() -> None:
    spatial, stats = pytest.importorskip("scipy.spatial"), pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    points = torch.randn(150, 7) * torch.logspace(-1, 1, 7)
    array = points.double().numpy()
    count, width = array.shape

    bucket = sum(stats.entropy(np.histogram(column, bins=20)[0]) for column in array.T)
    assert bucket_entropy(points) == pytest.approx(bucket, rel=1e-5)

    kth = spatial.cKDTree(array).query(array, k=26)[0][:, -1]
    volume = math.pi ** (width / 2) / math.gamma(width / 2 + 1)
    knn = width * np.log(kth).mean() + math.log(volume * count / 25)
    assert knn_entropy(points) == pytest.approx(knn, rel=1e-5)

    standard = (array - array.mean(0)) / array.std(0)
    between = spatial.distance.pdist(standard)
    squares = spatial.distance.squareform(between) ** 2
    sigma = torch.tensor(between).median().item()
    kernel = np.exp(-squares / (2 * sigma**2))
    assert renyi_entropy(points) == pytest.approx(math.log((kernel**3).mean()) / -3, rel=1e-4)


def test_cosine() -> None:
    x = torch.randn(9, 4)
    assert cosine_score(x, 3 * x) == pytest.approx(0, abs=1e-6)
    assert cosine_score(x, -x) == pytest.approx(2, abs=1e-6)


def test_half_precision_is_scored_in_float32() -> None:
    points = (torch.randn(60, 4) * 3e4).clamp(-6e4, 6e4).half()
    for estimate in ESTIMATORS.values():
        assert estimate(points) == estimate(points.float())
        assert math.isfinite(estimate(points))


# Blocks


def silence(model, index: int, *, attention: bool = True, feedforward: bool = True) -> None:
    layer = describe(model).layers[index]
    for part, asked in ((layer.attention.output, attention), (layer.feedforward.down, feedforward)):
        module = model.get_submodule(part)
        if asked:
            for weight in module.parameters():
                weight.data.zero_()


@pytest.mark.parametrize("score", ["bucket", "knn", "renyi", "cosine"])
@pytest.mark.parametrize("granularity", ["layer", "attention"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "modernbert"])
def test_an_identity_adds_no_entropy_and_its_removal_changes_nothing(
    family: str, granularity: str, score: str, data: Data, tmp_path
) -> None:
    model = zoo.build(family)
    silence(model, 1, feedforward=granularity == "layer")
    drop = EntroDrop(score=score, granularity=granularity, **({"neighbours": 3} if score == "knn" else {}))
    drop.check(model)
    drop.measure(model, data)
    assert drop.scores[1] == pytest.approx(0, abs=1e-6 if score == "cosine" else 0)
    assert all(abs(value) > 1e-4 for index, value in drop.scores.items() if index != 1)
    drop.scores = {index: abs(value) for index, value in drop.scores.items()}
    drop.variant, drop.entropies = "paper", [0.0] + [1.0] * 3 if score != "knn" else [1.0, 0.0, 1.0, 1.0]
    drop.dropped = drop.choose(model)
    assert drop.dropped == [1]
    before = zoo.outputs(model, family)
    drop.apply(model)
    torch.testing.assert_close(zoo.outputs(model, family), before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(zoo.outputs(load(tmp_path).eval(), family), before, atol=1e-5, rtol=1e-5)


def test_gains_add_up_and_are_means_over_texts(data: Data) -> None:
    model = zoo.build("llama")
    drop = EntroDrop()
    drop.measure(model, data)
    assert len(drop.entropies) == 4
    assert drop.entropies[3] - drop.entropies[0] == pytest.approx(sum(drop.scores.values()))
    first = []
    for batch in data.batches(4, batch_size=1):
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        first.append([bucket_entropy(one[0]) for one in states[:-1]])  # the last has been through the final norm
    assert drop.entropies[:3] == pytest.approx(torch.tensor(first).mean(0).tolist(), rel=1e-5)


def test_attention_is_scored_by_the_stream_after_it() -> None:
    model = zoo.build("llama")
    layers = describe(model).layers
    with streams(model, layers, "attention") as found, torch.no_grad():
        states = model(**zoo.batch_for("llama"), output_hidden_states=True).hidden_states
        block = model.model.layers[1]
        rope = model.model.rotary_emb(states[1], torch.arange(7)[None])
        mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
        added = block.self_attn(block.input_layernorm(states[1]), position_embeddings=rope, attention_mask=mask)[0]
    before, after = found[1]
    torch.testing.assert_close(before, states[1])
    torch.testing.assert_close(after, states[1] + added, atol=1e-4, rtol=1e-4)


def test_padding_is_no_point(data: Data) -> None:
    model = zoo.build("gpt2")
    plain = data.task.collate

    def padded(items):
        ids = plain(items)["input_ids"]
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :5])], 1)
        return {"input_ids": torch.cat([ids, torch.zeros_like(ids[:, :5])], 1), "attention_mask": mask}

    drop, other = EntroDrop(), EntroDrop()
    drop.measure(model, data)
    data.task.collate = padded
    other.measure(model, data)
    assert other.entropies == pytest.approx(drop.entropies, rel=1e-5)


# The choice


def chosen(model, entropies: list[float], scores: dict[int, float], **options) -> list[int]:
    drop = EntroDrop(**options)
    drop.entropies, drop.scores = entropies, scores
    return drop.choose(model)


def deep() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**zoo.GROUPED, "num_hidden_layers": 6})).eval()


def test_what_comes_before_the_turn_stays() -> None:
    model = deep()
    scores = {0: -3.0, 1: -2.0, 2: 0.5, 3: 0.1, 4: 0.2, 5: 0.0}
    entropies = [5.0, 2.0, 0.0, 0.5, 0.6, 0.8, 0.8]
    assert chosen(model, entropies, scores, count=1) == [5]
    assert chosen(model, entropies, scores, count=3) == [3, 4, 5]
    assert chosen(model, entropies, scores, count=4) == [2, 3, 4, 5]
    with pytest.raises(FormwrightError, match="only 4 may"):
        chosen(model, entropies, scores, count=5)
    assert chosen(model, entropies, scores, count=3, variant="release") == [2, 3, 4]
    with pytest.raises(FormwrightError, match="only 3 may"):
        chosen(model, entropies, scores, count=4, variant="release")
    assert chosen(model, [], scores, count=2, score="cosine") == [0, 1]  # the baseline knows no stages


def test_before_the_first_layer_equal_tokens_are_no_turn_for_knn() -> None:
    model, scores = deep(), dict.fromkeys(range(6), 0.0)
    rising = [-50.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert chosen(model, rising, scores, count=1, score="knn") == [1]
    assert chosen(model, rising, scores, count=1) == [0]


def test_none_is_nothing(data: Data) -> None:
    model = zoo.build("llama")
    before = zoo.outputs(model, "llama")
    drop = EntroDrop(count=0)
    drop.calibrate(model, data)
    drop.apply(model)
    assert torch.equal(zoo.outputs(model, "llama"), before)
    assert len(model.model.layers) == 3


# What is left


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "qwen3"])
def test_a_dropped_attention_is_one_of_zeros_and_has_no_cache(family: str) -> None:
    model, other = zoo.build(family), zoo.build(family)
    silence(other, 1, feedforward=False)
    drop = EntroDrop(granularity="attention")
    drop.dropped = [1]
    drop.apply(model)
    torch.testing.assert_close(zoo.outputs(model, family), zoo.outputs(other, family), atol=1e-5, rtol=1e-5)
    ids = zoo.batch_for(family)["input_ids"]
    with torch.no_grad():
        caches = [one(ids, use_cache=True).past_key_values for one in (other, model)]
    held = [sum(layer.is_initialized for layer in cache.layers) for cache in caches]
    assert held == [3, 2]
    for sampled in (model, other):
        sampled.generation_config.pad_token_id = 0
    a, b = (one.generate(ids, max_new_tokens=5, do_sample=False) for one in (model, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("granularity", ["layer", "attention"])
def test_as_a_step_of_a_recipe(granularity: str, data: Data, tmp_path) -> None:
    model = deep()
    modifier = build("modifier", f"entrodrop(granularity={granularity}, count=1, variant=release, samples=3)")
    pipeline.apply(model, modifier, data)
    left = describe(model).layers
    assert len(left) == (5 if granularity == "layer" else 6)
    assert sum(layer.attention is not None for layer in left) == 5
    assert set(modifier.dropped) <= {2, 3, 4}
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(zoo.outputs(load(tmp_path).eval(), "llama"), zoo.outputs(model, "llama"))


@pytest.mark.parametrize("family", ["bert", "t5", "albert", "whisper"])
def test_models_without_one_pre_norm_stream_are_refused(family: str) -> None:
    with pytest.raises(FormwrightError):
        EntroDrop().check(zoo.build(family))


def test_the_cosine_serves_post_norm_layers_too(data: Data, tmp_path) -> None:
    model = zoo.build("bert")
    norm = model.bert.encoder.layer[1].output.LayerNorm
    silence(model, 1)
    for one in (model.bert.encoder.layer[i].output.LayerNorm for i in range(3)):
        one.weight.data.fill_(1.0)
        one.bias.data.zero_()
    attention = model.bert.encoder.layer[1].attention.output.LayerNorm
    attention.weight.data.fill_(1.0)
    attention.bias.data.zero_()
    assert norm.eps < 1e-6  # so that normalising twice is normalising once
    before = zoo.outputs(model, "bert")
    modifier = build("modifier", "entrodrop(score=cosine, samples=3)")
    pipeline.apply(model, modifier, data)
    assert modifier.dropped == [1]
    torch.testing.assert_close(zoo.outputs(model, "bert"), before, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(zoo.outputs(load(tmp_path).eval(), "bert"), zoo.outputs(model, "bert"))
    with pytest.raises(FormwrightError, match="resets the entropy"):
        EntroDrop(score="cosine", granularity="attention").check(zoo.build("bert"))


@pytest.mark.parametrize(
    "spec",
    [
        "entrodrop(score=best)", "entrodrop(granularity=head)", "entrodrop(count=-1)", "entrodrop(variant=mine)",
        "entrodrop(samples=0)", "entrodrop(bins=1)", "entrodrop(score=knn, bins=20)", "entrodrop(neighbours=3)",
        "entrodrop(score=knn, neighbours=0)",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(spec: str) -> None:
    with pytest.raises(FormwrightError):
        build("modifier", spec)
