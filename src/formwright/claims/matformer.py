"""Claims: each size of one nested training is close to a model of that size trained by itself; the mixtures of sizes
lie on the line between; and the smallest, as drafter, agrees with the largest more often than one trained alone.

Paper  2.6B language model whose sub-models, from 1.5B, are each close to an independently trained twin; Mix'n'Match
       models on or above the line; drafting faster than with an independent drafter by several per cent.
Here   A byte model of Python's own manual, four layers of width 64, feed-forward layers of 32, 64, 128 and 256 units.
       The two ways of training; all 4^4 mixtures; greedy continuations of 32 bytes of the test text.
Fair   Nested model and twins see the same number of tokens each, in the same order: a sampled step trains one size and
       costs what that does, so that every size is trained in a quarter of its twin's steps; a joint step trains all
       four. Each run has the best of the same three learning rates by a validation part (the nested, by the mean over
       its sizes; the joint run, shown and not judged, takes the sampled run's). Sliced = the largest twin, cut
       without any training for it.
Rule   gap = nats a byte of the sampled model's size less those of its twin, on the test part.
       holds: at most 0.05 for every size and seed;
       holds in direction: at most 0.05 in the mean over sizes and seeds.
Rule 2 excess = loss of a mixture less that of the line between the trained sizes next to it in parameters.
       holds: in every seed the median excess is at most 0.01 and that of nineteen in twenty at most 0.05;
       holds in direction: in every seed the median excess is at most 0.05.
Rule 3 agreement = share of the test bytes for which the smallest and the largest find the same byte likeliest.
       holds: drafting gives the largest's own text, and the nested pair agrees more often than the twins in every seed;
       holds in direction: the text is its own, and the pair agrees more often in the mean.
"""

import itertools
from collections.abc import Sequence
from statistics import fmean, median, quantiles

import torch
from torch import Tensor

from formwright import tasks
from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.models.matformer import choose, drafter, extract, mixes, size
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.tasks.base import Task
from formwright.training import Settings, evaluate, fit, seeded
from formwright.training.evaluation import fetch

SEEDS = (0, 1, 2)

SIZES = (1, 2, 3, 4)
WIDTHS = (32, 64, 128, 256)
LAYERS = {"smoke": 2, "full": 4}
TEXT = {"smoke": "char-lm(length=32, test=0.01, validation=0.01)", "full": "char-lm(validation=0.05)"}
RATES = {"smoke": (8e-3,), "full": (4e-3, 8e-3, 16e-3)}
STEPS = {"smoke": 4, "full": 300}
MIXED_ON = {"smoke": 2, "full": 24}  # windows of the test text that all mixtures are read on
PROMPTS = {"smoke": 1, "full": 8}


def run(scale: Scale, seed: int) -> Outcome:
    task = tasks.load(TEXT[scale])
    losses: dict[str, dict[int, float]] = {}
    models: dict[str, TransformerForCausalLM] = {}
    rates: tuple[float, ...] = RATES[scale]
    for variant in ("sample", "joint"):
        models[variant], chosen = trained(task, scale, seed, "matformer", f"matformer(variant={variant})", rates=rates)
        losses[variant], rates = by_size(models[variant], task, "test"), (chosen,)
    twins = {i: trained(task, scale, seed, "gelu", "none", width)[0] for i, width in zip(SIZES, WIDTHS, strict=True)}
    twin_loss = {i: evaluate(twin, task, "test").metrics["loss"] for i, twin in twins.items()}
    sliced = by_size(nested_like(twins[SIZES[-1]], task, scale, seed), task, "test")
    ours, windows = models["sample"], fetch(task.test, list(range(MIXED_ON[scale])), task.collate)
    excess = mixtures(ours, windows, LAYERS[scale])
    greedy = PROMPTS[scale]
    same, calls = drafting(ours, drafter(ours, 1), windows, greedy)
    _, calls_alone = drafting(twins[4], twins[1], windows, greedy)
    choose(ours, 4)
    measured = {
        **{f"loss, {variant}, size {i}": loss for variant in losses for i, loss in losses[variant].items()},
        **{f"gap, {variant}, size {i}": losses[variant][i] - twin_loss[i] for variant in losses for i in SIZES},
        "mixtures": float(len(excess)),
        "median excess": median(excess.values()),
        "excess of 19 in 20": quantiles(excess.values(), n=20)[-1],
        "largest excess, never decreasing": max(excess[mix] for mix in mixes(LAYERS[scale], len(SIZES))),
        "agreement": agreement(drafter(ours, 1), ours, windows),
        "text is the largest's own": same,
        "bytes a check": calls,
    }
    baseline = {
        **{f"loss, twin, size {i}": loss for i, loss in twin_loss.items()},
        **{f"loss, sliced, size {i}": loss for i, loss in sliced.items()},
        "agreement, twins": agreement(twins[1], twins[4], windows),
        "bytes a check, twins": calls_alone,
    }
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def built(task: Task, scale: Scale, feedforward: str, width: int, seed: int) -> TransformerForCausalLM:
    seeded(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": LAYERS[scale], "num_attention_heads": 2, "position": "rope"}
    parts = {"feedforward": feedforward, "intermediate_size": width, "init": "fan-in"}
    return TransformerForCausalLM(TransformerConfig(**task.model_config, **sizes, **parts))


def trained(
    task: Task,
    scale: Scale,
    seed: int,
    feedforward: str,
    methods: str,
    width: int = WIDTHS[-1],
    rates: tuple[float, ...] | None = None,
) -> tuple[TransformerForCausalLM, float]:
    """The model at the rate that is best on the validation part, and that rate."""
    tried = []
    for rate in rates or RATES[scale]:
        model = built(task, scale, feedforward, width, seed)
        settings = Settings(
            steps=STEPS[scale],
            batch_size=8,
            learning_rate=rate,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            seed=seed,
            methods=methods,
        )
        fit(model, task, settings)
        loss = evaluate(model, task, "validation").metrics["loss"]
        if feedforward == "matformer":
            loss = fmean(by_size(model, task, "validation").values())
        tried.append((loss, rate, model))
    _, rate, model = min(tried, key=lambda one: one[:2])
    return model, rate


def by_size(model: TransformerForCausalLM, task: Task, split: str) -> dict[int, float]:
    """The loss of each size by itself, as a model that was extracted."""
    return {i: evaluate(extract(model, i), task, split).metrics["loss"] for i in SIZES}


def nested_like(twin: TransformerForCausalLM, task: Task, scale: Scale, seed: int) -> TransformerForCausalLM:
    """A nested model of the weights of one that was not trained to be nested."""
    model = built(task, scale, "matformer", WIDTHS[-1], seed)
    names = {name.replace("feedforward.layer.", "feedforward."): name for name in model.state_dict()}
    model.load_state_dict({names[name]: value for name, value in twin.state_dict().items()})
    return model


@torch.no_grad()
def mixtures(model: TransformerForCausalLM, windows: dict[str, Tensor], layers: int) -> dict[tuple[int, ...], float]:
    """How far above the line between trained sizes each choice of a size a layer lies."""
    found = {}
    for mix in itertools.product(SIZES, repeat=layers):
        choose(model, mix)
        found[mix] = (size(model, mix), model(**windows).loss.item())
    line = [found[(i,) * layers] for i in SIZES]
    choose(model, SIZES[-1])
    return {mix: loss - between(line, parameters) for mix, (parameters, loss) in found.items()}


def between(line: Sequence[tuple[int, float]], x: int) -> float:
    """Linear interpolation among points in the order of x."""
    (x0, y0), (x1, y1) = next(pair for pair in itertools.pairwise(line) if x <= pair[1][0])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@torch.no_grad()
def agreement(draft: TransformerForCausalLM, model: TransformerForCausalLM, windows: dict[str, Tensor]) -> float:
    ids = windows["input_ids"]
    return (draft(ids).logits.argmax(-1) == model(ids).logits.argmax(-1)).float().mean().item()


@torch.no_grad()
def drafting(
    model: TransformerForCausalLM, draft: TransformerForCausalLM, windows: dict[str, Tensor], prompts: int
) -> tuple[float, float]:
    """Whether the drafted texts are the model's own (1 = all), and how many bytes a call of the model writes."""
    same, calls = True, 0
    asked = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for prompt in windows["input_ids"][:prompts, None, :64]:
        own = model.generate(prompt, **asked)
        watch = model.register_forward_hook(count)
        drafted = model.generate(prompt, assistant_model=draft, **asked)
        watch.remove()
        same = same and torch.equal(drafted, own)
    return float(same), 32 * prompts / calls


def gap_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    gaps = [outcome.measured[f"gap, sample, size {i}"] for outcome in outcomes for i in SIZES]
    if max(gaps) <= 0.05:
        return "holds"
    return "holds in direction" if fmean(gaps) <= 0.05 else "does not hold here"


def line_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    medians = [outcome.measured["median excess"] for outcome in outcomes]
    most = [outcome.measured["excess of 19 in 20"] for outcome in outcomes]
    if max(medians) <= 0.01 and max(most) <= 0.05:
        return "holds"
    return "holds in direction" if max(medians) <= 0.05 else "does not hold here"


def drafting_verdict(outcomes: Sequence[Outcome]) -> Verdict:
    ours = [outcome.measured["agreement"] for outcome in outcomes]
    theirs = [outcome.baseline["agreement, twins"] for outcome in outcomes]
    if not all(outcome.measured["text is the largest's own"] == 1 for outcome in outcomes):
        return "does not hold here"
    if all(a > b for a, b in zip(ours, theirs, strict=True)):
        return "holds"
    return "holds in direction" if fmean(ours) > fmean(theirs) else "does not hold here"


CLAIMS = [
    Claim(
        statement="Each size of one nested training is close to a model of that size trained by itself.",
        paper={"2.6B language model": "sub-models from 1.5B close to their independently trained twins"},
        rule="gap = nats a byte of the sampled model's size less those of its twin; holds: at most 0.05 for every size "
        "and seed; holds in direction: at most 0.05 in the mean over sizes and seeds.",
        verdict=gap_verdict,
        shows=tuple(
            f"{what}, size {i}"
            for what in ("loss, sample", "gap, sample", "loss, joint", "gap, joint", "loss, twin", "loss, sliced")
            for i in SIZES
        ),
    ),
    Claim(
        statement="Models that mix sizes over their layers lie on the line between the trained ones, without training.",
        paper={"Mix'n'Match": "hundreds of models on or above the line that joins the trained ones"},
        rule="excess = loss of a mixture less that of the line between the trained sizes next to it; holds: in every "
        "seed the median excess is at most 0.01 and that of nineteen in twenty at most 0.05; holds in direction: in "
        "every seed the median excess is at most 0.05.",
        verdict=line_verdict,
        shows=("mixtures", "median excess", "excess of 19 in 20", "largest excess, never decreasing"),
    ),
    Claim(
        statement="The smallest size drafts for the largest, whose text stays its own, and agrees with it more often "
        "than one trained alone.",
        paper={"speculative decoding": "several per cent faster than with an independent drafter"},
        rule="agreement = share of the test bytes for which the smallest and the largest find the same byte likeliest; "
        "holds: drafting gives the largest's own text, and the nested pair agrees more often than the twins in every "
        "seed; holds in direction: the text is its own, and the pair agrees more often in the mean.",
        verdict=drafting_verdict,
        shows=(
            *("agreement", "agreement, twins", "text is the largest's own"),
            *("bytes a check", "bytes a check, twins"),
        ),
    ),
]
