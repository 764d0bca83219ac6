"""A run folder made by hand, for what reads one."""

import numpy as np

from formwright.bench import records
from formwright.bench.records import Record, Records

MIXERS, POSITIONS = ("softmax", "aft", "mamba"), ("learned", "rope")


def make(folder, *, task="digits", seeds=(0, 1), hostile=""):
    """Three mixers x two positions; mamba with rope does not combine, and one trial of aft broke."""
    rng = np.random.default_rng(0)
    plan = []
    with Records(folder, write=True) as log:
        for i, mixer in enumerate(MIXERS):
            for j, position in enumerate(POSITIONS):
                candidate = {"mixer": mixer + hostile, "position": position}
                plan.append({"candidate": candidate, "notes": ["reads left to right"] if mixer == "mamba" else []})
                for seed in seeds:
                    log.append(_record(rng, task, candidate, seed, cost=1 + i + 0.1 * j, quality=0.9 - 0.1 * j))
                    if mixer == "mamba" and position == "rope":
                        break
    records.write_run(
        folder,
        {
            "task": task,
            "settings": {"match": "params"},
            "training": {"steps": 100, "learning_rate": 2e-3},
            "metric": {"name": "accuracy", "higher_is_better": True, "percent": True},
            "trivial": {f"majority{hostile}": 0.1},
            "seeds": list(seeds),
            "baseline": {"mixer": "softmax" + hostile, "position": "learned"},
            "candidates": plan,
            "created": "2026-11-24",
            "command": f"formwright compare --task '{task}'",
        },
    )
    return folder


def _record(rng, task, candidate, seed, *, cost, quality):
    name = records.key(task, candidate, seed, {})
    common = {"key": name, "task": task, "candidate": candidate, "config": {"hidden_size": 64}, "seed": seed}
    if candidate["mixer"].startswith("mamba") and candidate["position"] == "rope":
        return Record(**common, status="unsupported", error="It computes no <scores>.")
    if candidate["mixer"].startswith("aft") and candidate["position"] == "rope" and seed == 1:
        return Record(**common, status="failed", error="The loss is nan in step 3.")
    hits = rng.random(300) < quality
    return Record(
        **common,
        status="done",
        metrics={"accuracy": float(hits.mean()), "loss": 1 - quality},
        params=100_000,
        flops=int(1e6 * cost),
        latency_ms=float(cost),
        peak_memory_mb=10.0 * cost,
        seconds=5.0,
        settings={"learning_rate": 2e-3},
        curve=[[step, 2.0 / step] for step in range(1, 101)],
        items=records.pack(hits),
        extra={"latency_ratio": float(cost)},
    )
