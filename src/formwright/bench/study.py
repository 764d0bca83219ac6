"""A study: a comparison that is written down, with what the papers say of each candidate and a computed answer.

A study is a YAML file: the arguments of `compare`, `says` with the papers' statements, and `finding`, the question that
is answered from the records; or, with `kind: costs` or `kind: approximation`, the arguments of `costs.measure` or
`approximation.run`. Those of `formwright/bench/studies` are run by their name:

    formwright study extrapolation --out runs/extrapolation
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from rich.console import Console

from formwright import catalog
from formwright.bench import approximation, approximation_report, cost_report, costs
from formwright.bench.compare import Match, compare
from formwright.bench.records import Record, Records, environment, reading
from formwright.bench.summary import Summary, label, readings_table, table
from formwright.build import parse_spec
from formwright.errors import FormwrightError

FOLDER = Path(__file__).resolve().parent / "studies"
FLAT = 0.02  # nats: a loss that rises by no more is read as well as before


class Comparison(BaseModel):
    """A comparison, and what is asked of it.

    Attributes:
        title: of the page.
        question: in one or two sentences.
        task, vary, match, seeds, steps, learning_rates, baseline, settings, read: as for `compare`.
        says: what the paper of a candidate says of it, by the candidate's label.
        finding: which of the questions this module can answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    question: str
    kind: Literal["comparison"] = "comparison"
    task: str
    vary: dict[str, list[Any]] | list[dict[str, Any]]
    match: Match = "params"
    seeds: list[int]
    steps: int | None = None
    learning_rates: list[float] | None = None
    baseline: str | dict[str, Any] | None = None
    settings: dict[str, Any] = {}
    read: dict[str, list[Any]] = {}
    says: dict[str, str] = {}
    finding: Literal["extrapolation"] | None = None


class Costs(BaseModel):
    """What mixers cost as sequences grow.

    Attributes:
        title, question: as above.
        mixers: specs; none = all that can serve such sequences.
        lengths, width, heads, batch, causal, dtypes, phases, rounds, most_seconds: see `formwright.bench.costs`.
        threads: with one alone, other programs on the machine change little.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    question: str
    kind: Literal["costs"]
    mixers: list[str] | None = None
    lengths: list[int]
    width: int = 512
    heads: int = 8
    batch: int = 1
    causal: bool = False
    dtypes: list[costs.Dtype] = ["float32"]
    phases: list[costs.Phase] = ["forward", "training"]
    rounds: int = 3
    most_seconds: float = 30.0
    threads: int = 1


class Approximation(BaseModel):
    """How near attention functions come to softmax attention, at equal work.

    Attributes:
        title, question: as above.
        budgets: shares of exact attention's FLOPs.
        methods: by name, the settings that are tried.
        models, length, rows, chosen_on, steps: see `formwright.bench.approximation`.
        threads: as above.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    question: str
    kind: Literal["approximation"]
    budgets: list[PositiveFloat] = Field(min_length=1)
    methods: dict[str, list[str]]
    models: list[approximation.Name] = ["minilm", "decoder"]
    length: int = 512
    rows: int = 4
    chosen_on: int = 2
    steps: int = 900
    threads: int = 1


Study = Comparison | Costs | Approximation
KINDS: dict[str, type[Study]] = {"costs": Costs, "approximation": Approximation}


@dataclass(frozen=True, kw_only=True)
class Studied:
    """What a study found.

    Attributes:
        found: what study.json holds.
        report: the HTML file.
        tables: what a terminal shows.
        failed: trials that broke.
    """

    found: dict[str, Any]
    report: Path
    tables: list[Any]
    failed: int = 0


def names() -> list[str]:
    """The studies that come with Formwright."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_study(source: str | Path) -> Study:
    """A study by its name or from its file.

    Raises:
        FormwrightError: neither a name nor a file, or a file that is no study.
    """
    path = FOLDER / f"{source}.yaml" if str(source) in names() else Path(source)
    if not path.is_file():
        raise FormwrightError(f"{source} is no study: give a YAML file, or one of {', '.join(names())}.")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = str(given.get("kind")) if isinstance(given, dict) else ""
        return KINDS.get(kind, Comparison).model_validate(given)
    except (yaml.YAMLError, UnicodeDecodeError) as wrong:
        raise FormwrightError(f"{path} is no YAML: {str(wrong).splitlines()[0]}.") from wrong
    except ValidationError as wrong:
        first = wrong.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FormwrightError(f"{path} is no study: {where}: {first['msg'].lower()}.") from wrong


def study(
    source: str | Path,
    *,
    out: str | Path,
    workers: int | None = None,
    data: str | Path | None = None,
    command: str | None = None,
    console: Console | None = None,
) -> Studied:
    """Run a study, or what is left of it, and write study.json beside its records.

    Args:
        source: the name of a study that comes with Formwright, or a YAML file.
        out: the run's folder; the same call goes on where a stopped one was.
        workers: trials at once, none = one a core; or threads where there are no trials, none = as the study says.
        data: the data folder; none = $FORMWRIGHT_DATA.
        command: how the report says it was run.
        console: where progress goes.

    Raises:
        FormwrightError: as `read_study` and `compare`.
    """
    plan = read_study(source)
    console = console or Console(stderr=True)
    if not isinstance(plan, Comparison) and data is not None:
        what = "costs" if isinstance(plan, Costs) else "approximations"
        raise FormwrightError(f"{source} measures {what} and reads no data: leave the data folder out.")
    if isinstance(plan, Costs):
        studied = _costs(plan, Path(out), workers, command, console)
    elif isinstance(plan, Approximation):
        studied = _approximation(plan, Path(out), workers, command, console)
    else:
        studied = _comparison(plan, source, Path(out), workers, data, command, console)
    path = Path(out) / "study.json"
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(studied.found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return studied


def _costs(plan: Costs, out: Path, threads: int | None, command: str | None, console: Console) -> Studied:
    """Costs are measured in this process."""
    torch.set_num_threads(threads or plan.threads)
    chosen = plan.mixers if plan.mixers is not None else costs.applicable(causal=plan.causal)
    sizes = costs.Sizes(width=plan.width, heads=plan.heads, batch=plan.batch, causal=plan.causal)
    points = costs.measure(
        chosen,
        plan.lengths,
        sizes=sizes,
        dtypes=plan.dtypes,
        phases=plan.phases,
        rounds=plan.rounds,
        most_seconds=plan.most_seconds,
        folder=out,
        said=lambda sentence: console.print(sentence, markup=False, highlight=False),
    )
    curves = costs.curves(points)
    reads = "from left to right" if plan.causal else "both ways"
    about = (
        f"One layer of width {plan.width} with {plan.heads} heads, batch {plan.batch}, reading {reads}, "
        f"{torch.get_num_threads()} threads, medians of {plan.rounds} rounds in turns."
    )
    report = cost_report.write(out, plan.title, plan.question, curves, about, command)
    return Studied(
        found={
            "title": plan.title,
            "question": plan.question,
            "about": about,
            "lengths": sorted(plan.lengths),
            "curves": cost_report.as_data(curves),
            "environment": environment(),
        },
        report=report,
        tables=[
            cost_report.table(f"{phase}, {dtype}", group, sorted(plan.lengths))
            for (dtype, phase), group in cost_report.groups(curves).items()
        ],
    )


def _approximation(
    plan: Approximation, out: Path, threads: int | None, command: str | None, console: Console
) -> Studied:
    """Errors are measured in this process."""
    torch.set_num_threads(threads or plan.threads)
    points = approximation.run(
        plan.methods,
        models=plan.models,
        length=plan.length,
        rows=plan.rows,
        chosen_on=plan.chosen_on,
        steps=plan.steps,
        folder=out,
        said=lambda sentence: console.print(sentence, markup=False, highlight=False),
    )
    budgets = sorted(set(plan.budgets))
    curves = approximation.curves(points, budgets)
    about = (
        f"{plan.rows} rows of {plan.length} tokens, all layers and heads; settings chosen on {plan.chosen_on} other "
        f"rows; the decoder trained for {plan.steps} steps."
    )
    found: dict[str, Any] = {
        "title": plan.title,
        "question": plan.question,
        "about": about,
        "budgets": budgets,
    }
    found |= approximation.finding(curves, budgets)
    report = approximation_report.write(out, plan.title, plan.question, found["answer"], curves, budgets, command)
    return Studied(
        found=found | {"approximations": approximation.as_data(curves, budgets), "environment": environment()},
        report=report,
        tables=[*approximation_report.tables(curves, budgets), found["answer"]],
    )


def _comparison(
    plan: Comparison,
    source: str | Path,
    out: Path,
    workers: int | None,
    data: str | Path | None,
    command: str | None,
    console: Console,
) -> Studied:
    known = [label(one) for one in plan.vary] if isinstance(plan.vary, list) else None
    strange = [] if known is None else [one for one in plan.says if one not in known]
    if strange:
        raise FormwrightError(f"{source} says something of {strange[0]}, which is none of its candidates.")
    asked = plan.model_dump(exclude={"title", "question", "kind", "says", "finding"})
    result = compare(**asked, out=out, workers=workers, data=data, command=command, console=console)
    found = findings(plan, result.summary, list(Records(out)))
    tables = [table(result.summary), *([readings_table(result.summary)] if plan.read else [])]
    tables.append(found["answer"])
    return Studied(found=found, report=result.report, tables=tables, failed=result.failed)


def findings(plan: Comparison, summary: Summary, records: list[Record]) -> dict[str, Any]:
    """The rows of the study, best first, and the answer to its question."""
    metric = summary.metric.name
    places = [f"{option}={value}" for option, values in plan.read.items() for value in values]
    done = [one for one in records if one.purpose == "compare" and one.status == "done"]
    rows = []
    for row in summary.rows:
        own = sorted((one for one in done if label(one.candidate) == row.label), key=lambda one: one.seed)
        rows.append(
            {
                "candidate": row.label,
                "params": row.params,
                "learning_rate": row.learning_rate,
                "says": plan.says.get(row.label, ""),
                "seeds": [one.seed for one in own],
                metric: [one.metrics[metric] for one in own],
                "read": {place: [one.metrics.get(reading(metric, place)) for one in own] for place in places},
                "unread": row.unread,
                "converges": [one.extra.get("converges", False) if _spoken_of(row.candidate) else None for one in own],
            }
        )
    answers = {"extrapolation": extrapolation}
    if plan.finding is None:
        answer: dict[str, Any] = {"answer": " ".join(summary.sentences())}
    else:
        answer = answers[plan.finding](plan, summary.metric.name, rows)
    return {
        "title": plan.title,
        "question": plan.question,
        "task": plan.task,
        "metric": metric,
        "steps": summary.run["training"]["steps"],
        "learning_rates": plan.learning_rates,
        "rows": rows,
        "missing": [{"candidate": one.label, "status": one.status, "reason": one.reason} for one in summary.missing],
        **answer,
        "environment": summary.environment,
    }


def extrapolation(plan: Comparison, metric: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the criterion of Qin, Zhong and Deng (2024) tells which positions read longer texts.

    `rises` are the losses at the last reading less those at the training length, seed by seed. A model reads longer
    texts when its loss rises by at most FLAT. The criterion speaks of biases set by distance: of a trained model it
    promises that if the series converges in every head. It separates them if all those promised do and no other does.
    """
    option, values = next(iter(plan.read.items()))
    for row in rows:
        far = row["read"][f"{option}={values[-1]}"]
        complete = bool(far) and None not in far
        row["rises"] = [b - a for a, b in zip(row[metric], far, strict=True)] if complete else []
    runs = [
        (rise, f"{row['candidate']}, seed {seed}", converges)
        for row in rows
        for rise, seed, converges in zip(row["rises"], row["seeds"], row["converges"], strict=False)
    ]
    promised = [one for one in runs if one[2] is True]
    denied = [one for one in runs if one[2] is False]
    if not promised or not denied:
        return {"answer": "The criterion could not be tried: it needs biases on either side."}
    kept = [one for one in promised if one[0] <= FLAT]
    surprises = [one for one in denied if one[0] <= FLAT]
    highest, lowest = max(promised), min(denied)
    others = [row for row in rows if row["rises"] and row["converges"][0] is None]
    flat = [row["candidate"] for row in others if fmean(row["rises"]) <= FLAT]
    said = [
        f"Of {len(promised)} trained models whose series converges in every head, {len(kept)} read {option} "
        f"{values[-1]} within {FLAT} nats of the training length; the largest rise is {highest[0]:+.3f} "
        f"({highest[1]}).",
        f"Of {len(denied)} whose series diverges, {len(denied) - len(surprises)} rise by more; the smallest rise is "
        f"{lowest[0]:+.3f} ({lowest[1]}).",
        "So the criterion separates them."
        if len(kept) == len(promised) and not surprises
        else "So the criterion is kept where it promises, and is no necessary one."
        if len(kept) == len(promised)
        else "So the criterion does not separate them.",
        f"Of {len(others)} positions of which it says nothing, {len(flat)} read on"
        + (f" ({', '.join(flat)})." if flat else "."),
    ]
    separates = len(kept) == len(promised) and not surprises
    return {"answer": " ".join(said), "separates": separates, "exceptions": [one[1] for one in surprises]}


def _spoken_of(candidate: Mapping[str, str]) -> bool:
    """Whether the criterion speaks of a position: its card says how its bias falls with distance."""
    name = parse_spec(candidate.get("position", "none"))["name"]
    return candidate.get("mixer") is None and name != "none" and catalog.find("position", name).kernel is not None
