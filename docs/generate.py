"""MkDocs hook: a page for every card, the table of systems, and the compatibility table where the tests wrote one.

A page of a person's own, docs/systems/<slug>.md, comes first on the system's page; what is generated follows it.
"""

import ast
import sys
from pathlib import Path
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
