"""The report of a compression: what was chosen, every recipe that was tried, and quality against cost."""

from pathlib import Path
from typing import Any

from formwright.bench.page import COLOURS, INK, document, figure, layout, text
from formwright.bench.records import Record, Records, read_run
from formwright.bench.statistics import pareto
from formwright.errors import FormwrightError

COSTS = {
    "latency": "time on the user's batches, share of the original's",
    "size": "bytes on disk, share of the original's",
    "params": "numbers stored, share of the original's",
}


def report(folder: str | Path) -> Path:
    """Write report.html into the folder of a compression.

    Raises:
        FormwrightError: the folder holds none, or Plotly is not installed.
    """
    run = read_run(folder)
    if run is None or "original" not in run:
        raise FormwrightError(f"{folder} holds no compression: give the folder that was --out.")
    records = sorted(Records(folder), key=lambda one: one.extra.get("latency") or float("inf"))
    path = Path(folder) / "report.html"
    path.write_text(render(run, records), encoding="utf-8")
    return path


def render(run: dict[str, Any], records: list[Record]) -> str:
    """The page as text."""
    settings, result = run["settings"], run.get("result", {})
    title = f"{Path(settings['model']).name} for {settings['kind'].replace('-', ' ')}, compressed"
    done = [one for one in records if one.status == "done"]
    body = [
        f'<p class="kicker">Formwright compression · {text(run.get("created", ""))}</p>',
        f"<h1>{text(title)}</h1>",
        f'<p class="lead">{text(" ".join(result.get("sentences", ["The search has not ended yet."])))}</p>',
        _facts(run, records),
        _table(run, done),
        _plots(run, done),
        _left_out([one for one in records if one.status != "done"]),
        _method(run),
        _again(run),
    ]
    return document(title, body)


def _facts(run: dict[str, Any], records: list[Record]) -> str:
    settings, original, where = run["settings"], run["original"], run.get("environment", {})
    facts = {
        "Recipes tried": len(records),
        "Judged on": f"{run['judged']['rows']:,} of {run['judged']['of']:,} validation rows",
        "Allowed loss": f"{settings['max_drop']:g}",
        "Target": f"{settings['target']['cost']} {settings['target']['ratio']:g}",
        "Original": f"{run['metric']['name']} {original['quality']:.4f}",
        "Parameters": f"{original['params'] / 1e6:.1f} M",
        "On disk": f"{original['size'] / 1e6:.0f} MB",
        "Processor": where.get("cpu", "–"),
        "Threads": where.get("threads", "–"),
    }
    filled = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{filled}</dl>'


def _table(run: dict[str, Any], done: list[Record]) -> str:
    metric, allowed = run["metric"]["name"], run["settings"]["max_drop"]
    heads = ("recipe", metric, "loss", "speed", "time", "size", "numbers", "what the steps did")
    head = "".join(
        f'<th scope="col" class="{"text" if name in ("recipe", heads[-1]) else ""}">{text(name)}</th>' for name in heads
    )
    original = run["original"]
    lines = [
        f'<tr class="baseline"><td class="text">original</td><td>{original["quality"]:.4f}</td><td></td><td>1.00 ×</td>'
        "<td>1.00</td><td>1.00</td><td>1.00</td><td></td></tr>"
    ]
    for one in done:
        drop, spent = one.metrics["drop"], one.extra
        says = "; ".join(change["says"] for change in spent["changes"])
        loss = _number(drop, "+.4f") + ("" if spent["error"] is None else f" ± {spent['error']:.4f}")
        side = "worse" if drop is None or drop > allowed else "better"
        slower = ' <span class="tag">slower</span>' if spent["latency"] > 1 else ""
        lines.append(
            f'<tr><td class="text">{text(one.candidate["recipe"])}{slower}</td><td>{_number(one.metrics[metric])}</td>'
            f'<td class="{side}">{loss}</td><td>{1 / spent["latency"]:.2f} ×</td>'
            f"<td>{spent['latency']:.2f}</td><td>{spent['size']:.2f}</td><td>{spent['params']:.2f}</td>"
            f'<td class="text reason">{text(says)}</td></tr>'
        )
    note = (
        "Quality on validation rows. Time, size and numbers as shares of the original's; time on batches of the user's "
        "rows, both models in turns. The loss is given with its standard error, and is green within what is allowed."
    )
    return (
        f'<section><h2>Recipes</h2><div class="scroll"><table id="results"><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">{note}</p></section>'
    )


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _plots(run: dict[str, Any], done: list[Record]) -> str:
    metric = run["metric"]
    higher = metric["better"] == "higher"
    shown = [one for one in done if one.metrics[metric["name"]] is not None]
    if not shown:
        return ""
    figures = []
    for cost, title in COSTS.items():
        points = [(1.0, run["original"]["quality"])]
        points += [(one.extra[cost], one.metrics[metric["name"]]) for one in shown]
        names = ["original", *(one.candidate["recipe"] for one in shown)]
        front = pareto(points, higher_is_better=higher)
        traces: list[dict[str, Any]] = [
            {
                "type": "scatter", "mode": "lines", "hoverinfo": "skip",
                "x": [points[i][0] for i in front], "y": [points[i][1] for i in front],
                "line": {"color": "#a9a79f", "width": 1.5, "shape": "hv"},
            },
            {
                "type": "scatter", "mode": "markers", "x": [x for x, _ in points], "y": [y for _, y in points],
                "text": [text(name) for name in names], "hovertemplate": "%{text}<br>%{x:.2f}, %{y:.4f}<extra></extra>",
                "marker": {"size": 10, "color": [INK, *[COLOURS[0]] * len(shown)]},
            },
        ]  # fmt: skip
        figures.append(figure(traces, layout(title, metric["name"]), f"plot-{cost}"))
    note = "The grey line joins what nothing else beats in both quality and cost; the dark point is the original."
    return (
        f'<section><h2>Quality against cost</h2><p class="note">{note}</p>'
        f'<div class="plots">{"".join(figures)}</div></section>'
    )


def _left_out(others: list[Record]) -> str:
    if not others:
        return ""
    lines = "".join(
        f'<tr><td class="text">{text(one.candidate["recipe"])}</td><td class="text reason">{text(one.error)}</td></tr>'
        for one in others
    )
    head = '<th scope="col" class="text">recipe</th><th scope="col" class="text">why</th>'
    return (
        f'<section><h2>Without a result</h2><div class="scroll"><table id="missing"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></section>"
    )


def _method(run: dict[str, Any]) -> str:
    test = run.get("result", {}).get("test")
    judged = run["judged"]
    rows = f"the {judged['rows']:,} validation rows"
    if judged["rows"] < judged["of"]:
        rows = (
            f"the same {judged['rows']:,} of {judged['of']:,} validation rows (enough to tell the allowed loss to "
            "about a third; drawn once, every class by its share)"
        )
    said = [
        f"Every recipe was applied to a fresh copy of the original and judged on {rows}; the chosen one was then read "
        "once on the test rows, which no trial had seen, and timed once more.",
        "Time is the median over rounds in which original and candidate took turns on the same batches.",
    ]
    if test:
        said.append(
            f"Test rows: {run['metric']['name']} {test['chosen']:.4f} against the original's {test['original']:.4f}."
        )
    return (
        "<section><h2>How it was tested</h2>"
        + "".join(f'<p class="small">{text(one)}</p>' for one in said)
        + "</section>"
    )


def _again(run: dict[str, Any]) -> str:
    where = run.get("environment", {})
    facts = ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in where.items() if value
    )
    return (
        f"<section><h2>Run it again</h2><pre>{text(run.get('command', ''))}</pre>"
        f'<p class="small">{text(facts)}. Every trial is a line of records.jsonl beside this file.</p></section>'
    )
