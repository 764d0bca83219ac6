"""Search for the fastest or smallest model within an allowed loss: the work behind `formwright compress`.

A trial is a recipe: it is applied to a fresh copy of the model, and its quality on validation rows (as many as it takes
to tell the allowed loss, the same for all: bench/judging.py), its time on batches of the user's own data in turns with
the original, its parameters and its bytes are a line of records.jsonl.
Optuna proposes recipes (each method alone first, then combinations) and minimises loss and cost together; its study
lies in search.db beside the records, so that a killed search goes on. The best recipe within the allowed loss is
confirmed on test rows that no trial has seen.
"""

import copy
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

from formwright.bench.judging import judging_on, standard_error
from formwright.bench.measure import disk, forward_call, latency, parameters
from formwright.bench.records import Record, Records, check_same_run, environment, key, read_run, write_run
from formwright.build import Spec, build
from formwright.compress import export as exporting
from formwright.compress.export_int8 import INT8, export_int8, ready_int8
from formwright.compress.fidelity import fidelity
from formwright.compress.finetune import ensure_head
from formwright.compress.modifier import Data, Kind
from formwright.compress.pipeline import run as run_recipe
from formwright.compress.recipe import Recipe
from formwright.compress.structure import load, read_config
from formwright.errors import FormwrightError, require
from formwright.tasks.base import Metric, Task
from formwright.tasks.support.own import read
from formwright.training import evaluate
from formwright.training.evaluation import Split, fetch, rows
from formwright.training.items import Items

Cost = Literal["latency", "size", "params"]
Told = Callable[[str], None]

MODEL, TRIALS, STUDY = "model", "trials", "search.db"
BATCHES = 6  # of the user's rows, that a model is timed on
ROUNDS = 7

# What a search combines: at most one of each group, in this order. A method that cannot be applied to the model is left
# out.
GROUPS: dict[str, tuple[str, ...]] = {
    "width": (
        "prune(structure=neuron, amount=0.25)",
        "prune(structure=neuron, amount=0.5)",
        "prune(structure=head, amount=0.25)",
    ),
    "depth": tuple(f"entrodrop(score=cosine, count={count}, samples=32)" for count in (1, 2, 3)),
    "recover": ("distill", "finetune"),
    "products": ("int8",),
    "precision": ("bfloat16",),  # of what int8 leaves, or of all
    "execution": ("padding-free", "i-bert(qat_steps=0)", "deebert", "ltp"),
}
LIGHT = ("execution", "precision", "products")  # quick to try, and each gains beside the others: first, stacked


@dataclass(frozen=True, kw_only=True)
class Target:
    """A cost and the share of the original's that is wished for."""

    cost: Cost = "latency"
    ratio: float = 0.5

    @staticmethod
    def read(text: str) -> "Target":
        """From `latency=0.5`.

        Raises:
            FormwrightError: another form, an unknown cost, or a share outside 0 to 1.
        """
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or name not in get_args(Cost):
            raise FormwrightError(f"--target {text!r} cannot be read: write {'=0.5, '.join(get_args(Cost))}=0.5.")
        try:
            ratio = float(value)
        except ValueError as wrong:
            raise FormwrightError(f"--target {text!r}: {value!r} is no number; write {name}=0.5.") from wrong
        if not 0.01 <= ratio < 1:
            raise FormwrightError(
                f"--target {text!r} asks for {ratio:g} of the original's {name}: choose a share from 0.01 to below 1."
            )
        return Target(cost=name, ratio=ratio)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to search; whichever ends first."""

    seconds: float | None = None
    trials: int | None = None

    @staticmethod
    def read(text: str) -> "Budget":
        """From `30m`, `90s`, `2h` or a number of trials.

        Raises:
            FormwrightError: another form.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|)\s*", text)
        if match is None or not float(match[1]):
            raise FormwrightError(f"--budget {text!r} cannot be read: write 30m, 90s, 2h or a number of trials.")
        if not match[2]:
            return Budget(trials=int(float(match[1])))
        return Budget(seconds=float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]])


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """What came out.

    Args:
        model: the chosen one, in evaluation mode.
        folder: where it was saved.
        recipe: what made it; none when nothing within the allowed loss is better than the original.
        met: whether it meets the target on the validation rows' loss and the measured cost.
        confirmed: whether its loss on the test rows is within the allowed one.
        sentences: what was found, for people.
        report: the HTML file.
        test: quality on test rows of the original and the chosen, and the cost's ratio.
        exports: the file of every format that was asked for; none where it could not be written.
    """

    model: PreTrainedModel
    folder: Path
    recipe: Recipe | None
    met: bool
    confirmed: bool
    sentences: list[str]
    report: Path | None
    test: dict[str, float]
    exports: dict[str, Path | None] = field(default_factory=dict)


def compress(
    model: PreTrainedModel | str | Path,
    recipe: Recipe | Spec | Sequence[Spec] | str | Path | None = None,
    data: Data | Task | str | Path | None = None,
    *,
    task: Kind = "text-classification",
    out: str | Path,
    max_drop: float = 0.01,
    target: str | Target = "latency=0.5",
    budget: str | Budget = "30m",
    text: str | None = None,
    label: str | None = None,
    export: Sequence[str] = (),
    seed: int = 0,
    command: str = "",
    told: Told | None = None,
) -> Compressed:
    """Make a model smaller or faster within the accuracy allowed, and save it.

    Args:
        model: a Hugging Face model or its folder.
        recipe: the steps to run; none = search for the best.
        data: a file of the user's rows, a task, or nothing for the data that comes with the kind of task.
        task: text-classification, image-classification, causal-lm or sentence-embedding.
        out: folder of the run; the same call goes on where a stopped one was.
        max_drop: the loss allowed: of accuracy or fidelity as a difference (0.01 = one point), of perplexity as a
            share.
        target: latency=0.5, size=0.25 or params=0.5, as shares of the original's.
        budget: 30m, 90s, 2h or a number of trials.
        text, label: the columns of a table, where their names do not tell.
        export: formats to write the chosen model in besides: onnx, openvino; of classifiers onnx-int8, openvino-int8.
        seed: of splits, training and search.
        told: called with a sentence about what is going on.

    Raises:
        FormwrightError: no model, data that does not fit it, an unreadable recipe, target or budget, or a folder that
            holds another run.
    """
    from formwright.bench.compress_report import report

    say = told or (lambda _: None)
    target = Target.read(target) if isinstance(target, str) else target
    budget = Budget.read(budget) if isinstance(budget, str) else budget
    if not 0 <= max_drop < 1:
        raise FormwrightError(f"max_drop is {max_drop:g}: choose a share from 0 to below 1, such as 0.01.")
    for format in export:
        if format in INT8:
            ready_int8(INT8[format], task)
        else:
            exporting.ready(format)
    given = None if recipe is None else Recipe.read(recipe)
    if given is not None:
        given.modifiers()  # a wrong option is told before hours of work
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FormwrightError(f"{out} is a file: give --out a folder.")
    settings = {
        "model": _called(model),
        "data": None if data is None else _called(data),
        "kind": task,
        "text": text,
        "label": label,
        "max_drop": max_drop,
        "target": asdict(target),
        "seed": seed,
    }
    check_same_run(out, settings)  # before anything in the folder is used
    bench = Bench.prepare(
        model, data, kind=task, text=text, label=label, seed=seed, folder=out, max_drop=max_drop, say=say
    )
    if bench.judged < bench.held:
        say(f"Judging on {bench.judged:,} of {bench.held:,} validation rows: enough to tell a loss of {max_drop:g}")
    write_run(out, {"settings": settings, "command": command, "budget": asdict(budget), **bench.facts()})
    with Records(out, write=True) as records:
        if given is None:
            search(bench, records, max_drop=max_drop, target=target, budget=budget, say=say)
        else:
            say(f"Applying {given.label()}")
            record = bench.trial(given, records)
            if record.status != "done":
                raise FormwrightError(f"{given.label()}: {record.error}")
        chosen = choose(records, target, max_drop) if given is None else record
        result = finish(bench, records, chosen, target, max_drop, out)
    if export:
        say(f"Exporting to {' and '.join(export)}")
    result = replace(result, **exported(result, export, out, bench.data, max_drop))
    write_run(out, {**(read_run(out) or {}), "result": {"sentences": result.sentences, "test": result.test}})
    return replace(result, report=report(out))


def _called(given: Any) -> str:
    """What a model or data is known by: the name of a task, a class, or a path."""
    task = getattr(given, "task", given)
    if isinstance(task, str | Path):
        return str(task)
    return str(getattr(task, "name", type(task).__name__))


class Bench:
    """The original model, its data, and what a candidate is measured by."""

    def __init__(
        self, model: PreTrainedModel, data: Data, *, name: str, folder: Path, max_drop: float, processor: Any = None
    ) -> None:
        self.original = finite(model).eval()
        self.data, self.name, self.folder, self.processor = data, name, folder, processor
        whole: Task = data.task  # type: ignore[assignment]
        self.task = judging_on(whole, data.kind, max_drop, data.seed)
        self.judged, self.held = (len(rows(one, "validation")) for one in (self.task, whole))  # type: ignore[arg-type]
        self.metric: Metric = self.task.main
        self.batches = _batches(whole)
        self.quality, self.items = self.judge(self.original, "validation")
        self.size = disk(self.original)
        self.params = parameters(self.original)[0]

    @staticmethod
    def prepare(
        model: PreTrainedModel | str | Path,
        data: Data | Task | str | Path | None,
        *,
        kind: Kind,
        text: str | None,
        label: str | None,
        seed: int,
        folder: Path,
        max_drop: float,
        say: Told,
    ) -> "Bench":
        """Load the model, read the data, and fit a head where the model has none."""
        if isinstance(data, Data):
            if not isinstance(model, PreTrainedModel):
                raise FormwrightError("With Data of your own, give the model itself, not its folder.")
            return Bench(model, data, name=_called(model), folder=folder, max_drop=max_drop)
        processor = None if isinstance(model, PreTrainedModel) else processor_of(model, kind)
        say("Reading the model and the data")
        opened = model if isinstance(model, PreTrainedModel) else open_model(model)
        if kind == "causal-lm" and not opened.can_generate():
            raise FormwrightError(
                f"{type(opened).__name__} tells no next token: give a causal language model, or another --task."
            )
        if isinstance(data, Task):
            found = data
        elif processor is None:
            raise FormwrightError("Give the model's folder, so that its tokenizer is found, or data as a Task.")
        else:
            named = has_head(opened) and kind.endswith("classification")
            classes = {int(i): n for i, n in (opened.config.id2label or {}).items()} if named else None
            found = read(kind, data, processor, text=text, label=label, classes=classes, seed=seed)
        kept = folder / "original"
        # without a run.json it is what a run that was refused has left, maybe another model's
        if (kept / "config.json").exists() and read_run(folder) is not None:
            original = load(kept)
        else:
            original = ensure_head(opened, found) if kind.endswith("classification") else opened
            draft = folder / "original.part"
            shutil.rmtree(draft, ignore_errors=True)
            original.save_pretrained(draft)
            if processor is not None:
                processor.save_pretrained(draft)
            shutil.rmtree(kept, ignore_errors=True)
            draft.rename(kept)
        held = Data(task=found, kind=kind, seed=seed, settings=found.defaults.settings)
        return Bench(original, held, name=_called(model), folder=folder, max_drop=max_drop, processor=processor)

    def facts(self) -> dict[str, Any]:
        return {
            "metric": asdict(self.metric),
            "original": {"quality": self.quality, "params": self.params, "size": self.size},
            "judged": {"rows": self.judged, "of": self.held},
            "environment": environment(),
            "created": time.strftime("%Y-%m-%d %H:%M"),
        }

    def judge(self, model: PreTrainedModel, split: Split) -> tuple[float, Items | None]:
        """Quality on a split, and what was right row by row; embeddings are judged all together."""
        if self.data.kind == "sentence-embedding":
            return fidelity(model, self.original, self.task, split)[self.metric.name], None
        found = evaluate(model, self.task, split, batch_size=32)
        return found.metrics[self.metric.name], found.items

    def error(self, items: Items | None) -> float | None:
        """The standard error of what a candidate loses on the validation rows."""
        if items is None or self.items is None:
            return None
        return standard_error(items, self.items, shares=self.metric.better == "higher")

    def drop(self, quality: float, original: float | None = None) -> float:
        """What is lost: a difference of shares, or the share by which a loss or perplexity grew."""
        before = self.quality if original is None else original
        return before - quality if self.metric.better == "higher" else quality / before - 1

    def times(self, model: PreTrainedModel) -> tuple[float, float]:
        """Milliseconds for the user's batches and the ratio to the original, both timed in turns."""
        runs = {"original": self._pass(self.original), "candidate": self._pass(model)}
        return latency(runs, rounds=ROUNDS)["candidate"]

    def _pass(self, model: PreTrainedModel) -> Callable[[], None]:
        calls = [forward_call(model, batch) for batch in self.batches]

        def run() -> None:
            for call in calls:
                call()

        return run

    def key(self, recipe: Recipe) -> str:
        """The name of a trial."""
        return key(self.task.name, json.loads(recipe.model_dump_json()), recipe.seed, {"model": self.name})

    def trial(self, recipe: Recipe, records: Records) -> Record:
        """Apply a recipe to a copy, measure it and write it down; a recipe that was tried is read."""
        config, name = json.loads(recipe.model_dump_json()), self.key(recipe)
        if name in records:
            return records[name]
        start = time.perf_counter()
        place = self.folder / TRIALS / name
        about = {"key": name, "task": self.task.name, "candidate": {"recipe": recipe.label()}, "config": config}
        try:
            model, changes = run_recipe(copy.deepcopy(self.original), recipe, self.data, folder=place)
            quality, items = self.judge(model, "validation")
            took, ratio = self.times(model)
            record = Record(
                **about,
                seed=recipe.seed,
                status="done",
                metrics={self.metric.name: quality, "drop": self.drop(quality)},
                params=parameters(model)[0],
                latency_ms=took,
                seconds=time.perf_counter() - start,
                environment=environment(probe=False),
                extra={
                    "error": self.error(items),
                    "latency": ratio,
                    "size": disk(model) / self.size,
                    "params": changes[-1].parameters[1] / changes[0].parameters[0],
                    "changes": [asdict(change) for change in changes],
                },
            )
        except FormwrightError as wrong:
            took = time.perf_counter() - start
            record = Record(**about, seed=recipe.seed, status="unsupported", seconds=took, error=str(wrong))
            shutil.rmtree(place, ignore_errors=True)
        records.append(record)
        return record

    def reopen(self, record: Record) -> PreTrainedModel:
        """The model of a finished trial."""
        place = self.folder / TRIALS / record.key
        recipe = Recipe(**record.config)
        model, _ = run_recipe(copy.deepcopy(self.original), recipe, self.data, folder=place)
        return model


def finite(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself.

    Raises:
        FormwrightError: it holds a weight that is no number or infinite.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise FormwrightError(
                f"{name} of the model holds values that are no numbers: train or copy the model again."
            )
    return model


def has_head(model: PreTrainedModel) -> bool:
    return "ForSequenceClassification" in type(model).__name__ or "ForImageClassification" in type(model).__name__


def open_model(name: str | Path) -> PreTrainedModel:
    """A model from its folder, or from the hub when the name is one of its models.

    Raises:
        FormwrightError: neither, or a folder whose model cannot be read.
    """
    if Path(name).exists():
        return load(name)
    try:
        architecture = (AutoConfig.from_pretrained(name).architectures or ["AutoModel"])[0]
        return getattr(transformers, architecture, AutoModel).from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as wrong:
        raise FormwrightError(
            f"{name} is neither a folder nor a model that can be had from the hub: give the folder of a model."
        ) from wrong


def processor_of(model: str | Path, kind: Kind) -> Any:
    """The tokenizer or image processor that was saved with a model.

    Raises:
        FormwrightError: there is none.
    """
    if Path(model).exists():
        read_config(Path(model))  # what is no model at all is told as such
    images = kind == "image-classification"
    try:
        return AutoImageProcessor.from_pretrained(model) if images else AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError) as wrong:
        what = "image processor" if images else "tokenizer"
        raise FormwrightError(
            f"{model} holds no {what} that can be read: save the model's own beside it with save_pretrained."
        ) from wrong


def _batches(task: Task) -> list[dict[str, Tensor]]:
    """Validation rows as a user would send them: in the order they come."""
    held = rows(task, "validation")
    count = min(len(held), 32 * BATCHES)  # type: ignore[arg-type]
    places = torch.arange(count).split(32)
    made = [fetch(held, one.tolist(), task.collate) for one in places]
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in made]


def available(model: PreTrainedModel) -> dict[str, list[str]]:
    """The methods of each group that can be applied to this model."""
    found: dict[str, list[str]] = {}
    for group, specs in GROUPS.items():
        found[group] = []
        for spec in specs:
            try:
                build("modifier", spec).check(model)
            except FormwrightError:
                continue
            found[group].append(spec)
    return found


def _first_trials(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """What costs little to try, each upon the one before; then every other method alone."""
    nothing = dict.fromkeys(choices, "")
    light = [group for group in LIGHT if group in choices]
    stacked = [nothing | {group: choices[group][1] for group in light[: i + 1]} for i in range(len(light))]
    alone = [
        nothing | {group: spec}
        for group, specs in reversed(choices.items())
        for spec in specs[1:]
        if group != "recover"  # there is nothing to recover from yet
    ]
    return stacked + [one for one in alone if one not in stacked]


def search(bench: Bench, records: Records, *, max_drop: float, target: Target, budget: Budget, say: Told) -> None:
    """Try recipes until the budget is spent."""
    optuna = require("optuna", extra="search")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    choices = {group: ["", *specs] for group, specs in available(bench.original).items() if specs}
    if not choices:
        raise FormwrightError(
            f"No method of a search can be applied to {type(bench.original).__name__}: write a recipe for it."
        )
    study = optuna.create_study(
        study_name="compress",
        storage=f"sqlite:///{(bench.folder / STUDY).resolve()}",
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=bench.data.seed, multivariate=True),
        load_if_exists=True,
    )
    if not study.trials:
        for first in _first_trials(choices):
            study.enqueue_trial(first)
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # killed in the middle: once more
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params)
    while not (_spent(budget, records) or _exhausted(choices, study)):
        trial = study.ask()
        steps = [trial.suggest_categorical(group, options) for group, options in choices.items()]
        steps = [step for step in steps if step]
        if not steps:
            study.tell(trial, [0.0, 1.0])  # the original
            continue
        recipe = Recipe.read(steps)
        before = len(records)
        if bench.key(recipe) not in records:
            say(f"Trial {before + 1}: {recipe.label()}")
        record = bench.trial(recipe, records)
        if record.status == "done" and math.isfinite(record.metrics["drop"] or 0.0):
            study.tell(trial, [record.metrics["drop"], record.extra[target.cost]])
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if len(records) > before:
            say(f"  {_brief(bench, record) if record.status == 'done' else f'cannot be applied: {record.error}'}")
        _tidy(bench, records, target, max_drop)


def _spent(budget: Budget, records: Records) -> bool:
    """Counting the trials and the time of earlier calls on the same folder."""
    if budget.trials is not None and len(records) >= budget.trials:
        return True
    return budget.seconds is not None and sum(one.seconds or 0.0 for one in records) > budget.seconds


def _exhausted(choices: Mapping[str, Sequence[str]], study: Any) -> bool:
    """Every combination was proposed, or nothing but repetitions for long."""
    everything = math.prod(len(options) for options in choices.values())
    proposed = study.get_trials(deepcopy=False)
    seen = {json.dumps(one.params, sort_keys=True) for one in proposed if len(one.params) == len(choices)}
    return len(seen) >= everything or len(proposed) > 20 * (len(seen) + 5)


def _brief(bench: Bench, record: Record) -> str:
    words = "times the original's time: slower" if record.extra["latency"] > 1 else "of the original's time"
    return (
        f"{bench.metric.name} {record.metrics[bench.metric.name]:.4f} (drop {record.metrics['drop']:+.4f}), "
        f"{record.extra['latency']:.2f} {words}, {record.extra['size']:.2f} of its size"
    )


def _tidy(bench: Bench, records: Records, target: Target, max_drop: float) -> None:
    """Keep the models of the best trials only."""
    keep = {one.key for one in ranking(records, target, max_drop)[:3]}
    for place in (bench.folder / TRIALS).glob("*"):
        if place.name not in keep and place.name in records:
            shutil.rmtree(place, ignore_errors=True)


def ranking(records: Iterable[Record], target: Target, max_drop: float) -> list[Record]:
    """Trials within the allowed loss that are cheaper than the original, the cheapest first."""
    fit = [
        one
        for one in records
        if one.status == "done" and one.metrics["drop"] is not None and one.metrics["drop"] <= max_drop
    ]
    return sorted((one for one in fit if one.extra[target.cost] < 1), key=lambda one: one.extra[target.cost])


def choose(records: Iterable[Record], target: Target, max_drop: float) -> Record | None:
    """The best trial: the cheapest within the allowed loss."""
    ranked = ranking(records, target, max_drop)
    return ranked[0] if ranked else None


def finish(
    bench: Bench, records: Records, chosen: Record | None, target: Target, max_drop: float, out: Path
) -> Compressed:
    """Confirm the choice on the test rows, save it, and say what was found."""
    before = bench.judge(bench.original, "test")[0]
    name = bench.metric.name
    done = [one for one in records if one.status == "done"]
    if chosen is None:
        measured = [one for one in done if one.metrics["drop"] is not None]  # a loss that is no number is kept as none
        closest = min(measured, key=lambda one: one.metrics["drop"], default=None)
        said = [
            f"No recipe of {len(done)} is both within the allowed loss of {max_drop:g} and cheaper in {target.cost}."
        ]
        if closest is not None:
            said.append(f"The closest, {closest.candidate['recipe']}, loses {closest.metrics['drop']:.4f} of {name}.")
        said.append("The original was saved.")
        model, after, met, confirmed, recipe = bench.original, before, False, True, None
        ratio = 1.0
    else:
        model = bench.reopen(chosen)
        after = bench.judge(model, "test")[0]
        ratio = chosen.extra[target.cost]
        if target.cost == "latency":
            ratio = bench.times(model)[1]  # once more: the best of many timings flatters
        met, confirmed = ratio <= target.ratio, bench.drop(after, before) <= max_drop
        recipe = Recipe(**chosen.config)
        said = [f"{recipe.label()}: {_share(target, ratio)} the original's {target.cost}."]
        if not met:
            said.append(f"That misses the target of {target.ratio:g} by {ratio - target.ratio:.2f}.")
        lost = bench.drop(after, before)
        said.append(
            f"On held-out test rows {name} is {after:.4f}, the original's {before:.4f}: a loss of {lost:+.4f}, "
            f"{'within' if confirmed else 'beyond'} the allowed {max_drop:g}."
        )
    folder = out / MODEL
    draft = out / f"{MODEL}.part"
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    if bench.processor is not None:
        bench.processor.save_pretrained(draft)
    if recipe is not None:
        (draft / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return Compressed(
        model=model,
        folder=folder,
        recipe=recipe,
        met=met,
        confirmed=confirmed,
        sentences=said,
        report=None,
        test={"original": before, "chosen": after, "ratio": ratio},
    )


def exported(result: Compressed, formats: Sequence[str], out: Path, data: Data, max_drop: float) -> dict[str, Any]:
    """The chosen model in other formats, those of an earlier choice removed: their files and what is to be said."""
    files: dict[str, Path | None] = {}
    said = list(result.sentences)
    for format in (*exporting.TITLES, *INT8):
        shutil.rmtree(out / format, ignore_errors=True)
        if format not in formats:
            continue
        title = exporting.TITLES[INT8.get(format, format)] + (" in int8" if format in INT8 else "")
        try:
            if format in INT8:
                made = export_int8(result.model, out / format, data, INT8[format], max_drop=max_drop)
                files[format], (score, before) = made.path, made.score
                checked = f"which scores {score:.4f} on validation rows and the model {before:.4f}"
            else:
                files[format] = exporting.export(result.model, out / format, format)  # type: ignore[arg-type]
                checked = "its outputs compared with the model's"
            said.append(f"For {title}: {files[format]}, {checked}.")
        except FormwrightError as wrong:
            shutil.rmtree(out / format, ignore_errors=True)
            files[format] = None
            said.append(f"For {title} nothing was written. {wrong}")
    return {"exports": files, "sentences": said}


def _share(target: Target, ratio: float) -> str:
    if target.cost == "latency":
        return f"{1 / ratio:.2f} times as fast, {ratio:.2f} of" if ratio < 1 else f"slower, {ratio:.2f} of"
    return f"{ratio:.2f} of"
