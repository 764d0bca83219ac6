"""The report: everything is in it, nothing in it is believed, and a browser without network draws it."""

import html.parser
import importlib.util
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from formwright.bench import records, summary
from formwright.bench.report import report
from formwright.bench.summary import summarize, table
from formwright.errors import FormwrightError

pytest.importorskip("plotly")
_spec = importlib.util.spec_from_file_location("runs", Path(__file__).parent / "runs.py")
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

HOSTILE = '<script>alert("x")</script>&amp;'


class Page(html.parser.HTMLParser):
    """The words, and the attributes that could load or run something."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.facts, self.loads, self._open = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.facts.append((tag, dict(attrs)))
        self._open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "onclick", "onload", "onerror")]

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.words.append(data)


def page(folder):
    text = report(folder).read_text(encoding="utf-8")
    return text, Page(text)


def test_every_candidate_and_every_number_is_there(tmp_path):
    _, found = page(runs.make(tmp_path))
    words = " ".join(found.words)
    for said in ("softmax", "aft", "mamba", "learned", "rope", "baseline", "reads left to right", "majority", "100 k"):
        assert said in words
    assert "It computes no <scores>." in words
    assert "The loss is nan in step 3." in words
    assert "With 2 seeds only gross effects show" in words


def test_it_loads_nothing_and_embeds_plotly_once(tmp_path):
    text, found = page(runs.make(tmp_path))
    assert found.loads == []
    assert found.tags.count("link") == 0
    assert len(re.findall(r"\* plotly\.js v", text)) == 1
    assert "@import" not in text.split("</style>")[0]


def test_names_are_shown_and_never_run(tmp_path):
    text, found = page(runs.make(tmp_path, task="digits" + HOSTILE, hostile=HOSTILE))
    plain, _ = page(runs.make(tmp_path / "plain"))
    assert found.tags.count("script") == Page(plain).tags.count("script")
    assert 'alert("x")</script>' not in text
    assert any("digits" + HOSTILE in words for words in found.words)


def test_tables_and_drawings_say_what_they_are_to_who_cannot_see_them(tmp_path):
    _, found = page(runs.make(tmp_path))
    assert all("scope" in facts for tag, facts in found.facts if tag == "th")
    drawn = [facts for tag, facts in found.facts if tag in ("figure", "svg")]
    assert len(drawn) > 10
    assert all(facts.get("aria-label") or facts.get("aria-hidden") == "true" for facts in drawn)


def test_rows_go_from_best_to_worst_and_the_baseline_is_marked(tmp_path):
    found = summarize(runs.make(tmp_path))
    means = [row.result.mean for row in found.rows]
    assert means == sorted(means, reverse=True)
    assert [row.label for row in found.rows if row.baseline] == ["softmax · learned"]


def test_every_other_row_is_tested_against_the_baseline(tmp_path):
    for row in summarize(runs.make(tmp_path)).rows:
        tested = row.result.p is not None or len(row.seeds) == 1
        assert tested != row.baseline
        assert (row.result.p_items is not None) != row.baseline


def test_a_worse_metric_is_worse_when_lower_is_better(tmp_path):
    run = records.read_run(runs.make(tmp_path))
    records.write_run(tmp_path, {**run, "metric": {"name": "loss", "higher_is_better": False}})
    means = [row.result.mean for row in summarize(tmp_path).rows]
    assert means == sorted(means)


def test_one_seed_is_said_to_prove_nothing(tmp_path):
    assert any("One seed says nothing" in one for one in summarize(runs.make(tmp_path, seeds=(0,))).sentences())


def test_unfinished_trials_are_counted(tmp_path):
    folder = runs.make(tmp_path)
    run = records.read_run(folder)
    records.write_run(folder, {**run, "seeds": [0, 1, 2]})
    found = summarize(folder)
    assert found.planned > found.finished
    assert any("have not run yet" in one for one in found.sentences())


def test_a_run_without_any_result_has_a_report(tmp_path):
    folder = runs.make(tmp_path)
    (folder / records.RECORDS).unlink()
    _, found = page(folder)
    assert "No trial on digits has finished." in " ".join(found.words)


def test_the_table_in_the_terminal_has_the_same_rows(tmp_path):
    found = summarize(runs.make(tmp_path))
    assert table(found).row_count == len(found.rows) + len(found.trivial)


@pytest.mark.parametrize(("value", "shown"), [(999, "999 "), (104_330, "104 k"), (4.1e7, "41 M"), (None, "–")])
def test_sizes_have_three_digits_and_a_prefix(value, shown):
    assert summary.si(value) == shown


def test_a_trial_that_was_done_at_another_rate_after_it_failed_is_done(tmp_path):
    found = summarize(runs.make(tmp_path))
    [failed] = [one for one in found.missing if one.status == "failed"]
    broke = next(one for one in records.Records(tmp_path) if one.status == "failed")
    with records.Records(tmp_path, write=True) as log:
        log.append(replace(broke, key="another rate", status="done", metrics={"accuracy": 0.8}, error=None))
    again = summarize(tmp_path)
    assert [one for one in again.missing if one.status == "failed"] == []
    assert next(row.seeds for row in again.rows if row.label == failed.label) == (0, 1)
    assert again.finished == found.finished


@pytest.mark.parametrize("gone", ["task", "metric", "baseline", "candidates"])
def test_a_run_description_that_lacks_something_is_a_sentence(tmp_path, gone):
    run = records.read_run(runs.make(tmp_path))
    records.write_run(tmp_path, {name: value for name, value in run.items() if name != gone})
    with pytest.raises(FormwrightError, match=f"run.json has no {gone}"):
        summarize(tmp_path)


def test_two_seeds_are_called_few_even_where_no_difference_scatters(tmp_path):
    folder = runs.make(tmp_path)
    with records.Records(folder, write=True) as log:
        for one in [one for one in log if one.status == "done"]:
            log.append(replace(one, metrics={"accuracy": 0.8}))
    assert any("Two seeds show gross effects only" in said for said in summarize(folder).sentences())


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FormwrightError, match=r"holds no comparison \(no run.json\)"):
        report(tmp_path)


@pytest.mark.slow
def test_a_browser_draws_the_plots_and_the_table(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("No Chromium here: install it to see whether the report draws itself.")
    path = report(runs.make(tmp_path / "run", hostile=HOSTILE))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--virtual-time-budget=10000", "--window-size=1280,2400", "--dump-dom"]
    drawn = subprocess.run([browser, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    dom = drawn.stdout
    assert len(set(re.findall(r'id="(plot-\w+)"', dom))) == 5
    assert len(re.findall(r'<svg class="main-svg"', dom)) >= 5
    assert dom.count("scatterlayer") >= 5
    body = dom.split('<table id="results">')[1].split("</table>")[0]
    assert len(re.findall(r"<tr\b", body)) == 1 + 5 + 1
    assert body.count('<svg class="dots"') == 5
