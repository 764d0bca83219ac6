"""Claims: half of a trained model's weights go at little loss when it is trained on; and where data are few, a pruned
model generalises better than the dense one.

Paper  Abstract: with well-chosen hyper-parameters large reductions in size are possible without considerable loss, and
       with fine-tuning after pruning some models generalise better. It gives no figures.
Here   A Llama of four layers and width 96 on Shakespeare's bytes. Every matrix inside the layers is pruned, in each the
       same share, by magnitude, at once or gradually, and trained on with its zeros fixed; wanda, sparsegpt and
       magnitude without training beside them; read on 600 windows spread over the test text. For the second claim the
       model is trained on a twentieth of the text and read on all of the test text.
       Times are of 16 windows on one core, against the dense model in turn.
Fair   The dense model is trained on for the same further steps, at the same rate and in the same order. In the second
       claim the share is chosen on validation text among four, the dense model among trained on and left as it was;
       both are judged on the test text.
Rule   holds                in every seed perplexity with 50 % pruned and trained on is at most 1.05 times the dense
                            model's, trained on
       holds in direction   the same of 30 %, on the mean
Rule 2 holds                in every seed the chosen pruned model's test loss is below the chosen dense one's
       holds in direction   on the mean
"""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.compress.modifier import Data
from formwright.compress.pipeline import apply
from formwright.compress.prune.llm_weight_pruning import Prune, Report
from formwright.tasks.base import Task
from formwright.tasks.support.language import Windows, every_window
from formwright.training import Settings, evaluate, fit, seeded

SEEDS = (0, 1, 2)
LENGTH = 64
WIDTH, LAYERS = {"smoke": 16, "full": 96}, {"smoke": 2, "full": 4}
STEPS, FURTHER = {"smoke": 3, "full": 500}, {"smoke": 2, "full": 100}
WINDOWS = {"smoke": 8, "full": 600}  # of the test text, evenly spread, for the first claim
SHARES = (0.3, 0.5, 0.7, 0.9)
FEW = 20  # the text of the second claim is one part in so many
RATE, FURTHER_RATE = 3e-3, 1e-3


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(f"tinyshakespeare(length={LENGTH}, validation=0.05)")
    assert isinstance(task.train, Windows)
    assert isinstance(task.test, Windows)
    starts = task.test.starts[:-1]
    spread = starts[:: max(1, len(starts) // WINDOWS[scale])][: WINDOWS[scale]]
    whole, dense = loss_curve(replace(task, test=Windows(task.test.symbols, LENGTH, spread)), scale, seed)
    few = replace(task, train=every_window(task.train.symbols[: len(task.train.symbols) // FEW], LENGTH))
    pruned, plain = generalisation(few, scale, seed)
    return Outcome(scale=scale, seed=seed, measured=whole | pruned, baseline=dense | plain)


def loss_curve(task: Task, scale: Scale, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Test perplexity by share, score and schedule; what was measured, and the dense model's."""
    model = trained(task, scale, seed)
    found: dict[str, float] = {}
    dense = {
        "dense": perplexity(model, task),
        "dense, trained on": perplexity(trained_on(model, task, scale, seed), task),
    }
    for share in SHARES:
        for score in ("magnitude", "wanda", "sparsegpt"):
            arm, _ = pruned(model, task, scale, seed, Prune(score=score, amount=share))
            found[f"{score} {share:.0%}"] = perplexity(arm, task)
            if score == "magnitude":
                found[f"time, {share:.0%} of weights zero"] = slower(arm, model, task, scale)
        arm, report = trained_pruned(model, task, scale, seed, share)
        found[f"{share:.0%}, trained on"] = perplexity(arm, task)
        found[f"bytes with a bit mask, {share:.0%}"] = report.bitmask / report.dense
    gradual = Prune(amount=SHARES[-1], schedule="gradual", after="finetune", steps=FURTHER[scale])
    found[f"{SHARES[-1]:.0%}, gradually"] = perplexity(pruned(model, task, scale, seed, gradual)[0], task)
    neurons = Prune(amount=0.5, structure="neuron", after="finetune", steps=FURTHER[scale])
    arm, report = pruned(model, task, scale, seed, neurons)
    found["50% of neurons cut out, trained on"] = perplexity(arm, task)
    found["time, 50% of neurons cut out"] = slower(arm, model, task, scale)
    found["multiplications, 50% of neurons cut out"] = report.realised
    return found, dense


def generalisation(task: Task, scale: Scale, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """Test losses where data are few, of the pruned and of the dense model that are best on validation text."""
    model = trained(task, scale, seed)
    arms = {f"{share:.0%}": trained_pruned(model, task, scale, seed, share)[0] for share in SHARES}
    plain = {"as it was": model, "trained on": trained_on(model, task, scale, seed)}
    losses = {name: evaluate(arm, task).metrics["loss"] for name, arm in (arms | plain).items()}
    on_validation = {name: evaluate(arm, task, "validation").metrics["loss"] for name, arm in (arms | plain).items()}
    best, best_plain = (min(some, key=lambda name: on_validation[name]) for some in (arms, plain))
    found = {f"few data, {name}, loss": losses[name] for name in arms}
    found |= {"few data, share chosen": float(best.rstrip("%")) / 100, "few data, loss": losses[best]}
    dense = {f"few data, dense {name}, loss": losses[name] for name in plain}
    return found, dense | {"few data, dense, loss": losses[best_plain]}


def trained(task: Task, scale: Scale, seed: int) -> LlamaForCausalLM:
    seeded(seed)
    width = WIDTH[scale]
    config = LlamaConfig(
        vocab_size=task.model_config["vocab_size"],
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=LAYERS[scale],
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    fit(model, task, Settings(steps=STEPS[scale], batch_size=16, learning_rate=RATE, weight_decay=0.1, seed=seed))
    return model.eval()


def further(scale: Scale, seed: int) -> Settings:
    steps = FURTHER[scale]
    return Settings(steps=steps, batch_size=16, learning_rate=FURTHER_RATE, weight_decay=0.1, seed=seed + 100)


def trained_on(model: LlamaForCausalLM, task: Task, scale: Scale, seed: int) -> LlamaForCausalLM:
    arm = copy.deepcopy(model)
    fit(arm, task, further(scale, seed))
    return arm.eval()


def pruned(
    model: LlamaForCausalLM, task: Task, scale: Scale, seed: int, modifier: Prune
) -> tuple[PreTrainedModel, Report]:
    arm = copy.deepcopy(model)
    apply(arm, modifier, Data(task=task, kind="causal-lm", settings=further(scale, seed), seed=seed))
    assert modifier.report is not None
    return arm, modifier.report


def trained_pruned(
    model: LlamaForCausalLM, task: Task, scale: Scale, seed: int, share: float
) -> tuple[PreTrainedModel, Report]:
    return pruned(model, task, scale, seed, Prune(amount=share, after="finetune", steps=FURTHER[scale]))


def perplexity(model: PreTrainedModel, task: Task) -> float:
    return math.exp(evaluate(model, task).metrics["loss"])


@torch.no_grad()
def slower(model: PreTrainedModel, dense: PreTrainedModel, task: Task, scale: Scale) -> float:
    """The time of a pass as a share of the dense model's."""
    ids = task.collate([task.test[i] for i in range(16)])["input_ids"]
    ratios = []
    for _ in range({"smoke": 2, "full": 12}[scale]):
        spent = []
        for one in (model, dense):
            started = time.perf_counter()
            one(ids, use_cache=False)
            spent.append(time.perf_counter() - started)
        ratios.append(spent[0] / spent[1])
    return median(ratios[1:])


def small(outcomes: Sequence[Outcome]) -> Verdict:
    ratios = {
        share: [o.measured[f"{share}, trained on"] / o.baseline["dense, trained on"] for o in outcomes]
        for share in ("30%", "50%")
    }
    if max(ratios["50%"]) <= 1.05:
        return "holds"
    return "holds in direction" if fmean(ratios["30%"]) <= 1.05 else "does not hold here"


def better(outcomes: Sequence[Outcome]) -> Verdict:
    gains = [o.baseline["few data, dense, loss"] - o.measured["few data, loss"] for o in outcomes]
    if min(gains) > 0:
        return "holds"
    return "holds in direction" if fmean(gains) > 0 else "does not hold here"


_FEW = (
    *(f"few data, {share:.0%}, loss" for share in SHARES),
    *("few data, share chosen", "few data, loss", "few data, dense, loss"),
    *("few data, dense as it was, loss", "few data, dense trained on, loss"),
)
_CURVE = (
    *("dense", "dense, trained on"),
    *(f"{score} {share:.0%}" for share in SHARES for score in ("magnitude", "wanda", "sparsegpt")),
    *(f"{share:.0%}, trained on" for share in SHARES),
    *(f"{SHARES[-1]:.0%}, gradually", "50% of neurons cut out, trained on"),
    *(f"bytes with a bit mask, {share:.0%}" for share in SHARES),
    *(f"time, {share:.0%} of weights zero" for share in SHARES),
    *("time, 50% of neurons cut out", "multiplications, 50% of neurons cut out"),
)

CLAIMS = [
    Claim(
        statement="Half of a trained model's weights go at little loss when what is left is trained on.",
        paper={"abstract": "large reductions in size without considerable loss, with well-chosen hyper-parameters"},
        rule="holds: in every seed perplexity with 50 % pruned and trained on is at most 1.05 times the dense model's, "
        "trained on; holds in direction: the same of 30 %, on the mean.",
        verdict=small,
        shows=_CURVE,
    ),
    Claim(
        statement="Where data are few, a pruned model that is trained on generalises better than the dense one.",
        paper={"abstract": "with fine-tuning after pruning some models generalise better"},
        rule="holds: in every seed the pruned model chosen on validation text has a test loss below that of the chosen "
        "dense one; holds in direction: on the mean.",
        verdict=better,
        shows=_FEW,
    ),
]
