"""Claims: a fixed bias lets a model read texts longer than those of training if the series of its exponentials
converges, and not if it diverges; and how far the series reaches tells how far the trained model reads.

Paper  WikiText-103, Books, Github and WikiBook, trained at 512 tokens, read at several thousand: perplexity stays flat
       with every convergent bias and explodes with 1 / n, 1 / (n ln n) and sinusoidal positions; the theoretical and
       the measured receptive field have the same trend. No figures are at hand.
Here   A two-layer character model of Python's own manual with four heads, trained at 64 bytes, read at 64 and at 512.
       Three biases that converge (ALiBi's exponential, type-1, type-2), two that diverge (inverse, inverse-log), and no
       position and sinusoidal ones for comparison. For the receptive fields five biases that converge, with slopes of
       2^-0.5 to 2^-2 in place of 2^-2 to 2^-8: so small a model reads about ten characters back, and only a bias that
       reaches no farther can be seen to matter. Fields are of windows of 512 bytes, epsilon 0.01: by theory the mean
       over the heads of what holds all but epsilon within 512 tokens, by measurement the smallest window within epsilon
       of the full perplexity.
Fair   The models differ in the position alone: same steps, batches and initial weights; each is read at the learning
       rate of three that is best for it on validation text at the training length. Receptive fields are of one rate.
Rule   rise = nats a byte read at 512 - read at 64.
       holds                in every seed every convergent bias rises by at most 0.01 and every divergent one by more
       holds in direction   the largest mean rise of a convergent bias is below the smallest of a divergent one
Rule 2 rho = Spearman's correlation of the two fields over the five biases.
       holds                rho above 0.7 in every seed
       holds in direction   mean rho above 0
"""

from collections.abc import Sequence
from statistics import fmean

import torch

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.theory.receptive_field import empirical_receptive_field, extrapolates, reach
from formwright.training import Settings, evaluate, fit, seeded

CONVERGENT = ("exponential", "type-1", "type-2")
DIVERGENT = ("inverse", "inverse-log")
REACHING = ("power-4", "power-2", "exponential", "type-2", "type-1")
OTHERS = {"none": "none", "sinusoidal": "sinusoidal(amplitude=0.03)"}
TRAINED, READ, EPSILON = 64, 512, 0.01
RATES = {"smoke": (4e-3,), "full": (4e-3, 8e-3, 1.6e-2)}
RATE = 8e-3  # of the receptive fields
STEPS = {"smoke": 3, "full": 500}
WINDOWS = {"smoke": 2, "full": 16}  # texts from which the receptive field is measured
TEXT = {
    "smoke": "char-lm(length={length}, test=0.01, validation=0.01)",
    "full": "char-lm(length={length}, validation=0.05)",
}
SEEDS = (3, 4, 5)  # others than those looked at while the claim was written


def run(scale: Scale, seed: int) -> Outcome:
    ours: dict[str, float] = {}
    for kernel in (*CONVERGENT, *DIVERGENT):
        model, found = trained(kernel, f"decay(kernel={kernel})", RATES[scale], scale, seed)
        assert extrapolates(model.model.decoder.position) == (kernel in CONVERGENT)
        ours |= found
    fields: list[tuple[float, int]] = []
    for kernel in REACHING:
        model, _ = trained(kernel, f"decay(kernel={kernel}, max_bias=2.0)", (RATE,), scale, seed)
        heads = reach(model.model.decoder.position, heads=4, epsilon=EPSILON, length=READ)
        fields.append(
            (fmean(head.within for head in heads), empirical_receptive_field(model, texts(scale), epsilon=EPSILON))
        )
        ours |= {f"{kernel}, field by theory": fields[-1][0], f"{kernel}, field measured": fields[-1][1]}
    theirs: dict[str, float] = {}
    for name, position in OTHERS.items():
        theirs |= trained(name, position, RATES[scale], scale, seed)[1]
    return Outcome(scale=scale, seed=seed, measured=ours | {"rho": spearman(fields)}, baseline=theirs)


def texts(scale: Scale) -> torch.Tensor:
    """The first windows of the test text."""
    task = tasks.load(TEXT[scale].format(length=READ))
    return task.collate([task.test[i] for i in range(WINDOWS[scale])])["input_ids"]


def trained(
    name: str, position: str, rates: Sequence[float], scale: Scale, seed: int
) -> tuple[TransformerForCausalLM, dict[str, float]]:
    """The model at the rate that is best for its position, its rise and that rate."""
    short, long = (tasks.load(TEXT[scale].format(length=length)) for length in (TRAINED, READ))
    runs = []
    for rate in rates:
        seeded(seed)
        config = TransformerConfig(
            **long.model_config, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, position=position
        )
        model = TransformerForCausalLM(config)
        settings = Settings(
            steps=STEPS[scale], batch_size=32, learning_rate=rate, weight_decay=0.1, betas=(0.9, 0.95), seed=seed
        )
        fit(model, short, settings)
        runs.append((evaluate(model, short, "validation").metrics["loss"], rate, model))
    _, rate, model = min(runs, key=lambda found: found[:2])
    near, far = (evaluate(model, task, "test", batch_size=64).metrics["loss"] for task in (short, long))
    return model, {f"{name}, loss at 64": near, f"{name}, rise": far - near, f"{name}, learning rate": rate}


def spearman(pairs: Sequence[tuple[float | int, float | int]]) -> float:
    """The correlation of ranks; ties share the mean of theirs. 0 when one side is all alike."""
    columns = torch.tensor(pairs, dtype=torch.float64).T
    first, second = columns[:, :, None], columns[:, None]
    ranks = (first > second).sum(-1) + (first == second).sum(-1) / 2
    away = ranks - ranks.mean(1, keepdim=True)
    spread = away.norm(dim=1).prod()
    return float((away[0] * away[1]).sum() / spread) if spread > 0 else 0.0


def longer(outcomes: Sequence[Outcome]) -> Verdict:
    def rises(names: Sequence[str]) -> list[list[float]]:
        return [[outcome.measured[f"{name}, rise"] for outcome in outcomes] for name in names]

    flat, steep = rises(CONVERGENT), rises(DIVERGENT)
    if max(map(max, flat)) <= 0.01 < min(map(min, steep)):
        return "holds"
    return "holds in direction" if max(map(fmean, flat)) < min(map(fmean, steep)) else "does not hold here"


def told(outcomes: Sequence[Outcome]) -> Verdict:
    rho = [outcome.measured["rho"] for outcome in outcomes]
    if min(rho) > 0.7:
        return "holds"
    return "holds in direction" if fmean(rho) > 0 else "does not hold here"


CLAIMS = [
    Claim(
        statement="A fixed bias lets a model read texts longer than those of training if the series of its "
        "exponentials converges, and not if it diverges.",
        paper={
            "figures": "perplexity stays flat to several thousand tokens with convergent biases, explodes with others"
        },
        rule="rise = nats a byte read at 512 - read at 64; holds: in every seed every convergent bias rises by at most "
        "0.01 and every divergent one by more; holds in direction: the largest mean rise of a convergent bias is below "
        "the smallest of a divergent one.",
        verdict=longer,
        shows=tuple(
            f"{name}, {what}"
            for name in (*CONVERGENT, *DIVERGENT, *OTHERS)
            for what in ("loss at 64", "rise", "learning rate")
        ),
    ),
    Claim(
        statement="How far the series of a bias reaches tells how far the trained model reads.",
        paper={"figures": "the theoretical and the empirical receptive field have the same trend"},
        rule="rho = Spearman's correlation of both fields over five biases; holds: above 0.7 in every seed; holds in "
        "direction: its mean above 0.",
        verdict=told,
        shows=(
            "rho",
            *(f"{name}, field {how}" for name in REACHING for how in ("by theory", "measured")),
        ),
    ),
]
