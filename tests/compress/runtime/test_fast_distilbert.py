"""Fast DistilBERT: whole blocks, a locked pattern, exact integers, and a runtime that gives what its layers give."""

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import formwright
from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.modifier import Data
from formwright.compress.prune.llm_weight_pruning import matrices
from formwright.compress.recipe import Recipe
from formwright.compress.runtime import fast_distilbert as fast
from formwright.compress.runtime.fast_distilbert import (
    BlockPrune,
    FusedSparse,
    SparseBlockLinear,
    SparseEncoder,
    SparseInt8,
    block_scores,
    divisible,
    pattern_lock,
    sparsity,
)
from formwright.errors import FormwrightError
from formwright.ops import block_sparse
from formwright.training import Settings

from .. import zoo

needs_kernel = pytest.mark.skipif(block_sparse.kernel() is None, reason="the kernels are not built")
TEXT = {"vocab_size": 40, "pad_token_id": 0, "max_position_embeddings": 96}


def collate(items):
    ids, mask, labels = (torch.stack([one[i] for one in items]) for i in range(3))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch(lengths=(9, 5, 1), seed=0) -> dict[str, Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, 40, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture
def data() -> Data:
    given = batch(tuple(3 + i % 7 for i in range(32)), seed=1)
    labels = given["input_ids"].sum(1) % 2
    rows = TensorDataset(given["input_ids"], given["attention_mask"], labels)
    task = SimpleNamespace(
        **{"name": "rows", "head": "sequence-classification", "train": rows, "validation": None, "test": rows},
        **{"score": None, "summary": None, "collate": collate},
    )
    settings = Settings(steps=12, batch_size=8, learning_rate=1e-2, weight_decay=0.1)
    return Data(task=task, kind="text-classification", settings=settings)


def distilbert(activation="gelu", seed=0) -> nn.Module:
    torch.manual_seed(seed)
    config = DistilBertConfig(**TEXT, dim=24, hidden_dim=40, n_heads=3, n_layers=2, activation=activation)
    return spread(DistilBertForSequenceClassification(config))


def bert(activation="gelu", width=40) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": width, "num_attention_heads": 3, "num_hidden_layers": 2}
    return spread(BertForSequenceClassification(BertConfig(**TEXT, **sizes, hidden_act=activation)))


def spread(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def zeroed(model: nn.Module, share=0.6, seed=5) -> nn.Module:
    """Without training: random blocks are zero."""
    generator = torch.Generator().manual_seed(seed)
    for one in divisible(matrices(model)).values():
        rows, columns = one.values.shape
        kept = (torch.rand(rows // 4, columns, generator=generator) >= share).repeat_interleave(4, 0)
        one.weight.data.mul_(one.seen(kept))
    return model


def answer(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def sparse(data: Data, make=distilbert, **options) -> nn.Module:
    model = zeroed(make())
    pipeline.apply(model, SparseInt8(**options), data)
    return model


# The pattern


def test_a_block_is_four_outputs_of_one_input() -> None:
    weight = torch.tensor([[1.0, 0, 3], [-2, 0, 0], [3, 0, 0], [0, 0, -4]])
    assert block_scores(weight, "l1").tolist() == [[6.0, 0.0, 7.0]]
    assert block_scores(weight, "l2")[0].tolist() == pytest.approx([14**0.5, 0.0, 5.0])
    assert sparsity(weight) == pytest.approx(1 / 3)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_pruning_leaves_whole_blocks_and_exactly_the_amount(data, scope, norm) -> None:
    model = distilbert()
    change = pipeline.apply(model, BlockPrune(amount=0.8, scope=scope, norm=norm, every=2), data)
    found = divisible(matrices(model))
    assert len(found) == 12
    parts = [(one.values == 0).unflatten(0, (-1, 4)) for one in found.values()]
    assert all(torch.equal(zero.any(1), zero.all(1)) for zero in parts)
    gone, count = sum(int(zero.all(1).sum()) for zero in parts), sum(zero.shape[0] * zero.shape[2] for zero in parts)
    if scope == "global":
        assert gone == round(0.8 * count)
    else:
        for zero in parts:
            assert int(zero.all(1).sum()) == round(0.8 * zero[:, 0].numel())
    assert change.simulated


def test_masks_are_nested_follow_the_cubic_and_are_locked_at_the_end(data) -> None:
    model, chosen = distilbert(), []

    class Watched(BlockPrune):
        def choose(self, found, amount):
            super().choose(found, amount)
            chosen.append((amount, {path: mask.clone() for path, mask in self.masks.items()}))

    pipeline.apply(model, Watched(amount=0.75, every=2, lock=0.34), data)
    assert [round(amount, 6) for amount, _ in chosen] == [
        round(0.75 * (1 - (1 - step / 8) ** 3), 6) for step in (2, 4, 6, 8)
    ]
    for (_, before), (_, after) in pairwise(chosen):
        assert all(bool((before[path] | ~after[path]).all()) for path in before)
    last = chosen[-1][1]
    for path, one in divisible(matrices(model)).items():
        assert torch.equal(one.values != 0, last[path])


def test_locked_weights_have_no_momentum_whatever_the_optimizer_did() -> None:
    model = distilbert()
    found = divisible(matrices(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    masks = {path: torch.ones_like(one.values, dtype=torch.bool) for path, one in found.items()}
    given = batch() | {"labels": torch.tensor([0, 1, 0])}

    def train() -> None:
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with pattern_lock(found, masks):
        train()  # moments of all weights are there
        for mask in masks.values():
            mask[:4, ::2] = False
        for _ in range(3):
            train()
            for path, one in found.items():
                assert not one.weight[:4, ::2].any()
                assert not optimizer.state[one.weight]["exp_avg"][:4, ::2].any()
                assert not optimizer.state[one.weight]["exp_avg_sq"][:4, ::2].any()
                assert bool(one.weight[masks[path]].all())
    train()
    assert any(bool(one.weight[:4, ::2].any()) for one in found.values())  # the lock is gone with its context


def test_distillation_after_pruning_keeps_the_pattern(data) -> None:
    model = distilbert()
    data.teacher = copy.deepcopy(model)
    pipeline.apply(model, BlockPrune(every=3), data)
    zeros = {path: one.values == 0 for path, one in matrices(model).items()}
    pipeline.apply(model, build("modifier", "distill(steps=4)"), data)
    assert all(torch.equal(one.values == 0, zeros[path]) for path, one in matrices(model).items())


def test_pruning_can_learn_from_the_original_model_at_once(data) -> None:
    modifier = BlockPrune(alpha=0.9, hidden=1.0, every=3)
    assert modifier.uses_teacher
    assert not BlockPrune().uses_teacher
    with pytest.raises(FormwrightError, match="teacher"):
        pipeline.apply(distilbert(), modifier, data)
    found = []
    for options in ({}, {"alpha": 0.9}, {"alpha": 0.9, "temperature": 4.0}, {"alpha": 0.9, "hidden": 1.0}):
        model = distilbert()
        data.teacher = distilbert(seed=1)
        pipeline.apply(model, BlockPrune(every=3, **options), data)
        found.append(answer(model, batch()))
    assert all(not torch.equal(one, other) for i, one in enumerate(found) for other in found[:i])


def test_gpt2_is_pruned_along_its_own_axis() -> None:
    model = zoo.build("gpt2")
    modifier = BlockPrune(amount=0.5)
    found = divisible(matrices(model))
    modifier.masks = {path: torch.ones_like(one.values, dtype=torch.bool) for path, one in found.items()}
    modifier.choose(found, 0.5)
    path = next(path for path in found if path.endswith("c_fc"))
    assert modifier.masks[path].shape == (24, 16)
    scores = block_scores(found[path].module.weight.T, "l1")
    kept = modifier.masks[path][::4]
    assert scores[kept].min() >= scores[~kept].max()


# In integers


def quantised(layer: nn.Linear, x: Tensor, low: float, high: float) -> Tensor:
    """The same in plain float64, from the definitions."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    codes = (x.double() / step).round().add(zero).clamp(0, 255) - zero
    scale = layer.weight.double().abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    weight = (layer.weight.double() / scale[:, None]).round()
    return (codes @ weight.T) * step * scale + (0 if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("span", [(-3.0, 5.0), (0.5, 4.0), (-4.0, -1.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_its_definition_with_and_without_the_kernel(span, bias, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 16, bias=bias)
    layer.weight.data *= (torch.rand(4, 30) > 0.7).repeat_interleave(4, 0)
    made = SparseBlockLinear.of(layer, *span)
    x = torch.rand(2, 70, 30) * (span[1] - span[0]) + span[0]
    with torch.no_grad():
        wanted = quantised(layer, x, *span)
        torch.testing.assert_close(made(x).double(), wanted, atol=1e-5, rtol=1e-5)
        monkeypatch.setattr(fast, "_native", lambda _: False)
        torch.testing.assert_close(made(x).double(), wanted, atol=1e-5, rtol=1e-5)
        assert made(x.to(torch.bfloat16)).dtype == torch.bfloat16
        assert made(x[:, :0]).shape == (2, 0, 16)
    assert torch.equal(made.integers == 0, layer.weight == 0)  # no weight of a block became zero here, and no zero more
    assert (made.weight - layer.weight).abs().max() <= layer.weight.abs().max() / 250


@pytest.mark.reference
def test_it_equals_pytorchs_own_quantised_linear() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(32, 24)
    layer.weight.data *= (torch.rand(6, 32) > 0.6).repeat_interleave(4, 0)
    x = torch.randn(50, 32)
    made = SparseBlockLinear.of(layer, x.min().item(), x.max().item())
    scale, zero = made.ready.scale, made.ready.zero
    theirs = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
    scales = made.weight_scale.view(torch.float32).double()
    weight = torch.quantize_per_channel(layer.weight.detach(), scales, torch.zeros(24), 0, torch.qint8)
    with torch.no_grad():
        wanted = nn.functional.linear(theirs.dequantize(), weight.dequantize(), layer.bias)
        torch.testing.assert_close(made(x), wanted, atol=1e-5, rtol=1e-5)
    codes = block_sparse.quantise(x, scale, zero)
    assert (codes.int() - theirs.int_repr().int()).abs().max() <= 1
    csr = (made.integers.float()).to_sparse_csr()  # torch.sparse: exact below 2^24
    assert torch.equal((csr @ (codes.float() - zero).T).T.to(torch.int32), made.whole(codes))


def test_a_matrix_without_any_block_gives_its_bias() -> None:
    layer = nn.Linear(6, 8)
    layer.weight.data.zero_()
    made = SparseBlockLinear.of(layer, -1.0, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(made(torch.randn(3, 6)), layer.bias.expand(3, 8))


def test_storage_is_a_byte_a_weight_and_two_a_block() -> None:
    layer = nn.Linear(128, 256, bias=False)
    layer.weight.data *= (torch.rand(64, 128) > 0.8).repeat_interleave(4, 0)
    made = SparseBlockLinear.of(layer, -1.0, 1.0)
    blocks = round((1 - sparsity(layer.weight)) * 64 * 128)
    assert made.values.nbytes + made.columns.nbytes == blocks * (4 + 2)
    assert made.values.nbytes + made.columns.nbytes < 0.1 * layer.weight.nbytes


def test_calibration_leaves_padding_out_and_zeros_stay_zero(data) -> None:
    model = zeroed(distilbert())
    before = {path: one.values == 0 for path, one in matrices(model).items()}
    modifier = SparseInt8(samples=32)
    modifier.check(model)
    modifier.calibrate(model, data)
    seen = {}
    layer = model.distilbert.transformer.layer[1].ffn.lin2
    layer.register_forward_pre_hook(lambda _, given: seen.update(x=given[0]))
    low, high = float("inf"), -float("inf")
    for rows in data.batches(2, batch_size=16):
        answer(model, rows)
        real = seen["x"][rows["attention_mask"].bool()]
        low, high = min(low, real.min().item()), max(high, real.max().item())
    assert modifier.ranges["distilbert.transformer.layer.1.ffn.lin2"] == pytest.approx((low, high))
    modifier.apply(model)
    for path, zero in before.items():
        assert torch.equal(model.get_submodule(path).integers[zero].any(), torch.tensor(False))


@pytest.mark.parametrize("make", [distilbert, bert])
def test_it_saves_and_comes_back(data, make, tmp_path) -> None:
    model = sparse(data, make)
    wanted = answer(model, batch())
    model.save_pretrained(tmp_path)
    loaded = formwright.load(tmp_path).eval()
    assert isinstance(loaded.executor, FusedSparse)
    assert torch.equal(answer(loaded, batch()), wanted)
    assert torch.equal(answer(copy.deepcopy(loaded), batch()), wanted)
    layer = next(one for one in loaded.modules() if isinstance(one, SparseBlockLinear))
    assert pickle.loads(pickle.dumps(layer))._ready is None


def test_weights_loaded_later_count(data) -> None:
    model, other = sparse(data), sparse(data, lambda: distilbert(seed=3))
    before = answer(other, batch())
    other.load_state_dict(model.state_dict())  # the same blocks are held by both
    assert torch.equal(answer(other, batch()), answer(model, batch()))
    assert not torch.equal(answer(other, batch()), before)


def test_bfloat16_leaves_scales_and_bias_alone(data) -> None:
    model = sparse(data)
    layer = next(one for one in model.modules() if isinstance(one, SparseBlockLinear))
    before = layer.ready.matrix.factors.clone(), layer.ready.matrix.bias.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.ready.matrix.factors, before[0])
    assert torch.equal(layer.ready.matrix.bias, before[1])
    assert answer(model, batch()).dtype == torch.bfloat16  # by the model's own forward


def test_spared_matrices_are_those_that_lose_most(data) -> None:
    model = zeroed(distilbert())
    hurt = model.distilbert.transformer.layer[0].ffn.lin1
    hurt.weight.data[:, 3] *= 1000  # takes all 8 bits of every row
    model.distilbert.transformer.layer[0].sa_layer_norm.weight.data[3] = 0.0
    model.distilbert.transformer.layer[0].sa_layer_norm.bias.data[3] = 0.0  # and is multiplied by nothing
    pipeline.apply(model, SparseInt8(spare=1), data)
    kinds = {path: type(one) for path, one in model.named_modules() if "lin" in path.rpartition(".")[2]}
    assert [path for path, kind in kinds.items() if kind is nn.Linear] == ["distilbert.transformer.layer.0.ffn.lin1"]
    assert getattr(model, "executor", None) is None  # matrix by matrix


# The runtime


@needs_kernel
@pytest.mark.parametrize("make", [distilbert, bert, lambda: distilbert("relu"), lambda: bert("gelu_new")])
@pytest.mark.parametrize("lengths", [(9, 5, 1), (7, 7, 7), (90, 3, 41), (1,)])
def test_the_fused_encoder_gives_what_its_layers_give_one_by_one(data, make, lengths, monkeypatch) -> None:
    model = sparse(data, make)
    given = batch(lengths)
    with monkeypatch.context() as without:  # no layer runs by itself
        without.setattr(SparseBlockLinear, "forward", None)
        fused = answer(model, given)
    executor = model._modules.pop("executor")
    plain = answer(model, given)
    assert isinstance(executor, FusedSparse)
    # a byte may round the other way where a float lies in the middle: a few steps of 1/255 at the most
    torch.testing.assert_close(fused, plain, atol=0.05 * plain.abs().max().item(), rtol=0)


@needs_kernel
def test_every_layer_is_within_one_step_of_its_plain_form(data) -> None:
    model = sparse(data)
    base = model.distilbert
    engine = SparseEncoder(base)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 70, 24, generator=generator)
    with torch.no_grad():
        for number, plain in enumerate(base.transformer.layer):
            read, kept = block_sparse.to_panels(states[0], *engine.layers[number].reads, keep=True)
            following = (0.04, 128)
            room = torch.empty(70 * 72), torch.empty(128 * 40, dtype=torch.uint8)
            made = engine.layer(engine.layers[number], read, kept, torch.tensor([0, 70]), following, *room)
            wanted = plain(states)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
            ours = block_sparse.from_panels(kept)
            assert ((ours - wanted[0]).abs() / 0.04).mean() < 0.05
            assert ((ours - wanted[0]).abs() / 0.04).max() <= 1
            assert made.values.shape == (2, 24, 64)
            states = wanted


@needs_kernel
def test_what_stands_at_padding_and_who_else_is_in_the_batch_change_nothing(data) -> None:
    model = sparse(data)
    given = batch((9, 4, 2))
    alone = torch.cat([answer(model, {k: v[i : i + 1, :n] for k, v in given.items()}) for i, n in enumerate((9, 4, 2))])
    torch.testing.assert_close(answer(model, given), alone, atol=1e-5, rtol=1e-5)
    filled = {**given, "input_ids": torch.where(given["attention_mask"].bool(), given["input_ids"], 7)}
    assert torch.equal(answer(model, given), answer(model, filled))


def test_other_families_are_run_matrix_by_matrix() -> None:
    model = zeroed(zoo.build("vit"))
    found = divisible(matrices(model))
    inputs = zoo.batch_for("vit")
    modifier = SparseInt8()
    modifier.ranges = dict.fromkeys(found, (-6.0, 6.0))
    formwright.compress.structure.adopt(model)
    before = zoo.outputs(model, "vit")
    modifier.apply(model)
    assert getattr(model, "executor", None) is None
    with torch.no_grad():
        after = model(**inputs)[0]
    assert 0 < (after - before).abs().max() < 0.3 * before.abs().max()


def test_a_recipe_runs_from_pruning_to_integers(data, tmp_path) -> None:
    model = distilbert()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "steps:\n  - block-prune: {amount: 0.8, every: 2}\n  - distill: {steps: 4, alpha: 0.9}\n"
        "  - sparse-int8: {samples: 16}\n"
    )
    model, changes = pipeline.run(model, path, data)
    assert [one.simulated for one in changes] == [True, False, False]
    assert changes[2].bytes[1] < changes[2].bytes[0]
    assert answer(model, batch()).isfinite().all()


# Bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"amount": 1.0}, "amount"),
        ({"amount": 0.0}, "amount"),
        ({"norm": "l3"}, "norm"),
        ({"scope": "row"}, "scope"),
        ({"every": 0}, "every"),
        ({"lock": 1.0}, "lock"),
        ({"alpha": 2.0}, "alpha"),
        ({"temperature": 0.0}, "temperature"),
        ({"hidden": -1.0}, "hidden"),
        ({"steps": 0}, "steps"),
    ],
)
def test_impossible_options_are_refused(options, says) -> None:
    with pytest.raises(FormwrightError, match=says):
        build("modifier", {"name": "block-prune", **options})


def test_what_cannot_be_done_is_said(data) -> None:
    with pytest.raises(FormwrightError, match="samples"):
        SparseInt8(samples=0)
    with pytest.raises(FormwrightError, match="spare"):
        SparseInt8(spare=-1)
    with pytest.raises(FormwrightError, match="nothing would be left"):
        SparseInt8(spare=12).check(zeroed(distilbert()))
    with pytest.raises(FormwrightError, match="block-prune before"):
        SparseInt8().check(distilbert())
    with pytest.raises(FormwrightError, match="calibration"):
        SparseInt8().apply(zeroed(distilbert()))
    broken = zeroed(distilbert())
    broken.distilbert.transformer.layer[0].ffn.lin1.weight.data[0, 0] = torch.nan
    with pytest.raises(FormwrightError, match="no number"):
        SparseInt8().check(broken)
    model = sparse(data)
    for modifier in (BlockPrune(), SparseInt8()):
        with pytest.raises(FormwrightError):
            modifier.check(model)
    with pytest.raises(FormwrightError, match="no gradients"):
        model.train()(**batch(), labels=torch.tensor([0, 1, 0]))
    with pytest.raises(FormwrightError, match="no loss"):
        BlockPrune().check(zoo.build("mpnet"))


def test_the_recipe_on_the_page_can_be_read(tmp_path) -> None:
    page = Path(__file__).parents[3] / "docs" / "systems" / "fast-distilbert.md"
    path = tmp_path / "recipe.yaml"
    path.write_text(page.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0])
    kinds = [type(one).__name__ for one in Recipe.read(path).modifiers()]
    assert kinds == ["BlockPrune", "Distill", "SparseInt8"]
