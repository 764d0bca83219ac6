"""Training methods: each sees every batch and step, in order; what they add is removed, resumed and scaled rightly."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from formwright.errors import FormwrightError
from formwright.training import Method, Settings, fit
from formwright.training.settings import named

WORKER = str(Path(__file__).with_name("worker.py"))


class Told(Method):
    """Writes down every call."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def note(self, what, *rest):
        self.calls.append((self.name, what, *rest))

    def check(self, model, task, settings):  # noqa: ARG002
        self.note("check")

    def prepare(self, model, task, settings):  # noqa: ARG002
        self.note("prepare")

    def collate(self, collate):
        self.note("collate")
        return collate

    def forward(self, given):
        self.note("in", given.step)
        outputs = given.run(given.batch)
        self.note("out", given.step)
        return outputs

    def gradients(self, model, step):
        assert all(parameter.grad is not None for parameter in model.parameters())
        self.note("gradients", step)

    def stepped(self, model, step):  # noqa: ARG002
        self.note("stepped", step)

    def finish(self, model):  # noqa: ARG002
        self.note("finish")


class Halves(Method):
    """Propagates half of the loss at once, the other half as usual: together the plain gradient."""

    def forward(self, given):
        outputs = given.run(given.batch)
        given.backward(outputs["loss"] / 2)
        again = given.run(given.batch)
        again["loss"] = again["loss"] / 2
        return again


class Gain(Method):
    """A trained number on the loss, which hangs on the model while it trains."""

    def prepare(self, model, task, settings):  # noqa: ARG002
        model.gain = nn.Parameter(torch.ones(()))

    def forward(self, given):
        outputs = given.run(given.batch)
        outputs["loss"] = outputs["loss"] * given.model.gain
        outputs["extra_losses"] = {"gain": given.model.gain}
        return outputs

    def finish(self, model):
        del model.gain


def test_hooks_come_in_order_and_the_first_method_is_the_outermost(worker):
    calls = []
    first, second = Told("a", calls), Told("b", calls)
    fit(worker.small(), worker.ragged(), replace(worker.SETTINGS, steps=2, save_every=0), methods=[first, second])
    step = [
        lambda n: [("a", "in", n), ("b", "in", n), ("b", "out", n), ("a", "out", n)],
        lambda n: [("a", "gradients", n), ("b", "gradients", n), ("a", "stepped", n), ("b", "stepped", n)],
    ]
    expected = [(name, what) for what in ("check", "prepare", "collate") for name in "ab"]
    for n in (1, 2):
        expected += [*step[0](n), *step[1](n)]
    assert calls == [*expected, ("b", "finish"), ("a", "finish")]


def test_a_method_that_does_nothing_leaves_the_run_alone(worker):
    settings = replace(worker.SETTINGS, steps=4, save_every=0)
    plain, watched = worker.small(), worker.small()
    losses = fit(plain, worker.ragged(), settings).losses
    assert fit(watched, worker.ragged(), settings, methods=[Method()]).losses == losses
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_part_propagated_early_is_scaled_as_the_rest(worker, accumulate):
    def gradients(methods):
        model, found = worker.small(dropout=0.0), {}

        class Keep(Method):
            def gradients(self, model, step):  # noqa: ARG002
                found.update({name: p.grad.clone() for name, p in model.named_parameters()})

        settings = replace(worker.SETTINGS, steps=1, save_every=0, clip=0.0, accumulate=accumulate)
        fit(model, worker.ragged(), settings, methods=[*methods, Keep()])
        return found

    plain, halves = gradients([]), gradients([Halves()])
    for name, gradient in plain.items():
        torch.testing.assert_close(halves[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_what_a_method_hangs_on_the_model_is_trained_recorded_and_taken_away(worker):
    model = worker.small()
    before = set(model.state_dict())
    history = fit(model, worker.ragged(), replace(worker.SETTINGS, steps=5, save_every=0), methods=[Gain()])
    assert set(model.state_dict()) == before
    assert history.extras["gain"][0] == 1 > history.extras["gain"][-1]


def test_an_error_takes_it_away_too(worker):
    model = worker.small()
    before = set(model.state_dict())
    settings = replace(worker.SETTINGS, steps=60, save_every=0, learning_rate=1e38, clip=0.0)
    with pytest.raises(FormwrightError, match="learning_rate"):
        fit(model, worker.ragged(), settings, methods=[Gain()])
    assert set(model.state_dict()) == before


def test_a_killed_run_goes_on_from_the_methods_state(worker, tmp_path):
    done = subprocess.run(
        [sys.executable, WORKER, str(tmp_path), "counted"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    counting = worker.Counting()
    fit(worker.small(), worker.ragged(), worker.SETTINGS, folder=tmp_path, methods=[counting])
    assert counting.seen.tolist() == [40, sum(range(1, 41))]


def test_names_are_joined_by_plus_and_unknown_ones_are_refused():
    assert named("none") == []
    assert named("a(x=1e+5, y=2) + b") == ["a(x=1e+5, y=2)", "b"]
    with pytest.raises(FormwrightError, match="training"):
        Settings(methods="no-such-method")
