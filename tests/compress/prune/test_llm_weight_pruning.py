"""Pruning: exact amounts, nested masks, zeros that stay zero, and cut models that equal masked ones."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as theirs
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from formwright.build import build
from formwright.compress import pipeline
from formwright.compress.anatomy import describe
from formwright.compress.modifier import Data
from formwright.compress.prune import llm_weight_pruning
from formwright.compress.prune.llm_weight_pruning import Prune
from formwright.compress.prune.masked import moving
from formwright.compress.prune.matrices import Matrix, matrices, report, sizes
from formwright.compress.prune.scores import (
    cubic,
    gradient_scores,
    input_products,
    keep,
    keep_in_rows,
    keep_pattern,
    keep_together,
    sparsegpt,
)
from formwright.compress.structure import load
from formwright.errors import FormwrightError
from formwright.training import Settings

from .. import zoo


def collate(items):
    ids = torch.stack([one[0] for one in items])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture
def data() -> Data:
    rows = TensorDataset(torch.arange(1, 9).repeat(12, 1) + torch.arange(12)[:, None])
    task = SimpleNamespace(
        name="rows", head="causal-lm", train=rows, validation=None, test=rows, score=None, summary=None, collate=collate
    )
    return Data(task=task, kind="causal-lm", settings=Settings(steps=12, batch_size=4, learning_rate=1e-2))


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    return {path: one.values == 0 for path, one in matrices(model).items()}


def share(model: nn.Module) -> float:
    found = zeros(model).values()
    return sum(int(one.sum()) for one in found) / sum(one.numel() for one in found)


def correlated(rows: int = 400, width: int = 24) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(rows, 6) @ torch.randn(6, width) + 0.3 * torch.randn(rows, width)


# Masks


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.37, 0.5, 0.95])
def test_exactly_the_amount_goes_even_among_equals(amount: float) -> None:
    for scores in (torch.rand(7, 9), torch.ones(7, 9)):
        assert int((~keep(scores, round(amount * 63))).sum()) == round(amount * 63)
        assert (~keep_in_rows(scores, round(amount * 9))).sum(1).tolist() == [round(amount * 9)] * 7
        for scope in ("global", "layer"):
            assert int((~keep_together({"a": scores}, amount, scope)["a"]).sum()) == round(amount * 63)


def test_masks_of_one_shot_magnitude_are_nested() -> None:
    scores = {"a": torch.rand(8, 12), "b": 10 * torch.rand(6, 8)}
    for scope in ("global", "layer", "row"):
        less, more = (keep_together(scores, amount, scope) for amount in (0.4, 0.6))
        assert all((more[path] <= less[path]).all() for path in scores)
    assert (
        keep_together(scores, 0.4, "global")["a"].float().mean()
        < keep_together(scores, 0.4, "layer")["a"].float().mean()
    )


def test_a_pattern_leaves_two_of_four() -> None:
    torch.manual_seed(0)
    scores = torch.rand(6, 16)
    kept = keep_pattern(scores, 2, 4)
    assert (kept.view(6, 4, 4).sum(-1) == 2).all()
    groups, chosen = scores.view(-1, 4), kept.view(-1, 4)
    assert (groups.masked_fill(~chosen, 9).amin(1) >= groups.masked_fill(chosen, -9).amax(1)).all()


def test_the_cubic_begins_at_nothing_and_ends_at_the_amount() -> None:
    values = [cubic(step, 10, 0.8) for step in range(11)]
    assert (values[0], values[10], cubic(12, 10, 0.8)) == (0, 0.8, 0.8)
    assert values == sorted(values)
    assert values[5] == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.reference
@pytest.mark.parametrize("amount", [0.1, 0.33, 0.5, 0.9])
def test_masks_are_those_of_torch(amount: float) -> None:
    torch.manual_seed(1)
    a, b = nn.Linear(13, 11), nn.Linear(11, 7)
    scores = {"a": a.weight.detach().abs(), "b": b.weight.detach().abs()}
    ours = keep_together(scores, amount, "global")
    theirs.global_unstructured([(a, "weight"), (b, "weight")], theirs.L1Unstructured, amount=amount)
    assert torch.equal(ours["a"], a.weight_mask.bool())
    assert torch.equal(ours["b"], b.weight_mask.bool())
    one = nn.Linear(13, 11)
    ours = keep_together({"a": one.weight.detach().abs()}, amount, "layer")["a"]
    theirs.l1_unstructured(one, "weight", amount)
    assert torch.equal(ours, one.weight_mask.bool())
    one = nn.Linear(13, 11)
    ours = keep(one.weight.detach().abs().mean(1), round(amount * 11))[:, None].expand(11, 13)
    theirs.ln_structured(one, "weight", amount, n=1, dim=0)
    assert torch.equal(ours, one.weight_mask.bool())


# Scores that read data


def test_sparsegpt_of_white_inputs_is_magnitude_in_rows_without_updates() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 12)
    made, kept = sparsegpt(weight, 3 * torch.eye(12), 0.5, scope="row")
    assert torch.equal(kept, keep_in_rows(weight.abs(), 6))
    assert torch.equal(made, weight * kept)
    made, kept = sparsegpt(weight, torch.zeros(12, 12), 0.5, pattern=(2, 4))  # inputs that never come
    assert torch.equal(kept, keep_pattern(weight.abs(), 2, 4))


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_sparsegpt_loses_less_than_wanda_and_wanda_less_than_magnitude(scope: str) -> None:
    torch.manual_seed(0)
    inputs = correlated() * torch.logspace(-1, 1, 24)
    weight = torch.randn(16, 24)
    target = inputs @ weight.T
    made, kept = sparsegpt(weight, inputs.T @ inputs, 0.5, scope=scope)
    assert torch.equal(made == 0, ~kept)
    assert int((~kept).sum()) == 16 * 12
    wanda = weight * keep_in_rows(weight.abs() * inputs.norm(dim=0), 12)
    magnitude = weight * keep_in_rows(weight.abs(), 12)
    losses = [float((target - inputs @ one.T).square().mean()) for one in (made, wanda, magnitude)]
    assert losses == sorted(losses)


@pytest.mark.parametrize(("options", "amount"), [({"scope": "row"}, 0.4), ({}, 0.4), ({"pattern": (2, 4)}, 0.5)])
def test_sparsegpt_in_blocks(options: dict, amount: float) -> None:
    """Whatever the block, what stays makes up for what goes; and a late update is the update."""
    torch.manual_seed(0)
    inputs, weight = correlated(), torch.randn(6, 24)
    found = {size: sparsegpt(weight, inputs.T @ inputs, amount, columns=size, **options) for size in (4, 8, 24)}
    for made, kept in found.values():
        assert torch.equal(made == 0, ~kept)
        assert int((~kept).sum()) == round(amount * weight.numel() / 6) * 6 or options == {}
        assert (inputs @ (made - weight).T).norm() < (inputs @ (weight * kept - weight).T).norm()
    if "pattern" in options:
        assert ((found[8][0].view(6, 6, 4) == 0).sum(-1) == 2).all()
        torch.testing.assert_close(found[4][0], found[24][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[8][0], found[24][0], rtol=1e-4, atol=1e-4)


@pytest.mark.reference
def test_sparsegpt_solves_what_obs_solves() -> None:
    """Without damping worth a name, the last columns fit what is left of the target: one column pruned at a time, the
    others solve least squares."""
    torch.manual_seed(0)
    inputs = correlated(200, 4).double()
    weight = torch.randn(1, 4)
    hessian = (inputs.T @ inputs).float()
    kept = torch.ones(1, 4, dtype=torch.bool)
    kept[0, 0] = False  # what goes first is given
    made, mask = sparsegpt(weight, hessian, 0.25, scope="row", kept=kept)
    assert mask.tolist() == [[False, True, True, True]]
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(4)).double()
    rest = damped[1:, 1:]
    exact = weight[0, 1:].double() + torch.linalg.solve(rest, damped[1:, 0]) * weight[0, 0].double()
    torch.testing.assert_close(made[0, 1:].double(), exact, rtol=1e-3, atol=1e-4)


def test_gradient_scores_by_hand(data: Data) -> None:
    model = zoo.build("llama")
    found = matrices(model)
    batches = list(data.batches(2, batch_size=4, labels=True))
    snip, taylor = (gradient_scores(model, found, batches, score) for score in ("snip", "taylor"))
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    products = []
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        products.append({path: one.values * one.weight.grad for path, one in found.items()})
    path = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(snip[path], ((products[0][path] + products[1][path]) / 2).abs())
    torch.testing.assert_close(taylor[path], (products[0][path] ** 2 + products[1][path] ** 2) / 2)


def test_inputs_are_read_without_padding() -> None:
    model = zoo.build("bert")
    layer = describe(model).layers[1]
    found = {path: one for path, one in matrices(model).items() if path.startswith(f"{layer.path}.")}
    ids = torch.randint(3, 40, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    full = input_products(model, layer, found, [{"input_ids": ids, "attention_mask": mask}], full=True)
    apart = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :4]}]
    alone = input_products(model, layer, found, apart, full=False)
    for path in found:
        torch.testing.assert_close(full[path].diagonal(), alone[path], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "albert"])
@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_layers_read_the_pruned_ones_before_them(family: str, score: str, data: Data, monkeypatch) -> None:
    if family in ("bert", "albert"):
        data.task.head = "sequence-classification"
    model = zoo.build(family)
    seen = []
    plain = input_products

    def watched(*args, **kwargs):
        seen.append(share(model))
        return plain(*args, **kwargs)

    monkeypatch.setattr(llm_weight_pruning, "input_products", watched)
    pipeline.apply(model, build("modifier", f"prune(score={score}, amount=0.5)"), data)
    layers = 1 if family == "albert" else 3
    assert seen == pytest.approx([0.5 * i / layers for i in range(layers)], abs=1e-6)
    assert share(model) == pytest.approx(0.5)


def test_wanda_of_equal_inputs_is_magnitude_in_rows(data: Data, monkeypatch) -> None:
    ones = lambda model, layer, found, rows, *, full: {  # noqa: E731, ARG005
        path: torch.full((one.values.shape[1],), 4.0) for path, one in found.items()
    }
    monkeypatch.setattr(llm_weight_pruning, "input_products", ones)
    model, other = zoo.build("llama"), zoo.build("llama")
    pipeline.apply(model, build("modifier", "prune(score=wanda)"), data)
    pipeline.apply(other, build("modifier", "prune(scope=row)"), data)
    assert all(torch.equal(a, b) for a, b in zip(zeros(model).values(), zeros(other).values(), strict=True))


# Models


@pytest.mark.parametrize("family", sorted(zoo.MODELS))
def test_every_family_loses_its_share_and_nothing_else(family: str) -> None:
    model, before = zoo.build(family), zoo.build(family).state_dict()
    prune = Prune(amount=0.3, scope="global")
    prune.check(model)
    prune.apply(model)
    prune.finalize(model)
    count = sum(one.values.numel() for one in matrices(model).values())
    assert sum(int(one.sum()) for one in zeros(model).values()) == round(0.3 * count)
    inside = {f"{path}.weight" for path in matrices(model)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or (name in inside and torch.equal(value, before[name] * (value != 0)))
    assert prune.report.prunable == pytest.approx(0.3, abs=1e-3)


def test_amount_zero_changes_nothing() -> None:
    model = zoo.build("llama")
    before = zoo.outputs(model, "llama")
    for structure in ("unstructured", "block", "neuron", "head", "layer"):
        prune = Prune(amount=0.0, structure=structure)
        prune.apply(model)
        prune.finalize(model)
    assert torch.equal(zoo.outputs(model, "llama"), before)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("structure", ["neuron", "head"])
@pytest.mark.parametrize(
    "family", ["bert", "distilbert", "modernbert", "vit", "gpt2", "opt", "llama", "t5", "wav2vec2"]
)
def test_what_was_cut_out_was_zero(family: str, structure: str, scope: str, tmp_path) -> None:
    model = zoo.build(family)
    prune = Prune(structure=structure, amount=0.5, scope=scope)
    prune.check(model)
    prune.apply(model)
    masked, before = zoo.outputs(model, family), sum(one.values.numel() for one in matrices(model).values())
    nonzero = sum(int(one.values.count_nonzero()) for one in matrices(model).values())
    prune.finalize(model)
    torch.testing.assert_close(zoo.outputs(model, family), masked, rtol=1e-5, atol=1e-5)
    left = sum(one.values.numel() for one in matrices(model).values())
    assert left == nonzero < before
    assert prune.report.realised == prune.report.theoretical == pytest.approx(left / before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(zoo.outputs(load(tmp_path).eval(), family), masked, rtol=1e-5, atol=1e-5)


def test_layers_go_by_the_mean_of_their_weights() -> None:
    model = zoo.build("llama")
    with torch.no_grad():
        for weight in model.model.layers[1].parameters():
            if weight.ndim == 2:
                weight.mul_(0.01)
    prune = Prune(structure="layer", amount=0.4)
    prune.apply(model)
    prune.finalize(model)
    assert [layer._formwright_origin for layer in model.model.layers] == ["model.layers.0", "model.layers.2"]
    assert prune.report.realised == pytest.approx(2 / 3)
    model = zoo.build("t5")
    Prune(structure="layer", amount=0.9).apply(model)  # the first layers hold the position bias
    assert len(describe(model).layers) == 2
    with pytest.raises(FormwrightError, match="one and the same"):
        Prune(structure="layer").apply(zoo.build("albert"))


def test_blocks_and_patterns(data: Data) -> None:
    model = zoo.build("llama")
    pipeline.apply(model, build("modifier", "prune(structure=block, amount=0.25, block=4)"), data)
    for one in zeros(model).values():
        tiles = one.view(one.shape[0] // 4, 4, -1, 4).float().mean((1, 3))
        assert set(tiles.flatten().tolist()) == {0.0, 1.0}
        assert float(one.float().mean()) == pytest.approx(0.25)
    for score in ("magnitude", "snip", "wanda", "sparsegpt"):
        model = zoo.build("gpt2")
        pipeline.apply(model, build("modifier", {"name": "prune", "structure": "2:4", "score": score}), data)
        assert all((one.reshape(-1, 4).sum(1) == 2).all() for one in zeros(model).values())


def test_the_token_table_and_its_tied_head_are_one(data: Data) -> None:
    model = zoo.build("gpt2")
    prune = Prune(embeddings=True, amount=0.5)
    pipeline.apply(model, prune, data)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert float((model.lm_head.weight == 0).float().mean()) == pytest.approx(0.5)
    assert prune.report.sparsity["transformer.wte"] == pytest.approx(0.5)
    assert sizes(model, embeddings=True).prunable - sizes(model).prunable == model.lm_head.weight.numel()


# Training


@pytest.mark.parametrize(
    ("schedule", "score"),
    [
        (schedule, score)
        for schedule in ("one-shot", "iterative")
        for score in ("magnitude", "random", "taylor", "wanda")
    ]
    + [("gradual", score) for score in ("magnitude", "random", "taylor", "snip")],
)
def test_zeros_stay_zero_while_training(schedule: str, score: str, data: Data, monkeypatch) -> None:
    model, final = zoo.build("llama"), []
    plain = Prune.settle

    def watched(self, model, *args, **kwargs):
        before = zeros(model)
        plain(self, model, *args, **kwargs)
        assert all((zeros(model)[path] >= one).all() for path, one in before.items())  # nested
        final.append(zeros(model))

    monkeypatch.setattr(Prune, "settle", watched)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounds = "" if schedule == "one-shot" else ", rounds=3"
    pipeline.apply(
        model, build("modifier", f"prune(score={score}, schedule={schedule}, after=finetune, amount=0.6{rounds})"), data
    )
    assert all(torch.equal(zeros(model)[path], one) for path, one in final[-1].items())
    assert share(model) == pytest.approx(0.6, abs=0.02)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)


@pytest.mark.parametrize("structure", ["neuron", "head"])
def test_units_that_go_while_training_are_cut_out(structure: str, data: Data) -> None:
    for schedule, score in (("iterative", "magnitude"), ("gradual", "magnitude"), ("gradual", "movement")):
        model = zoo.build("llama")
        prune = Prune(structure=structure, schedule=schedule, score=score, after="finetune", rounds=3)
        pipeline.apply(model, prune, data)
        layers = describe(model).layers
        found = {layer.feedforward.width if structure == "neuron" else layer.attention.heads for layer in layers}
        assert found == ({12} if structure == "neuron" else {2})
        assert share(model) == 0


def test_a_gradual_run_follows_the_cubic(data: Data, monkeypatch) -> None:
    model, amounts = zoo.build("llama"), []
    plain = Prune.settle

    def watched(self, model, found, scores, amount, *args, **kwargs):
        plain(self, model, found, scores, amount, *args, **kwargs)
        amounts.append(share(model))

    monkeypatch.setattr(Prune, "settle", watched)
    pipeline.apply(model, build("modifier", "prune(schedule=gradual, rounds=4, amount=0.8)"), data)
    assert amounts == pytest.approx([cubic(i, 4, 0.8) for i in range(1, 5)], abs=0.01)
    assert share(model) == amounts[-1]


def test_movement_keeps_what_moves_away_from_zero(data: Data) -> None:
    model = zoo.build("gpt2")
    prune = Prune(score="movement", amount=0.5, rounds=4)
    path = "transformer.h.0.mlp.c_fc"
    module = model.get_submodule(path)
    plain, seen = prune.settle, []

    def watched(*args, **kwargs):
        seen.append(prune.scores[path].clone())
        plain(*args, **kwargs)

    prune.settle = watched
    pipeline.apply(model, prune, data)
    assert len(seen) == 4
    assert seen[0].abs().sum() > 0
    assert torch.equal(module.weight == 0, ~keep(seen[-1], round(0.5 * seen[-1].numel())).T)
    assert isinstance(module.weight, nn.Parameter)
    assert not hasattr(module, "parametrizations")
    assert share(model) == pytest.approx(0.5)


def test_the_movement_score_is_the_straight_through_gradient() -> None:
    layer = nn.Linear(3, 2, bias=False)
    one = Matrix("a", layer)
    masks = {"a": torch.tensor([[True, False, True], [False, True, True]])}
    scores = {"a": torch.zeros(2, 3)}
    inputs = torch.randn(5, 3)
    weight = layer.weight.detach().clone()
    with moving({"a": one}, masks, scores, lambda: None):
        loss = (layer(inputs) ** 2).sum()
        loss.backward()
        gradient = layer.parametrizations.weight.original.grad
        dense = (weight * masks["a"]).requires_grad_()
        ((inputs @ dense.T) ** 2).sum().backward()
        torch.testing.assert_close(gradient, dense.grad * masks["a"])
        torch.testing.assert_close(scores["a"], -dense.grad * weight)  # masked weights too
    assert torch.equal(layer.weight.detach(), weight * masks["a"])


# Accounting


def test_the_report_counts() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    dense = report(model)
    prunable = 4 * 64 + 3 * 128
    assert (dense.prunable, dense.total, dense.theoretical, dense.realised) == (0, 0, 1, 1)
    assert (dense.dense, dense.bitmask) == (4 * prunable, 4 * prunable + prunable // 8)
    prune = Prune(amount=0.75)
    prune.apply(model)
    prune.finalize(model)
    seen = prune.report
    total = sum(one.numel() for one in model.parameters())
    left = prunable // 4
    assert (seen.prunable, seen.theoretical, seen.realised) == (0.75, 0.25, 1)
    assert seen.total == pytest.approx(0.75 * prunable / total)
    rows = 4 * 8 + 2 * 16 + 8
    assert (seen.dense, seen.bitmask, seen.csr) == (
        4 * prunable, prunable // 8 + 4 * left, 8 * left + 4 * (rows + 7),
    )  # fmt: skip
    assert seen.sparsity == dict.fromkeys(matrices(model), 0.75)


@pytest.mark.parametrize(
    "spec",
    [
        "prune(score=best)", "prune(scope=column)", "prune(structure=4:2)", "prune(structure=0:4)", "prune(amount=1.0)",
        "prune(rounds=0)", "prune(rounds=2)", "prune(steps=5)", "prune(block=8)", "prune(batches=3)",
        "prune(score=movement, schedule=one-shot)", "prune(score=wanda, schedule=gradual)",
        "prune(score=wanda, scope=global)", "prune(score=sparsegpt, structure=neuron)",
        "prune(structure=neuron, scope=row)", "prune(structure=layer, scope=layer)",
        "prune(structure=layer, schedule=gradual)", "prune(score=wanda, structure=layer)",
        "prune(embeddings=true, structure=neuron)", "prune(embeddings=true, score=wanda)",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(spec: str) -> None:
    with pytest.raises(FormwrightError):
        build("modifier", spec)


def test_what_does_not_fit_the_model_is_refused(data: Data) -> None:
    for options in ({"structure": "2:5"}, {"structure": "block", "block": 5}):
        with pytest.raises(FormwrightError, match="does not divide"):
            pipeline.apply(zoo.build("llama"), Prune(**options), data)
    with pytest.raises(FormwrightError, match="computes no loss"):
        pipeline.apply(zoo.build("mpnet"), Prune(after="finetune"), data)
    with pytest.raises(FormwrightError, match="a pattern says"):
        Prune(structure="2:4", amount=0.5)
