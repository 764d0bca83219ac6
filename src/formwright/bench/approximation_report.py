"""What a study of approximations found, as tables of the terminal and as report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formwright.bench.approximation import THIRDS, Curve, share
from formwright.bench.page import COLOURS, document, figure, layout, text

DASHES = ("solid", "dot", "dash")


def models(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The curves by model."""
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.model, []).append(curve)
    return found


def cells(curve: Curve) -> list[str]:
    return ["–" if one is None else f"{one.error:.3f}" for one in curve.points]


def tables(curves: Sequence[Curve], budgets: Sequence[float]) -> list[Any]:
    """One model a Rich table: the error at every budget."""
    from rich.table import Table

    shown = []
    for model, own in models(curves).items():
        one = Table(title=model, box=None, pad_edge=False, title_justify="left", title_style="bold")
        one.add_column("method", overflow="fold")
        for budget in budgets:
            one.add_column(share(budget), justify="right", no_wrap=True)
        for curve in own:
            one.add_row(curve.method, *cells(curve))
        shown.append(one)
    return shown


def write(
    folder: Path,
    title: str,
    lead: str,
    answer: str,
    curves: Sequence[Curve],
    budgets: Sequence[float],
    command: str | None,
) -> Path:
    """report.html of a run's folder, with the command that made it where it is known.

    Raises:
        FormwrightError: Plotly is not installed.
    """
    names = sorted({curve.method for curve in curves})
    body = [f"<h1>{text(title)}</h1>", f'<p class="lead">{text(lead)}</p>', f"<p>{text(answer)}</p>"]
    for model, own in models(curves).items():
        axes = layout("FLOPs as a share of exact attention", "relative error", height=460)
        axes["xaxis"] |= {"type": "log", "tickvals": list(budgets), "ticktext": [share(one) for one in budgets]}
        axes["yaxis"] |= {"type": "log"}
        traces = [_trace(curve, names) for curve in own if any(curve.points)]
        body.append(
            f"<section><h2>{text(model)}</h2>{figure(traces, axes, f'plot-{model}')}{_table(own, budgets)}</section>"
        )
    if command is not None:
        body.append(f"<section><h2>Run it again</h2><pre>{text(command)}</pre></section>")
    path = folder / "report.html"
    path.write_text(document(title, body), encoding="utf-8")
    return path


def _table(curves: Sequence[Curve], budgets: Sequence[float]) -> str:
    """The error at every budget, and at the last one met within the thirds of the queries and the setting."""
    names = [*(share(one) for one in budgets), *(f"{third} queries" for third in THIRDS)]
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    lines = []
    for curve in curves:
        last = next((one for one in reversed(curve.points) if one is not None), None)
        thirds = ["–"] * len(THIRDS) if last is None else [f"{one:.3f}" for one in last.thirds]
        numbers = "".join(f"<td>{text(cell)}</td>" for cell in [*cells(curve), *thirds])
        note = curve.why if last is None else last.spec
        lines.append(
            f'<tr><td class="text">{text(curve.method)}</td>{numbers}<td class="text reason">{text(note)}</td></tr>'
        )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col" class="text">method</th>{head}'
        f'<th scope="col" class="text">setting at the largest budget, or why none</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _trace(curve: Curve, names: Sequence[str]) -> dict[str, Any]:
    place, known = names.index(curve.method), [one for one in curve.points if one is not None]
    return {
        "type": "scatter", "mode": "lines+markers+text", "x": [one.flops for one in known],
        "y": [one.error for one in known], "text": ["", *[""] * (len(known) - 2), curve.method][-len(known):],
        "textposition": "middle right", "marker": {"size": 5},
        "line": {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place // len(COLOURS) % len(DASHES)]},
        "hovertemplate": f"{text(curve.method)}<br>%{{x:.3f}} of the FLOPs: %{{y:.3f}}<extra></extra>",
    }  # fmt: skip
