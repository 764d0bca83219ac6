"""Claim: letting a head do nothing removes activation outliers, so that INT8 quantization hardly costs anything.

Paper  Table 2, BERT-base, perplexity in float and with 8-bit weights and activations: vanilla 4.49 to 1294 (standard
       deviation 1046), clipped softmax 4.39 to 4.52, gated attention 4.45 to 4.65 (kurtosis 3076, 80, 201).
Here   A two-layer causal model of a Markov chain in which a few trigger tokens make the token before them come back:
       heads have work after a trigger and nothing to do elsewhere. 500 steps of 32 rows of 64 tokens. Quantization is
       simulated: weights symmetric, activations (what every matrix reads and gives) asymmetric, one range a tensor,
       running minimum and maximum over 16 calibration batches with momentum 0.9; the head stays in float.
Fair   The three differ in the attention alone: same initial scheme, steps, batches, learning rate.
Rule   rise = nats a token gained by quantization; kurtosis of the attention layers' outputs, mean over tokens and
       layers.
       holds                for both methods, in every seed: loss at most 0.02 above vanilla's, kurtosis below, and the
                            rise at 8 bits below vanilla's
       holds in direction   for both methods: mean loss at most 0.02 above vanilla's, and mean kurtosis or infinity norm
                            below and mean rise at 6 bits below vanilla's
"""

import copy
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from formwright.claims import Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerForCausalLM
from formwright.parts.attention.outlier_free_attention import infinity_norm, kurtosis
from formwright.tasks.base import ACCURACY, LOSS, Columns, Defaults, Task, accuracy_and_loss, score_next
from formwright.training import Settings, evaluate, fit, seeded

STATEMENT = (
    "Letting a head do nothing, by clipped softmax or a gate, removes activation outliers, so that INT8 quantization "
    "hardly costs anything."
)
PAPER = {
    "BERT perplexity, float and W8A8 (table 2)": {
        "vanilla": [4.49, 1294],
        "clipped softmax": [4.39, 4.52],
        "gated attention": [4.45, 4.65],
    }
}
RULE = (
    "rise = nats a token gained by quantization; holds: for both methods, in every seed, loss at most 0.02 above "
    "vanilla's, kurtosis below, and the rise at 8 bits below vanilla's; holds in direction: for both methods mean loss "
    "at most 0.02 above vanilla's, mean kurtosis or infinity norm below, and mean rise at 6 bits below vanilla's."
)
SEEDS = (0, 1, 2)

VANILLA, OURS = "vanilla", ("clipped softmax", "gated attention")
MIXERS = {"vanilla": "softmax", "clipped softmax": "clipped-softmax", "gated attention": "gated-attention"}
VOCABULARY, TRIGGERS, LENGTH = 34, 3, 64  # token 0 starts a row, 1 to 3 are triggers
STEPS, ROWS = {"smoke": 3, "full": 500}, {"smoke": 64, "full": 8000}
CALIBRATION, MOMENTUM = 16, 0.9
ALLOWED = 0.02


def run(scale: Scale, seed: int) -> Outcome:
    found = {name: {} for name in MIXERS}
    for name, mixer in MIXERS.items():
        found[name] = {f"{name}, {what}": value for what, value in trained(mixer, scale, seed).items()}
    ours = {what: value for name in OURS for what, value in found[name].items()}
    return Outcome(scale=scale, seed=seed, measured=ours, baseline=found[VANILLA])


def chain(rows: int, seed: int) -> Tensor:
    """Rows of the Markov chain; after a trigger the token before it comes back."""
    generator = torch.Generator().manual_seed(0)  # one chain for all seeds
    odds = (2 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)).softmax(-1)
    odds[:, 0] = 0
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(rows, LENGTH, dtype=torch.long)
    for t in range(1, LENGTH):
        drawn = torch.multinomial(odds[tokens[:, t - 1]], 1, generator=generator)[:, 0]
        triggered = (tokens[:, t - 1] >= 1) & (tokens[:, t - 1] <= TRIGGERS) & (t > 2)
        tokens[:, t] = torch.where(triggered, tokens[:, max(0, t - 2)], drawn)
    return tokens


def task(scale: Scale) -> Task:
    rows = {name: chain(count, seed) for name, count, seed in (("train", ROWS[scale], 1), ("test", 512, 2))}
    return Task(
        name="triggered-chain",
        head="causal-lm",
        model_config={"architecture": "decoder", "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH},
        train=Columns(input_ids=rows["train"], labels=rows["train"]),
        test=Columns(input_ids=rows["test"], labels=rows["test"]),
        metrics=(ACCURACY, LOSS),
        baselines=dict,
        score=score_next,
        summary=accuracy_and_loss,
        defaults=Defaults(settings=Settings(), model={}),
    )


def trained(mixer: str, scale: Scale, seed: int) -> dict[str, float]:
    """Loss, measures of outliers, and what quantization costs."""
    data = task(scale)
    seeded(seed)
    model = TransformerForCausalLM(
        TransformerConfig(
            **data.model_config,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            mixer=mixer,
            position="learned",
        )
    )
    fit(model, data, Settings(steps=STEPS[scale], batch_size=32, learning_rate=4e-3, schedule="linear", seed=seed))
    loss = evaluate(model, data, "test").metrics["loss"]
    rises = {
        f"rise at {bits} bits": evaluate(quantized(model, data, bits), data, "test").metrics["loss"] - loss
        for bits in (8, 6)
    }
    return {"loss": loss, **outliers(model, data), **rises}


@torch.no_grad()
def outliers(model: nn.Module, data: Task) -> dict[str, float]:
    """Of the attention layers' outputs: the largest absolute value (maximum over layers) and the kurtosis (mean)."""
    seen: list[Tensor] = []
    mixers = [layer.block.mixer for layer in model.model.decoder.layers]
    hooks = [mixer.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for mixer in mixers]
    model.eval()(input_ids=data.test.columns["input_ids"])
    for hook in hooks:
        hook.remove()
    return {
        "infinity norm": max(float(infinity_norm(output)) for output in seen),
        "kurtosis": fmean(float(kurtosis(output)) for output in seen),
    }


@torch.no_grad()
def quantized(model: nn.Module, data: Task, bits: int) -> nn.Module:
    """A copy whose matrices and what they read and give are rounded to so many bits (simulated: no speed-up)."""
    model = copy.deepcopy(model).eval()
    ranges = [
        observer
        for module in model.model.modules()
        if isinstance(module, nn.Linear)
        for observer in (Range(module, bits, reads=True), Range(module, bits, reads=False))
    ]
    rows = data.train.columns["input_ids"]
    for batch in rows[: CALIBRATION * 32].split(max(1, min(32, len(rows) // CALIBRATION)))[:CALIBRATION]:
        model(input_ids=batch)
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            step = module.weight.abs().amax() / (2 ** (bits - 1) - 1)
            module.weight.copy_((module.weight / step).round() * step)
    for observer in ranges:
        observer.watching = False
    return model


class Range:
    """Watches the range of what a layer reads or gives, then rounds it to the range's steps."""

    def __init__(self, module: nn.Module, bits: int, *, reads: bool) -> None:
        self.bits, self.watching = bits, True
        self.low = self.high = None
        if reads:
            module.register_forward_pre_hook(lambda _module, inputs: (self(inputs[0]), *inputs[1:]))
        else:
            module.register_forward_hook(lambda _module, _inputs, output: self(output))

    def __call__(self, x: Tensor) -> Tensor:
        if self.watching:
            low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
            self.low = low if self.low is None else MOMENTUM * self.low + (1 - MOMENTUM) * low
            self.high = high if self.high is None else MOMENTUM * self.high + (1 - MOMENTUM) * high
            return x
        most = 2**self.bits - 1
        step = (self.high - self.low) / most
        zero = (-self.low / step).round()
        return (((x / step).round() + zero).clamp(0, most) - zero) * step


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    def both(outcome: Outcome) -> bool:
        vanilla = {what: outcome.baseline[f"{VANILLA}, {what}"] for what in ("loss", "kurtosis", "rise at 8 bits")}
        return all(
            outcome.measured[f"{name}, loss"] <= vanilla["loss"] + ALLOWED
            and outcome.measured[f"{name}, kurtosis"] < vanilla["kurtosis"]
            and outcome.measured[f"{name}, rise at 8 bits"] < vanilla["rise at 8 bits"]
            for name in OURS
        )

    if all(both(outcome) for outcome in outcomes):
        return "holds"

    def away(name: str, what: str) -> float:
        return fmean(o.measured[f"{name}, {what}"] - o.baseline[f"{VANILLA}, {what}"] for o in outcomes)

    in_direction = all(
        away(name, "loss") <= ALLOWED
        and min(away(name, "kurtosis"), away(name, "infinity norm")) < 0
        and away(name, "rise at 6 bits") < 0
        for name in OURS
    )
    return "holds in direction" if in_direction else "does not hold here"
