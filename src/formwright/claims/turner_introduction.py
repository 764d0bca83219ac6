"""Claims: a small Transformer as the introduction defines it predicts text far better than letter frequencies, and with
normalisation before the stages it trains where with normalisation after them it is worse.

Paper  No figure of its own: the note defines the block, which normalises before its stages, and auto-regressive use.
Here   A character model of Python's own manual, width 64: two layers for the first claim; six layers, learning rate
       3e-3 and no warm-up for the second. 500 steps of 16 windows of 64 bytes.
Fair   Pre- and post-norm share data, order, steps, learning rate and initialisation.
Rule   loss = nats a byte on the test text.
       holds                in every seed the loss is below that of guessing from the byte before (bigram)
       holds in direction   in every seed it is below that of guessing by frequency (unigram)
Rule 2 holds                in every seed pre-norm's loss is at least 0.1 nats lower
       holds in direction   pre-norm's mean loss is lower
"""

from collections.abc import Sequence
from statistics import fmean

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.errors import FormwrightError
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded

STEPS = {"smoke": 3, "full": 500}
TASK = {"smoke": "char-lm(length=64, test=0.01)", "full": "char-lm(length=64)"}
DEEP = {"smoke": 2, "full": 6}
MARGIN = 0.1  # nats
SEEDS = (0, 1, 2, 3)


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(TASK[scale])
    trivial = task.baselines()
    measured = {
        "two layers": loss("pre", 2, task, scale, seed),
        "pre-norm": loss("pre", DEEP[scale], task, scale, seed),
    }
    baseline = {name: trivial[name]["loss"] for name in ("unigram", "bigram")}
    baseline["post-norm"] = loss("post", DEEP[scale], task, scale, seed)
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def loss(block: str, layers: int, task: Task, scale: Scale, seed: int) -> float:
    """Nats a byte on the test text; a run that broke off counts as guessing."""
    seeded(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "position": "learned"}
    model = TransformerForCausalLM(TransformerConfig(**task.model_config, **sizes, block=block))
    settings = Settings(
        steps=STEPS[scale],
        batch_size=16,
        learning_rate=3e-3,
        warmup=0.0,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        seed=seed,
    )
    try:
        fit(model, task, settings)
    except FormwrightError:  # the loss is no number any more
        return task.baselines()["uniform"]["loss"]
    return evaluate(model, task, "test").metrics["loss"]


def predicts(outcomes: Sequence[Outcome]) -> Verdict:
    if all(o.measured["two layers"] < o.baseline["bigram"] for o in outcomes):
        return "holds"
    beaten = all(o.measured["two layers"] < o.baseline["unigram"] for o in outcomes)
    return "holds in direction" if beaten else "does not hold here"


def before(outcomes: Sequence[Outcome]) -> Verdict:
    gains = [o.baseline["post-norm"] - o.measured["pre-norm"] for o in outcomes]
    if min(gains) >= MARGIN:
        return "holds"
    return "holds in direction" if fmean(gains) > 0 else "does not hold here"


CLAIMS = [
    Claim(
        statement="A small Transformer as the introduction defines it predicts text far better than letter frequencies "
        "do.",
        paper={"where": "no figure; the note describes the auto-regressive use"},
        rule="loss = nats a byte on the test text; holds: in every seed below guessing from the byte before (bigram); "
        "holds in direction: in every seed below guessing by frequency (unigram).",
        verdict=predicts,
        shows=("two layers", "unigram", "bigram"),
    ),
    Claim(
        statement="Normalising before the stages, a deeper model trains without warm-up where normalising after them "
        "is worse.",
        paper={"where": "no figure; the block it defines normalises before its stages"},
        rule="loss = nats a byte on the test text; holds: in every seed pre-norm's is at least 0.1 lower; holds in "
        "direction: pre-norm's mean is lower.",
        verdict=before,
        shows=("pre-norm", "post-norm"),
    ),
]
