"""The documentation builds without a warning, has a page for every card, and its examples are true."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from formwright import catalog
from formwright.catalog import evidence
from formwright.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

pytest.importorskip("mkdocs", reason='The documentation is built by mkdocs: pip install "formwright[docs]".')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def generate():
    specification = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_card_has_a_page_with_its_title_and_status(site):
    for card in catalog.cards():
        page = (site / "systems" / card.slug / "index.html").read_text(encoding="utf-8")
        assert f"<td>{card.status}</td>" in page
        assert (card.arxiv or "") in page


def test_no_page_loads_anything_from_the_network(site):
    for path in (site / "index.html", site / "systems" / "mamba" / "index.html"):
        page = path.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', page)
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(?:https?:)?//', page)


def test_a_page_shows_evidence_with_its_verdict(generate, monkeypatch):
    claim = {
        "statement": "Less is more.",
        "measured": {"ours": {"mean": 1.25, "std": 0.5, "values": [0.75, 1.75]}},
        "baseline": {"theirs": {"mean": 2.0, "std": 0.0, "values": [2.0, 2.0]}},
        "rule": "holds  ours < theirs",
        "verdict": "holds in direction",
        "seeds": [0, 1],
        "scale": "full",
    }
    monkeypatch.setattr(evidence, "claims", lambda slug: [claim] if slug == "mamba" else [])
    page = generate.system(catalog.card("mamba"))
    for expected in (
        "**holds in direction** (2 seeds, full scale)",
        "| ours | 1.25 | 0.5 |",
        "| theirs (baseline) | 2 |",
    ):
        assert expected in page
    assert "has not been re-checked" not in page
    assert "has not been re-checked" in generate.system(catalog.card("fire"))


def test_the_compare_command_of_a_page_is_one_that_compare_takes(generate):
    from formwright.bench.compare import _values

    shown = re.findall(r"--vary (\S+)=(\S+)", "".join(map(generate.system, catalog.cards())))
    assert {"mixer", "position", "init"} <= {slot for slot, _ in shown}
    assert {"softmax", "mamba"} <= {name for _, name in shown}
    for slot, name in shown:
        assert _values(slot, [name]) == [name]


def test_the_compatibility_page_takes_what_the_suite_wrote(generate, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    assert "not been written yet" in generate.compatibility()
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated" / "compatibility.md").write_text("| rope | aft |")
    assert generate.compatibility() == "| rope | aft |"


def shown_commands(*commands):
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.partition("#")[0].removeprefix("$ ").split()
            if words[:1] == ["formwright"] and len(words) > 1 and words[1] in commands:
                yield " ".join(words[1:])


@pytest.mark.parametrize("words", sorted(set(shown_commands("list", "show"))))
def test_the_list_and_show_commands_of_the_docs_run(words):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == (2 if "roformr" in words else 0), result.output


def test_the_error_in_the_docs_is_the_error():
    shown = re.search(r"^\$ formwright (show roformr)\n(.*)$", (DOCS / "catalogue.md").read_text(), re.MULTILINE)
    assert CliRunner().invoke(app, shown[1].split()).stderr == f"{shown[2]}\n"


def test_the_card_of_the_docs_is_a_card(tmp_path):
    [shown] = re.findall(r"```toml\n(.*?)```", (DOCS / "adding.md").read_text(), re.S)
    path = tmp_path / "roformer.toml"
    path.write_text(shown)
    ours, real = catalog.read_card(path), catalog.card("roformer")
    assert (ours.title, ours.arxiv, ours.provides[0].target) == (real.title, real.arxiv, real.provides[0].target)
