"""Claim: adapters that a router of their own chooses, beside frozen experts, learn more than LoRA of the same size.

Paper  OLMoE-1B-7B and Mixtral on commonsense and arithmetic: PERFT-R above LoRA on attention at equal activated
       parameters, by up to 17.2 % and 12.3 % on average.
Here   An OLMoE of 3 layers, 64 channels and 8 experts of which 2 are taken, trained on bytes of Wikipedia and frozen;
       then 150 steps on two far domains at once, Shakespeare's plays and sums of two numbers. Loss in nats a byte, the
       mean of the two domains.
Fair   At most 2,048 parameters a layer that a token meets (first claim) or that are trained (second): LoRA on the
       query and value projections r = 8, on the experts' matrices r = 3 (2 on their second matrix), S r = 16, E r = 8
       (2), R 2 of 4 of r = 7 (3) and its router; linear adapters of D are a single one of the sum of their ranks. The
       same pre-trained model, batches and steps; alpha = 2 r and no dropout, which PEFT's LoRA on fused experts does
       not have; each arm has the best of three rates by validation.
Rule   holds                in every seed R's loss is below both LoRAs'
       holds in direction   its mean is below that of LoRA on attention, the paper's baseline
"""

import copy
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from formwright.claims import Claim, Outcome, Scale, Verdict
from formwright.errors import require
from formwright.tasks.base import Task
from formwright.tasks.support.files import folder, read_bytes
from formwright.tasks.support.language import Windows, language_task
from formwright.training import Settings, evaluate, fit, seeded

SEEDS = (0, 1, 2)

WIDTH, LENGTH = 64, 64
PRETRAINED, TUNED = {"smoke": 2, "full": 1200}, {"smoke": 1, "full": 150}
RATES = {"smoke": (4e-3,), "full": (1e-3, 4e-3, 1.6e-2)}
ON_ATTENTION, ON_EXPERTS, ROUTED = "LoRA, attention", "LoRA, experts", "PERFT-R"
ACTIVATED, TRAINED = "activated", "trained"  # what is equal


def lora(**options: Any) -> Any:
    return require("peft", extra="peft").LoraConfig(lora_alpha=2 * options["r"], **options)


def perft(**options: Any) -> Any:
    return require("formwright.tuners", extra="peft").PERFTConfig(dropout=0.0, **options)


SECOND = ["mlp.experts.down_proj"]
BOTH = ["mlp.experts.gate_up_proj", *SECOND]
ARMS: dict[tuple[str, str], Callable[[], Any]] = {
    (ON_ATTENTION, ACTIVATED): partial(lora, r=8, target_modules=["q_proj", "v_proj"]),
    (ON_EXPERTS, ACTIVATED): partial(lora, r=3, target_modules=[], target_parameters=BOTH),
    ("PERFT-S", ACTIVATED): partial(perft, variant="single", r=16),
    ("PERFT-E", ACTIVATED): partial(perft, variant="embedded", r=8),
    (ROUTED, ACTIVATED): partial(perft, variant="routed", r=7, adapters=4, top_k=2),
    (ON_EXPERTS, TRAINED): partial(lora, r=2, target_modules=[], target_parameters=SECOND),
    ("PERFT-E", TRAINED): partial(perft, variant="embedded", r=2),
    (ROUTED, TRAINED): partial(perft, variant="routed", r=3, adapters=4, top_k=2),
}
SAME = (ON_ATTENTION, "PERFT-S")  # all that is trained is met by every token: arms of both claims


def column(arm: str, equal: str) -> str:
    return f"{arm}, equal {ACTIVATED if arm in SAME else equal}"


def texts(scale: Scale) -> tuple[Task, Task, Task]:
    """Wikipedia to pre-train on, and the two domains, each with validation and test rows of its own."""
    given = os.environ.get("FORMWRIGHT_DATA")
    here = folder(Path(given) if given else None, "text", "of this claim")
    few = slice(5_000 if scale == "smoke" else None)
    plays = read_bytes(here / "tinyshakespeare.txt")[:440_000][few]
    dice = random.Random(0)
    pairs = [(dice.randrange(100), dice.randrange(100)) for _ in range(len(plays) // 9)]
    sums = "".join(f"{a}+{b}={a + b}\n" for a, b in pairs).encode()
    wikipedia = read_bytes(here / "wikitext2_valid.txt")[few]
    return reading("wikipedia", wikipedia), reading("plays", plays), reading("sums", sums)


def reading(name: str, text: bytes) -> Task:
    """The last tenth is to test on, and a tenth before it to choose rates by."""
    symbols = torch.frombuffer(bytearray(text), dtype=torch.uint8).int()
    cut = len(symbols) * 9 // 10
    return language_task(
        name=name,
        train=symbols[:cut],
        test=symbols[cut:],
        vocab_size=256,
        length=LENGTH,
        validation=0.1,
        bytes_a_symbol=1.0,
        context=False,
        settings=Settings(),
    )


def together(first: Task, second: Task) -> Task:
    """Windows of both in random order."""
    a, b = first.train, second.train
    starts = torch.cat([a.starts, b.starts + len(a.symbols)])
    return replace(first, train=Windows(torch.cat([a.symbols, b.symbols]), LENGTH, starts))


def mixture_of_experts(task: Task, scale: Scale, seed: int) -> nn.Module:
    """The pre-trained model. Its router is balanced while it is trained."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    seeded(seed)
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        output_router_logits=True,
        use_cache=False,
        pad_token_id=None,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config)
    fit(model, task, Settings(steps=PRETRAINED[scale], batch_size=16, learning_rate=4e-3, weight_decay=0.1, seed=seed))
    model.config.output_router_logits = False
    return model


def run(scale: Scale, seed: int) -> Outcome:
    peft = require("peft", extra="peft")
    wikipedia, *domains = texts(scale)
    pretrained = mixture_of_experts(wikipedia, scale, seed)
    found = {"untuned": read(pretrained, domains, "test")}
    for (arm, equal), config in ARMS.items():
        tried = []
        for rate in RATES[scale]:
            seeded(seed)
            model = peft.get_peft_model(copy.deepcopy(pretrained), config())
            settings = Settings(steps=TUNED[scale], batch_size=16, learning_rate=rate, weight_decay=0.0, seed=seed)
            fit(model, together(*domains), settings)
            tried.append((read(model, domains, "validation"), read(model, domains, "test")))
        found[column(arm, equal)] = min(tried)[1]
    ours = {name: loss for name, loss in found.items() if name.startswith("PERFT")}
    return Outcome(
        scale=scale, seed=seed, measured=ours, baseline={name: found[name] for name in found if name not in ours}
    )


def read(model: nn.Module, domains: Sequence[Task], split: Any) -> float:
    return fmean(evaluate(model, task, split).metrics["loss"] for task in domains)


def verdict(outcomes: Sequence[Outcome], equal: str) -> Verdict:
    def of(outcome: Outcome, arm: str) -> float:
        return {**outcome.measured, **outcome.baseline}[column(arm, equal)]

    if all(of(o, ROUTED) < min(of(o, ON_ATTENTION), of(o, ON_EXPERTS)) for o in outcomes):
        return "holds"
    ours, theirs = (fmean(of(o, arm) for o in outcomes) for arm in (ROUTED, ON_ATTENTION))
    return "holds in direction" if ours < theirs else "does not hold here"


def claim(equal: str) -> Claim:
    return Claim(
        statement=(
            "Adapters chosen by a router of their own beside frozen experts learn more than LoRA at equal "
            f"{equal} parameters."
        ),
        paper={"average gain over LoRA at equal activated parameters, up to": "17.2 % (commonsense), 12.3 % (maths)"},
        rule=(
            "loss = nats a byte, the mean of two domains; holds: in every seed R's is below both LoRAs'; holds in "
            "direction: its mean is below that of LoRA on attention."
        ),
        verdict=partial(verdict, equal=equal),
        shows=("untuned", *dict.fromkeys(column(arm, equal) for arm in (*SAME, ON_EXPERTS, "PERFT-E", ROUTED))),
    )


CLAIMS = [claim(ACTIVATED), claim(TRAINED)]
