"""The loop: equal gradients however a batch is cut, equal weights after a kill, nothing left behind."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput

from formwright.errors import FormwrightError
from formwright.tasks.base import Columns
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.trainer import SimilarLengths, decay_groups

WORKER = str(Path(__file__).with_name("worker.py"))


def run(command, seconds=240):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def gradients(worker, accumulate):
    """Of the first step's eight rows, whose scored cells differ in number."""
    model = worker.small(dropout=0.0)
    found = {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.__setitem__(name, p.grad.clone()))
    history = fit(
        model, worker.ragged(), replace(worker.SETTINGS, steps=1, save_every=0, clip=0.0, accumulate=accumulate)
    )
    return found, history.losses


@pytest.mark.parametrize("accumulate", [4, 8])
def test_accumulation_gives_the_gradient_and_the_loss_of_the_whole_batch(worker, accumulate):
    whole, loss = gradients(worker, 1)
    parts, same = gradients(worker, accumulate)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)  # sums in another order
    assert same == pytest.approx(loss, rel=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_cells(worker):
    task, model = worker.ragged(rows=8), worker.small(dropout=0.0)
    labels = task.train.columns["labels"]
    with torch.no_grad():
        logits = model(input_ids=task.train.columns["input_ids"]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert fit(model, task, Settings(steps=1, batch_size=8)).losses == pytest.approx([float(expected)], rel=1e-5)


def test_equal_seeds_give_equal_weights_and_others_do_not(worker):
    settings = replace(worker.SETTINGS, steps=5, save_every=0)
    models = [worker.small() for _ in range(3)]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        fit(model, worker.ragged(), replace(settings, seed=seed))
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


@pytest.mark.slow
def test_a_run_killed_at_step_25_resumes_to_the_weights_of_one_that_was_not(worker, tmp_path):
    whole = worker.small()
    history = fit(whole, worker.ragged(), replace(worker.SETTINGS, save_every=0))
    done = run([sys.executable, WORKER, str(tmp_path), "killed"])
    assert done.returncode == -signal.SIGKILL, done.stderr
    (tmp_path / "checkpoints" / "checkpoint-30").mkdir()  # a third one, cut off before its last file
    resumed = worker.small()
    told = []
    after = fit(resumed, worker.ragged(), worker.SETTINGS, folder=tmp_path, progress=lambda step, *_: told.append(step))
    assert told == list(range(21, 41))
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert after.losses == history.losses
    assert not list(tmp_path.rglob("*"))  # no checkpoint, no pickle


def test_another_runs_checkpoints_are_no_start_for_this_one(worker, tmp_path):
    saved = tmp_path / "checkpoints"
    saved.mkdir()
    (saved / "settings.json").write_text('{"learning_rate": 0.5}')
    with pytest.raises(FormwrightError, match=r"learning_rate 0\.5 and not 0\.01"):
        fit(worker.small(), worker.ragged(), worker.SETTINGS, folder=tmp_path)
    fit(worker.small(), worker.ragged(), replace(worker.SETTINGS, steps=1), folder=tmp_path, resume=False)


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(worker, tmp_path):
    model = worker.small(dropout=0.0)
    alone = fit(model, worker.ragged(), replace(worker.SETTINGS, save_every=0))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = run([*launcher, WORKER, str(tmp_path), "both"])
    assert done.returncode == 0, done.stderr
    import json

    both = json.loads((tmp_path / "losses.json").read_text())
    assert both == pytest.approx(alone.losses, rel=1e-4)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)  # forty steps of sums in another order


@pytest.mark.parametrize("batch_size", [1, 7, 57, 100])
def test_evaluation_counts_every_row_once_in_its_order(worker, batch_size):
    task, model = worker.ragged(), worker.small().train()
    seen = evaluate(model, task, batch_size=batch_size)
    assert len(seen.items) == 57
    assert model.training
    tokens, labels = task.test.columns["input_ids"], task.test.columns["labels"]
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
    assert torch.equal(seen.items.cells, (labels != -100).sum(1))
    assert torch.equal(seen.items.hits, ((logits.argmax(-1) == labels) & (labels != -100)).sum(1))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert seen.metrics["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_evaluation_says_that_there_are_no_validation_rows(worker):
    with pytest.raises(FormwrightError, match="ragged holds no validation rows"):
        evaluate(worker.small(), worker.ragged(), "validation")


def test_the_learning_curve_leaves_the_training_alone(worker):
    settings = replace(worker.SETTINGS, steps=6, save_every=0)
    plain = fit(worker.small(), worker.ragged(), settings)
    watched = fit(worker.small(), worker.ragged(), replace(settings, evaluate_every=3))
    assert watched.losses == plain.losses
    assert [entry["step"] for entry in watched.curve] == [3, 6]
    assert "accuracy" in watched.curve[0]


def test_what_decays_are_matrices_that_are_no_tables_and_no_exceptions():
    model = nn.ModuleDict(
        {"table": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}
    )
    model["second"].no_weight_decay = ("weight",)
    model["first"].weight.requires_grad_(True)
    decayed, spared = decay_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert spared["weight_decay"] == 0
    assert [id(p) for p in decayed["params"]] == [id(model["first"].weight)]
    assert len(spared["params"]) == 6


def test_a_shared_table_is_spared_and_held_once():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["table"].weight
    (spared,) = decay_groups(model, 0.3)
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 1


class WithExtra(nn.Module):
    """A model that reports a loss beside its own."""

    def __init__(self, broken=False):
        super().__init__()
        self.logits, self.broken, self.calls = nn.Embedding(10, 10), broken, 0

    def forward(self, input_ids, labels):
        self.calls += 1
        logits = self.logits(input_ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        out = TokenClassifierOutput(loss=loss * torch.nan if self.broken and self.calls > 2 else loss, logits=logits)
        out["extra_losses"] = {"balance": torch.tensor(float(self.calls))}
        return out


def test_reported_losses_are_recorded_by_name(worker):
    history = fit(WithExtra(), worker.ragged(), replace(worker.SETTINGS, steps=3, save_every=0))
    assert history.extras == {"balance": [1.0, 2.0, 3.0]}


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(worker):
    with pytest.raises(FormwrightError, match=r"ragged is nan in step 3: try a learning_rate below 0\.01"):
        fit(WithExtra(broken=True), worker.ragged(), replace(worker.SETTINGS, steps=9, save_every=0))


def test_too_few_rows_and_a_missing_folder_are_sentences(worker):
    with pytest.raises(FormwrightError, match="5 training rows, fewer than one batch of 8"):
        fit(worker.small(), worker.ragged(rows=5), replace(worker.SETTINGS, save_every=0))
    with pytest.raises(FormwrightError, match="save_every needs a folder"):
        fit(worker.small(), worker.ragged(), worker.SETTINGS)


@pytest.mark.parametrize("rows", [1, 7, 63, 640])
def test_batches_of_similar_length_hold_every_row_once(rows):
    lengths = torch.randint(1, 100, (rows,), generator=torch.Generator().manual_seed(0))
    sampler = SimilarLengths(lengths, 8, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(rows))
    assert order == list(sampler)
    sampler.epoch = 1
    assert rows == 1 or order != list(sampler)
    if rows == 640:
        spread = [lengths[order[i : i + 8]].amax() - lengths[order[i : i + 8]].amin() for i in range(0, rows, 8)]
        assert max(spread) <= 20


def test_nothing_is_written_without_a_folder(worker, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    fit(worker.small(), worker.ragged(), replace(worker.SETTINGS, steps=2, save_every=0))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_seeded_builds_equal_models():
    seeded(7)
    first = torch.rand(3)
    seeded(7)
    assert torch.equal(first, torch.rand(3))


def test_a_dataset_without_many_at_once_is_read_too(worker):
    class Plain(torch.utils.data.Dataset):
        def __init__(self, rows: Columns):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return self.rows[index]

    task = worker.ragged()
    settings = replace(worker.SETTINGS, steps=3, save_every=0)
    plain = replace(task, train=Plain(task.train), test=Plain(task.test))
    assert fit(worker.small(), plain, settings).losses == fit(worker.small(), task, settings).losses
    assert evaluate(worker.small(), plain).metrics == evaluate(worker.small(), task).metrics


def test_the_exceptions_survive_saving_and_loading(tmp_path):
    from transformers import AutoModelForCausalLM

    from formwright.models.transformer import TransformerConfig, TransformerForCausalLM

    parts = {"mixer": "mamba", "feedforward": "fast-feedforward(depth=1)", "position": "none"}
    TransformerForCausalLM(TransformerConfig(architecture="decoder", hidden_size=16, **parts)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    decayed = {id(p) for p in decay_groups(model, 0.1)[0]["params"]}
    names = {name.rpartition("block.")[2] for name, p in model.named_parameters() if id(p) in decayed}
    mixer = {f"mixer.{name}.weight" for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    assert names == mixer | {"feedforward.node_weight", "feedforward.up", "feedforward.down"}
