"""MkDocs hook: a page for every card, the table of systems, and the compatibility table where the tests wrote one.

A page of a person's own, docs/systems/<slug>.md, comes first on the system's page; what is generated follows it.
"""

import ast
import html
import json
import math
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "src"))

from formwright import catalog  # noqa: E402
from formwright.catalog import evidence  # noqa: E402

TABLE = "<!-- table of systems -->"
COMPATIBILITY = "<!-- compatibility table -->"
STUDY = re.compile(r"<!-- study ([\w-]+) -->")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    for card in catalog.cards():
        uri = f"systems/{card.slug}.md"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=f"# {card.slug}\n"))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    del config, files
    path = Path(page.file.src_uri)
    if path.parent.as_posix() == "systems" and path.stem != "index":
        return f"{markdown.rstrip()}\n\n{system(catalog.card(path.stem))}"
    markdown = STUDY.sub(lambda found: study(found[1]), markdown)
    return markdown.replace(TABLE, table()).replace(COMPATIBILITY, compatibility())


def table() -> str:
    """Every system, one a row."""
    rows = ["| no. | system | status | kinds | provides | paper |", "| --- | --- | --- | --- | --- | --- |"]
    for card in catalog.cards():
        number = "" if card.number is None else f"{card.number:03}"
        names = ", ".join(f"`{part.key}`" for part in card.provides)
        kinds = ", ".join(card.kinds)
        link = f"[{card.slug}]({card.slug}.md)"
        rows.append(f"| {number} | {link} | {card.status} | {kinds} | {names} | {_cell(card.title)} |")
    return "\n".join(rows)


def compatibility() -> str:
    """The table that tests/conformance writes."""
    written = DOCS / "generated" / "compatibility.md"
    if written.is_file():
        return written.read_text(encoding="utf-8")
    return "The table has not been written yet: the conformance tests write it."


def study(name: str) -> str:
    """What a study found: its answer, curves and table, from evidence/studies/<name>.json."""
    path = DOCS.parent / "evidence" / "studies" / f"{name}.json"
    if not path.is_file():
        return "The study has not been run yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    if "curves" in found:
        return costs(found)
    if "approximations" in found:
        return approximations(found)
    metric, places = found["metric"], list(found["rows"][0]["read"])
    head = ["candidate", "as trained", *places, "rate", *(["converges"] if "separates" in found else [])]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in found["rows"]:
        losses = [row[metric], *(row["read"][place] for place in places)]
        cells = [f"`{row['candidate']}`", *map(_mean, losses)]
        cells.append(f"{row['learning_rate']:g}" if row["learning_rate"] else "–")
        cells += [_converging(row["converges"])] if "separates" in found else []
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(found["rows"][0]["seeds"])
    about = f"{metric} of `{found['task']}`, {found['steps']} steps, mean ± standard deviation over {seeds} seeds."
    parts = [f"**{found['answer']}**", *([_lines(found, places)] if places else [])]
    parts += [f"{about} Run on {found['environment'].get('cpu', '')}.", "\n".join(lines)]
    if places:
        said = ["| candidate | rise | what its paper says |", "| --- | --- | --- |"]
        for row in found["rows"]:
            rise = f"{fmean(row['rises']):+.3f}" if row.get("rises") else "–"
            said.append(f"| `{row['candidate']}` | {rise} | {_cell(row['says'])} |")
        parts += ["Beside what each paper says, the rise from the training length to the last:", "\n".join(said)]
    return "\n\n".join(parts)


def _converging(seeds: list[bool | None]) -> str:
    """Of the series of a bias, over the seeds; a dash where the criterion says nothing."""
    return "–" if None in seeds else "yes" if all(seeds) else "in some seeds" if any(seeds) else "no"


def costs(found: dict[str, Any]) -> str:
    """The tables of a cost study."""
    lengths = found["lengths"]
    head = ["mixer", *(f"{n:,}" for n in lengths), "grows as N^", "faster from", "MB at the longest"]
    parts = [f"{found['about']} Run on {found['environment'].get('cpu', '')}. Seconds of processor time."]
    for group in dict.fromkeys((curve["phase"], curve["dtype"]) for curve in found["curves"]):
        lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for curve in found["curves"]:
            if (curve["phase"], curve["dtype"]) != group:
                continue
            points = {point["tokens"]: point for point in curve["points"]}
            cells = [f"`{curve['mixer']}`", *(f"{points[n]['cpu']:.2g}" if n in points else "–" for n in lengths)]
            cells += [f"{curve[name]:{form}}" if curve[name] else "–" for name, form in FIGURES]
            cells.append(f"{curve['points'][-1]['memory'] / 1e6:,.0f}" if curve["points"] else "–")
            lines.append(f"| {' | '.join(cells)} |")
        parts += [f"### {group[0].capitalize()}, {group[1]}", "\n".join(lines)]
    return "\n\n".join(parts)


def approximations(found: dict[str, Any]) -> str:
    """The tables of a study of approximations: errors by budget, and by the entropy of the exact weights."""
    budgets = found["budgets"]
    shares = [f"1/{1 / budget:.3g}" if budget < 1 else f"{budget:g}" for budget in budgets]
    parts = [f"**{found['answer']}**", f"{found['about']} Run on {found['environment'].get('cpu', '')}."]
    for model in dict.fromkeys(curve["model"] for curve in found["approximations"]):
        own = [curve for curve in found["approximations"] if curve["model"] == model]
        served = [curve for curve in own if any(curve["points"])]
        head = ["method", *shares, "focused, between, spread queries", "at", "setting"]
        lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
        for curve in served:
            cells = ["–" if point is None else f"{point['error']:.3f}" for point in curve["points"]]
            place = max((i for i, point in enumerate(curve["points"]) if point and budgets[i] <= 0.25), default=None)
            shown = curve["points"][place] if place is not None else None
            thirds = ", ".join(f"{error:.2f}" for error in shown["thirds"]) if shown else "–"
            setting = f"`{shown['spec']}`" if shown else "–"
            at = shares[place] if place is not None else "–"
            row = [f"`{curve['method']}`", *cells, thirds, at, setting]
            lines.append(f"| {' | '.join(row)} |")
        parts += [f"### {model}", "\n".join(lines)]
        refused = {curve["method"]: curve["why"] for curve in own if not any(curve["points"])}
        if refused:
            parts.append("Not served: " + " ".join(f"`{method}`: {_cell(why)}" for method, why in refused.items()))
    return "\n\n".join(parts)


FIGURES = (("exponent", ".2f"), ("break_even", ",.0f"))


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    return f"{fmean(known):.3f} ± {stdev(known):.3f}" if len(known) > 1 else f"{known[0]:.3f}"


def _lines(found: dict[str, Any], places: list[str]) -> str:
    """Curves over the readings as SVG, a line's name in its title; what rises out of the picture is cut."""
    metric, wide, tall, left, top = found["metric"], 640, 360, 48, 12
    numbers = [float(place.partition("=")[2]) for place in places]
    own = float(re.search(rf"{places[0].partition('=')[0]}=(\d+)", found["task"])[1])  # type: ignore[index]
    ticks = [own, *numbers]
    curves = [
        (row, [fmean(row[metric]), *(fmean(row["read"][place]) for place in places)])
        for row in found["rows"]
        if all(None not in row["read"][place] for place in places)
    ]
    low = min(min(values) for _, values in curves)
    high = low + min(max(max(values) for _, values in curves) - low, 1.5)

    def x(value: float) -> float:
        return left + (wide - left - 150) * math.log(value / own) / math.log(ticks[-1] / own)

    def y(value: float) -> float:
        return top + (tall - 2 * top - 20) * (high - min(value, high)) / (high - low)

    drawn = []
    for tick in ticks:
        drawn.append(f'<text x="{x(tick):.0f}" y="{tall - 4}" text-anchor="middle" font-size="11">{tick:g}</text>')
    for i in range(5):
        value = low + (high - low) * i / 4
        drawn.append(f'<line x1="{left}" x2="{wide - 150}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#8884"/>')
        drawn.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end" font-size="11">{value:.2f}</text>')
    place = -math.inf
    for row, values in sorted(curves, key=lambda one: y(one[1][-1])):
        colour = "#8a8a8a" if None in (seeds := row.get("converges", [])) else "#2a7f9e" if all(seeds) else "#c2602d"
        points = " ".join(f"{x(tick):.1f},{y(value):.1f}" for tick, value in zip(ticks, values, strict=True))
        name = html.escape(row["candidate"])
        place = max(y(values[-1]), place + 11)
        drawn.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5">'
            f"<title>{name}</title></polyline>"
            f'<text x="{wide - 144}" y="{place + 3:.1f}" font-size="10" fill="{colour}">{name}</text>'
        )
    bottom = max(tall, int(place) + 16)
    shape = f'viewBox="0 0 {wide} {bottom}" style="max-width:100%;color:inherit" fill="currentColor" role="img"'
    return f"<div><svg {shape}>{''.join(drawn)}</svg></div>"


def system(card: catalog.Card) -> str:
    """What the card, the source and the evidence say of a system."""
    return "\n\n".join([_facts(card), *map(_part, card.provides), *_source(card), *_claim(card)]) + "\n"


def _facts(card: catalog.Card) -> str:
    rows = {
        "Paper": _cell(card.title) + (f" ({card.year})" if card.year else ""),
        "arXiv": f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else "",
        "Official code": f"[{card.code}](https://github.com/{card.code})" if card.code else "",
        "Number": f"{card.number:03}" if card.number is not None else "baseline",
        "Kinds": ", ".join(card.kinds),
        "Tags": ", ".join(card.tags),
        "Status": card.status,
    }
    table = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items() if value)]
    return "\n".join(["## Paper", "", *table])


def _part(part: catalog.Provided) -> str:
    lines = [f"## {part.key}", f"`{part.target}`"]
    if part.slot in COMPARED:
        slot = COMPARED[part.slot]
        lines.append(f"```\nformwright compare --task digits --vary {slot}={part.name} --out runs/try\n```")
    if part.capabilities:
        lines.append(f"Serves {', '.join(part.capabilities)}. Asked for anything else, it raises.")
    if part.time is not None and part.memory is not None:
        lines.append(f"FLOPs grow as N^{part.time:g} with the number of tokens, peak memory as N^{part.memory:g}.")
    options = part.options()
    if options:
        lines.append("Options: " + ", ".join(f"`{option}`" for option in options) + ".")
    return "\n\n".join(lines)


COMPARED = {"attention": "mixer"} | {
    slot: slot for slot in ("mixer", "position", "feedforward", "norm", "block", "init")
}


def _source(card: catalog.Card) -> list[str]:
    """The head of each module the card points to: paper, idea, equations, differences."""
    found = []
    for module in dict.fromkeys(part.module for part in card.provides):
        path = evidence.source(module)
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else None
        if docstring:
            found.append(f"## In the source: {module.rpartition('.')[2]}\n\n```text\n{docstring}\n```")
    return found


def _claim(card: catalog.Card) -> list[str]:
    lines = []
    if card.claim is not None:
        lines += ["## The paper's claim", card.claim.text]
        if card.claim.paper:
            lines.append(f"In the paper: {card.claim.paper}.")
    recorded = evidence.claims(card.slug)
    if recorded:
        lines.append("## What we measured")
        lines += [_evidence(claim) for claim in recorded]
        lines.append(f"```\nformwright reproduce {card.slug} --scale full\n```")
    elif card.claim is not None:
        lines.append("This claim has not been re-checked here yet.")
    return lines


def _evidence(claim: dict[str, Any]) -> str:
    rows = ["| | mean | std |", "| --- | --- | --- |"]
    for kind in ("measured", "baseline"):
        for name, values in claim.get(kind, {}).items():
            label = name if kind == "measured" else f"{name} (baseline)"
            rows.append(f"| {_cell(label)} | {values['mean']:.4g} | {values['std']:.2g} |")
    seeds = len(claim.get("seeds", ()))
    verdict = f"Verdict: **{claim['verdict']}** ({seeds} seeds, {claim['scale']} scale)."
    rule = f"Rule, fixed before the run:\n\n```text\n{claim['rule']}\n```" if claim.get("rule") else ""
    return "\n\n".join(filter(None, [claim.get("statement", ""), verdict, "\n".join(rows), rule]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
