"""A grid of parts x seeds on one task at equal budgets, run in parallel, resumable.

In a run folder lie records.jsonl (see `records`), run.json (what is compared and what each candidate costs),
worker.log and report.html. The same call goes on where a killed one stopped: finished trials are kept, failed ones run
again.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from formwright import __version__, catalog
from formwright.bench import records
from formwright.bench.pool import Answer, Backend, Job, Pool, pool
from formwright.bench.records import Record, Records, canonical
from formwright.bench.summary import Summary, label, summarize, table
from formwright.build import Spec, format_spec, parse_spec, split_list
from formwright.errors import FormwrightError, require
from formwright.training.settings import Settings

Match = Literal["params", "flops", "none"]
Value = Spec | int | float | bool | None | Sequence[Spec]

SLOTS = ("mixer", "position", "feedforward", "norm", "block", "init", "embedding", "sharing")
WIDTHS = ("hidden_size", "intermediate_size")
SWEEP = 0.25  # of the steps, for each learning rate of a sweep
ROUNDS = 15  # of interleaved timing


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a comparison found, and where it lies.

    Attributes:
        folder: with records.jsonl, run.json and report.html.
        summary: rows from best to worst, what has no result, sentences.
        report: the HTML file.
    """

    folder: Path
    summary: Summary
    report: Path

    @property
    def failed(self) -> int:
        """How many trials broke."""
        return sum(len(one.seeds) for one in self.summary.missing if one.status == "failed")

    def table(self) -> Any:
        """The results as a Rich table."""
        return table(self.summary)


def compare(
    task: str,
    vary: Mapping[str, Sequence[Value]] | Sequence[Mapping[str, Value]],
    *,
    match: Match = "params",
    seeds: int | Sequence[int] = 2,
    steps: int | None = None,
    out: str | Path,
    backend: Backend = "local",
    workers: int | None = None,
    learning_rates: Sequence[float] | None = None,
    baseline: str | Mapping[str, Value] | None = None,
    data: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    read: Mapping[str, Sequence[Value]] | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> Result:
    """Train every combination of parts on a task with every seed, and say what differs from the baseline.

    Args:
        task: name of a task, with options in brackets.
        vary: for slots (mixer, position, feedforward, norm, block, init), fields of TransformerConfig or of the
            training settings: what to try. A list inside the list is one pattern over the layers. A list of mappings
            names the candidates one by one, {"position": "rope"}, in place of all combinations.
        match: widths are chosen so that all candidates have the baseline's parameters (within 1 %) or FLOPs (2 %); or
            not at all.
        seeds: how many, from 0, or which.
        steps: of training; none = the task's default.
        out: the run's folder.
        backend: processes of this machine, or Ray.
        workers: trials at once, one thread each; none = one a core.
        learning_rates: each candidate first tries all of them on its first seed for a quarter of the steps and keeps
            the best.
        baseline: what the others are tested against, {"mixer": "softmax"} or "mixer=softmax"; none = the first
            combination.
        data: the data folder; none = $FORMWRIGHT_DATA.
        settings: fields of the training settings and of TransformerConfig, the same for all candidates.
        read: options of the task at which every trained model is read as well, {"length": [256, 512]}.
        command: how the report says it was run.
        console: where progress goes; none = standard error.

    Raises:
        FormwrightError: anything that no run could mend: unknown names, a folder of another run, a baseline that
            cannot be built.
    """
    require("scipy.stats", extra="report")
    require("plotly", extra="report")
    chosen = _Choice(task, vary, match, seeds, steps, learning_rates, baseline, data, settings, read)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FormwrightError(f"{folder} is a file: name a folder for the run.")
    records.check_same_run(folder, chosen.fixed)
    with Records(folder, write=True) as log:
        team = pool(backend, workers, folder / "worker.log")
        try:
            run = _Run(chosen, folder, log, team, console or Console(stderr=True), command)
            run.describe()
            run.measure()
            run.sweep()
            run.train()
        finally:
            team.close()
    from formwright.bench.report import report

    path = report(folder)
    return Result(folder=folder, summary=summarize(folder), report=path)


class _Choice:
    """What was asked for, checked."""

    def __init__(
        self,
        task: str,
        vary: Mapping[str, Sequence[Value]] | Sequence[Mapping[str, Value]],
        match: str,
        seeds: int | Sequence[int],
        steps: int | None,
        learning_rates: Sequence[float] | None,
        baseline: str | Mapping[str, Value] | None,
        data: str | Path | None,
        settings: Mapping[str, Any] | None,
        read: Mapping[str, Sequence[Value]] | None = None,
    ) -> None:
        if match not in get_args(Match):
            raise FormwrightError(f"match is {match!r}, but it must be params, flops or none.")
        self.seeds = list(range(seeds)) if isinstance(seeds, int) else [int(one) for one in seeds]
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise FormwrightError(f"seeds is {seeds}, but at least one is needed, and none twice.")
        if steps is not None and steps < 1:
            raise FormwrightError(f"steps is {steps}, but at least one is needed.")
        if learning_rates is not None and not all(0 < rate < math.inf for rate in learning_rates or [0.0]):
            raise FormwrightError(f"learning_rates is {list(learning_rates)}, but it needs rates above 0.")
        self.task, self.match, self.steps = format_spec(task), match, steps
        self.rates = None if learning_rates is None else sorted(set(learning_rates))
        self.data = None if data is None else str(Path(data).resolve())
        if not vary:
            raise FormwrightError("There is nothing to compare: vary at least one slot, as in mixer=softmax,aft.")
        self.crossed = isinstance(vary, Mapping)  # all combinations, or candidates one by one
        combinations, self.grid, common = _combinations(vary) if isinstance(vary, Mapping) else _one_by_one(vary)
        self.read = _readings(self.task, read or {})
        self.common = {**{name: _value(name, value) for name, value in (settings or {}).items()}, **common}
        both = sorted(set(self.common) & set(self.grid))
        if both:
            raise FormwrightError(f"{both[0]} is varied and set at once: leave it out of one of them.")
        if "steps" in self.common:
            self.steps = self.common.pop("steps")
        self.baseline = _baseline(baseline, self.grid, combinations)
        self.candidates = [self.baseline, *(one for one in combinations if one != self.baseline)]
        self.fixed = {
            "task": self.task,
            "match": match,
            "steps": self.steps,
            "baseline": _plain(self.baseline),
            "learning_rates": self.rates,
            "data": self.data,
            "set": self.common,
            **({"read": self.read} if self.read else {}),
        }


Candidates = tuple[list[dict[str, Any]], dict[str, list[Any]], dict[str, Any]]  # each, what is varied, what is common


def _combinations(vary: Mapping[str, Sequence[Value]]) -> Candidates:
    grid = {name: _values(name, values) for name, values in vary.items()}
    common = {name: values[0] for name, values in grid.items() if len(values) == 1}
    varied = {name: values for name, values in grid.items() if len(values) > 1}
    if not varied:  # one candidate alone: there is nothing to test it against, but it may be measured
        varied, common = grid, {}
    return [dict(zip(varied, one, strict=True)) for one in itertools.product(*varied.values())], varied, common


def _one_by_one(given: Sequence[Mapping[str, Value]]) -> Candidates:
    if not all(isinstance(one, Mapping) and one for one in given):
        raise FormwrightError('vary is a list, but each of it must say what is tried: {"position": "rope"}.')
    candidates = [{name: _value(name, value) for name, value in one.items()} for one in given]
    twice = [one for i, one in enumerate(candidates) if one in candidates[:i]]
    if twice:
        raise FormwrightError(f"vary has {label(_plain(twice[0]))} twice.")
    names = dict.fromkeys(name for one in candidates for name in one)
    return candidates, {name: [one[name] for one in candidates if name in one] for name in names}, {}


def _readings(task: str, read: Mapping[str, Sequence[Value]]) -> dict[str, list[Any]]:
    """The options and values at which trained models are read besides.

    Raises:
        FormwrightError: no values, or the value the task has already.
    """
    found: dict[str, list[Any]] = {}
    for name, values in read.items():
        found[name] = [parse_spec(f"x(x={one})")["x"] if isinstance(one, str) else one for one in values]
        if not found[name]:
            raise FormwrightError(f"read has no value for {name}: write {name}=first,second.")
        if parse_spec(task).get(name) in found[name]:
            raise FormwrightError(f"{task} is read at its own {name} anyway: leave it out of read.")
    return found


def _plain(candidate: Mapping[str, Any]) -> dict[str, str]:
    """The candidate as it is shown and recorded."""
    return {name: _shown(value) for name, value in candidate.items()}


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _values(name: str, values: Sequence[Value]) -> list[Any]:
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        values = [values]
    checked = [_value(name, value) for value in values]
    if not checked:
        raise FormwrightError(f"{name} has no value to try: write {name}=first,second.")
    twice = [value for i, value in enumerate(checked) if value in checked[:i]]
    if twice:
        raise FormwrightError(f"{name} has {_shown(twice[0])} twice.")
    return checked


def _value(name: str, value: Any) -> Any:
    """A spec in its shortest form, or the value of a field.

    Raises:
        FormwrightError: no slot or field is called so, or no part.
    """
    if name in SLOTS or name == "attention":
        if name == "attention":
            raise FormwrightError("Attention functions are varied as mixers: write mixer=NAME.")
        if isinstance(value, str) and value.strip().startswith("["):
            if not value.strip().endswith("]"):
                raise FormwrightError(f"{value!r} has no closing bracket: write [first,second] for a pattern.")
            value = split_list(value.strip()[1:-1])
        if isinstance(value, str | Mapping):
            return _spec(name, value)
        if isinstance(value, Sequence) and value:
            return [_spec(name, one) for one in value]
        raise FormwrightError(
            f"{value!r} is no {name}: write its name, or a list of names for a pattern over the layers."
        )
    known = [one.name for one in fields(Settings) if one.name not in ("seed", "save_every")]
    if name == "seed":
        raise FormwrightError("The seed is not varied: give seeds instead.")
    if name == "save_every":
        raise FormwrightError("save_every has no use here: a comparison resumes from finished trials.")
    if name not in known:
        _check_field(name, known)
    if isinstance(value, str) and not isinstance(getattr(Settings, name, None), str):  # whose "none" is a word
        value = parse_spec(f"x(x={value})")["x"]
    if name in known:
        return _setting(name, value)
    return list(value) if isinstance(value, tuple) else value


def _setting(name: str, value: Any) -> Any:
    """The value of a training setting, which has the type of its default and a legal size.

    Raises:
        FormwrightError: it has not.
    """
    default = getattr(Settings, name)
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        value = int(value)
    kinds: dict[type, tuple[str, Any]] = {
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        str: ("a name", (str,)),
        tuple: ("a pair of numbers, (0.9, 0.95)", (list, tuple)),
    }
    said, types = kinds[type(default)]
    if isinstance(value, bool) or not isinstance(value, types) or (isinstance(default, tuple) and len(value) != 2):
        raise FormwrightError(f"{name} is {value!r}, but it must be {said}.")
    if name != "accumulate":  # which is checked with the batch_size it divides, when both are known
        alone: dict[str, Any] = {name: value}
        Settings(**alone)
    return list(value) if isinstance(value, tuple) else value


def _check_field(name: str, settings: Sequence[str]) -> None:
    """Only here is torch imported in this process: most comparisons vary slots alone."""
    import difflib

    from formwright.models.transformer import TransformerConfig

    model = [one.name for one in fields(TransformerConfig)]
    if name not in model or name in ("num_labels", "architecture"):
        known = [*SLOTS, *settings, *model]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FormwrightError(
            f"{name!r} cannot be varied: it is no slot ({', '.join(SLOTS)}), no field of the model's configuration "
            f"and no training setting.{hint}"
        )


def _spec(slot: str, spec: Spec) -> str:
    """Raises FormwrightError for a name that is on no card."""
    name = parse_spec(spec)["name"]
    if name != "none" or slot in ("mixer", "norm", "block", "init"):
        _provided(slot, name)
    return format_spec(spec)


def _provided(slot: str, name: str) -> Any:
    if slot != "mixer":
        return catalog.find(slot, name)
    parts = {part.name: part for kind in ("attention", "mixer") for part in catalog.provided(kind)}
    if name not in parts:
        from formwright.catalog.cards import nearest

        raise FormwrightError(f"No mixer is called {name!r}; the mixers are {', '.join(nearest(name, parts))}.")
    return parts[name]


def _baseline(
    asked: str | Mapping[str, Value] | None, grid: Mapping[str, Sequence[Any]], combinations: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The combination the baseline names; what it leaves out is the first value."""
    if asked is None:
        return combinations[0]
    wanted: dict[str, Any] = {}
    if isinstance(asked, str):
        for item in split_list(asked):
            name, equals, value = item.partition("=")
            if not equals or "(" in name:
                name = next((slot for slot, values in grid.items() if item in map(_shown, values)), "")
                value = item
            wanted[name.strip()] = value
    else:
        wanted = dict(asked)
    if not wanted:
        raise FormwrightError(f"The baseline {asked!r} names none of what is varied: {_choices(grid)}.")
    for name, value in wanted.items():
        if name not in grid:
            raise FormwrightError(f"The baseline {asked!r} names none of what is varied: {_choices(grid)}.")
        wanted[name] = _value(name, value)
        if wanted[name] not in grid[name]:
            raise FormwrightError(f"The baseline's {name} {_shown(value)} is not among those varied: {_choices(grid)}.")
    found = [one for one in combinations if all(one.get(name) == value for name, value in wanted.items())]
    if not found:
        raise FormwrightError(f"No candidate is {label(_plain(wanted))}: name one of them as the baseline.")
    return found[0]


def _choices(grid: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{name}={','.join(map(_shown, values))}" for name, values in grid.items())


class _Run:
    """One run: what is known about the candidates, and the steps in which it becomes known."""

    def __init__(
        self, chosen: _Choice, folder: Path, log: Records, team: Pool, console: Console, command: str | None
    ) -> None:
        self.chosen, self.folder, self.log, self.team, self.console = chosen, folder, log, team, console
        before = records.read_run(folder) or {}
        self.known: dict[str, dict[str, Any]] = {
            canonical(one["candidate"]): one for one in before.get("candidates", [])
        }
        self.about: dict[str, Any] = before.get("about", {})
        self.run = {
            "settings": chosen.fixed,
            "command": command or _call(chosen, folder),
            "created": before.get("created", date.today().isoformat()),
            "version": __version__,
            "baseline": _plain(chosen.baseline),
            "seeds": sorted({*before.get("seeds", []), *chosen.seeds}),
        }
        self.training: dict[str, Any] = {}

    def save(self) -> None:
        shown = {**self.run, "about": self.about, "candidates": list(self.known.values())}
        shown["settings"] = self.chosen.fixed
        if self.about:
            shown |= {
                "task": self.about["task"],
                "metric": self.about["metric"],
                "trivial": self.about["trivial"],
                "training": self.training,
            }
        records.write_run(self.folder, shown)

    def describe(self) -> None:
        """The task: data are read, trivial baselines computed."""
        if not self.about:
            with self.console.status("Reading the task"):
                (_, answer) = next(iter(self.team.run([self._job("describe", read=self.chosen.read)])))
            self.about = _must(answer)
        rest = {name: value for name, value in self.chosen.common.items() if name in self.about["training"]}
        self.training = {**self.about["training"], **rest}
        if self.chosen.steps is not None:
            self.training["steps"] = self.chosen.steps
        self.save()

    def _job(self, kind: str, **rest: Any) -> Job:
        return {"kind": kind, "task": self.chosen.task, "data": self.chosen.data, **rest}

    def _config(self, candidate: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The candidate's model and what must be said about it."""
        asked = {**self.about["model"], **self.chosen.common, **candidate}
        config = {name: value for name, value in asked.items() if name not in self.about["training"]}
        config.setdefault("mixer", "softmax")
        if self.about["head"] == "causal-lm":
            return config, []
        specs = config["mixer"] if isinstance(config["mixer"], list) else [config["mixer"]]
        blind = [
            name
            for name in (parse_spec(spec)["name"] for spec in specs)
            if "bidirectional" not in (can := _provided("mixer", name).capabilities) and "causal" in can
        ]
        if blind:
            config["architecture"] = "decoder"
        return config, ["reads left to right"] if blind else []

    def _training(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in candidate.items() if name in self.about["training"]}
        return {**self.training, **own}

    def measure(self) -> None:
        """Sizes, first the baseline's, then all others' against it, then latencies in turns."""
        chosen = self.chosen
        new = [
            one
            for one in chosen.candidates
            if self.known.get(canonical(_plain(one)), {"status": "failed"})["status"] == "failed"
        ]
        if not new:
            return
        if chosen.baseline in new:
            self._size([chosen.baseline], target=None)
            base = self.known[canonical(_plain(chosen.baseline))]
            if base["status"] != "ready":
                raise FormwrightError(f"The baseline {label(base['candidate'])} cannot be trained: {base['error']}")
        base = self.known[canonical(_plain(chosen.baseline))]
        target = {"params": base["params"], "flops": base["flops"], "none": None}[chosen.match]
        self._size([one for one in new if one != chosen.baseline], target=target)
        ready = [
            known
            for known in (self.known[canonical(_plain(one))] for one in new if one != chosen.baseline)
            if known["status"] == "ready"
        ]
        timed = [base, *ready]
        with self.console.status(f"Timing {len(timed)} models in turns"):
            job = self._job(
                "time", configs=[one["config"] for one in timed], rows=self.training["batch_size"], rounds=ROUNDS
            )
            (_, answer) = next(iter(self.team.run([job])))
        if "done" in answer:
            for known, (milliseconds, ratio) in zip(timed, answer["done"], strict=True):
                if known is not base or known["latency_ms"] is None:
                    known |= {"latency_ms": milliseconds, "latency_ratio": ratio}
        else:
            self.console.print(f"Latency was not measured: {_why(answer)}", markup=False)
        for one in new:
            self._record_unsupported(one)
        self.save()

    def _size(self, candidates: Sequence[dict[str, Any]], *, target: int | float | None) -> None:
        held = [name for name in WIDTHS if name in self.chosen.grid]
        jobs: list[Job] = []
        shown: list[dict[str, Any]] = []
        for candidate in candidates:
            config, notes = self._config(candidate)
            shown.append({"candidate": _plain(candidate), "notes": notes, "config": config})
            jobs.append(
                self._job(
                    "size",
                    config=config,
                    rows=self.training["batch_size"],
                    match=self.chosen.match,
                    target=target,
                    held=held,
                )
            )
        with self._progress() as bar:
            line = bar.add_task("Sizes", total=len(jobs))
            for place, answer in self.team.run(jobs):
                known = {**shown[place], "latency_ms": None, "latency_ratio": None}
                if "done" in answer:
                    known |= {**answer["done"], "status": "ready"}
                else:
                    status = "unsupported" if "refused" in answer else "failed"
                    known |= {"status": status, "error": _why(answer)}
                    self._trace(label(known["candidate"]), answer)
                self.known[canonical(known["candidate"])] = known
                bar.advance(line)

    def _record_unsupported(self, candidate: Mapping[str, Any]) -> None:
        known = self.known[canonical(_plain(candidate))]
        if known["status"] == "ready":
            return
        self._append(
            known, self.chosen.seeds[0], self._training(candidate), status=known["status"], error=known["error"]
        )

    def sweep(self) -> None:
        """Every candidate's best learning rate, on its first seed for a share of the steps."""
        rates = self.chosen.rates
        if rates is None:
            return
        todo = []
        for candidate in self.chosen.candidates:
            known = self.known[canonical(_plain(candidate))]
            if known["status"] == "ready" and "learning_rate" not in known:
                training = self._training(candidate)
                training["steps"] = max(1, round(SWEEP * training["steps"]))
                todo += [(known, {**training, "learning_rate": rate}) for rate in rates]
        seed = self.chosen.seeds[0]
        self._trials("Learning rates", [(known, seed, training) for known, training in todo], purpose="rate")
        for known, _ in todo:
            tried = {
                one.settings["learning_rate"]: one.metrics
                for one in self.log
                if one.purpose == "rate" and one.status == "done" and one.candidate == known["candidate"]
            }
            if tried:
                known["learning_rate"] = min(tried, key=lambda rate: _rank(tried[rate], self.about["metric"]))
        self.save()

    def train(self) -> None:
        """Every trial that has no result yet."""
        trials = []
        for seed in self.chosen.seeds:  # seed by seed: a stopped run has compared all candidates on the first seeds
            for candidate in self.chosen.candidates:
                known = self.known[canonical(_plain(candidate))]
                if known["status"] != "ready":
                    continue
                training = self._training(candidate)
                if self.chosen.rates is not None:
                    if "learning_rate" not in known:
                        tried = ", ".join(map(str, self.chosen.rates))
                        error = f"It could be trained at none of the learning rates {tried}."
                        self._append(known, seed, training, status="failed", error=error)
                        continue
                    training["learning_rate"] = known["learning_rate"]
                trials.append((known, seed, training))
        self._trials("Trials", trials, purpose="compare")

    def _trials(self, title: str, trials: Sequence[tuple[dict, int, dict]], *, purpose: records.Purpose) -> None:
        """Run what has not been done; every answer is on the disk before the next is waited for."""
        todo = []
        for known, seed, training in trials:
            name = records.key(self.chosen.task, known["config"], seed, {**training, "purpose": purpose})
            if name not in self.log or self.log[name].status == "failed":
                todo.append((known, seed, training))
        if len(todo) < len(trials):
            self.console.print(f"{title}: {len(trials) - len(todo)} of {len(trials)} are done already.", markup=False)
        if not todo:
            return
        jobs = [
            self._job(
                "train",
                config=known["config"],
                seed=seed,
                training=training,
                choose=purpose == "rate",
                read=None if purpose == "rate" else self.chosen.read,
            )
            for known, seed, training in todo
        ]
        with self._progress() as bar:
            line = bar.add_task(title, total=len(jobs))
            for place, answer in self.team.run(jobs):
                known, seed, training = todo[place]
                if "done" in answer:
                    record = self._append(known, seed, training, status="done", purpose=purpose, result=answer["done"])
                    metrics = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
                    said = f"{metrics}, {record.seconds:.1f} s"
                else:
                    self._trace(f"{label(known['candidate'])}, seed {seed}", answer)
                    self._append(known, seed, training, status="failed", purpose=purpose, error=_why(answer))
                    said = f"failed: {_why(answer)}"
                rate = f", rate {training['learning_rate']:g}" if purpose == "rate" else ""
                bar.console.print(
                    f"{label(known['candidate'])}, seed {seed}{rate}: {said}", markup=False, highlight=False
                )
                bar.advance(line)

    def _append(
        self,
        known: Mapping[str, Any],
        seed: int,
        training: Mapping[str, Any],
        *,
        status: records.Status,
        purpose: records.Purpose = "compare",
        result: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> Record:
        result = result or {}
        memory, forward, disk = (known.get(name) for name in ("step_memory", "forward_memory", "disk"))
        extra = {
            "latency_ratio": known.get("latency_ratio"),
            "budget_ratio": known.get("ratio"),
            "trainable": known.get("trainable"),
            "forward_memory_mb": None if forward is None else forward / 1e6,
            "disk_mb": None if disk is None else disk / 1e6,
            "train_seconds": result.get("train_seconds"),
            "unread": result.get("unread") or None,
            "converges": result.get("converges"),
        }
        record = Record(
            key=records.key(self.chosen.task, known["config"], seed, {**training, "purpose": purpose}),
            task=self.about["task"],
            candidate=dict(known["candidate"]),
            config=dict(known["config"]),
            seed=seed,
            status=status,
            metrics=dict(result.get("metrics", {})),
            params=known.get("params"),
            flops=known.get("flops"),
            latency_ms=known.get("latency_ms"),
            peak_memory_mb=None if memory is None else memory / 1e6,
            seconds=result.get("seconds"),
            environment=dict(result.get("environment", {})),
            settings=dict(training),
            purpose=purpose,
            curve=list(result.get("curve", [])),
            items=result.get("items"),
            extra={name: value for name, value in extra.items() if value is not None},
            error=error,
        )
        self.log.append(record)
        return record

    def _trace(self, what: str, answer: Answer) -> None:
        """The whole error goes to the log, its sentence to the record."""
        with open(self.folder / "worker.log", "a", encoding="utf-8") as log:
            log.write(f"--- {what}\n{answer.get('trace', '')}\n")

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )


def _must(answer: Answer) -> Any:
    if "done" not in answer:
        raise FormwrightError(_why(answer))
    return answer["done"]


def _why(answer: Answer) -> str:
    return str(answer.get("refused") or answer.get("failed"))


def _rank(metrics: Mapping[str, float], metric: Mapping[str, Any]) -> float:
    """Lower is better: the loss where there is one, else the main metric."""
    if "loss" in metrics:
        return metrics["loss"]
    value = metrics[metric["name"]]
    return -value if metric["higher_is_better"] else value


def _call(chosen: _Choice, folder: Path) -> str:
    """The call in Python that makes the same run."""
    given = {name: value for name, value in chosen.fixed.items() if value not in (None, {})}
    parts = [
        json.dumps(given.pop("task")),
        json.dumps(chosen.grid if chosen.crossed else chosen.candidates),
        *(f"{'settings' if name == 'set' else name}={value!r}" for name, value in given.items()),
        f"seeds={chosen.seeds}",
        f"out={str(folder)!r}",
    ]
    return f"formwright.compare({', '.join(parts)})"
