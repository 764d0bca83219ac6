"""Cards: what is read, what is refused, and the status that is computed from what exists."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from formwright import catalog
from formwright.catalog import evidence, lookup
from formwright.errors import FormwrightError

GOOD = """
slug = "sample"
number = 7
title = "A Sample"
year = 2021
arxiv = "2104.09864"
code = "someone/sample"
kinds = ["position", "block"]
tags = ["rotary"]
room = "parts/position"

[provides."position/sample"]
target = "formwright.parts.position.sample:Sample"
capabilities = ["causal", "cache"]
time = 1.0
memory = 2

[claim]
text = "It is better."
paper = "Table 1"
"""


def write(folder, text, name="sample"):
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_card_says_what_the_file_says(tmp_path):
    card = catalog.read_card(write(tmp_path, GOOD))
    assert card == catalog.Card(
        slug="sample",
        number=7,
        title="A Sample",
        year=2021,
        arxiv="2104.09864",
        code="someone/sample",
        kinds=("position", "block"),
        tags=("rotary",),
        room="parts/position",
        provides=(
            catalog.Provided(
                slot="position",
                name="sample",
                target="formwright.parts.position.sample:Sample",
                slug="sample",
                capabilities=("causal", "cache"),
                time=1.0,
                memory=2.0,
            ),
        ),
        claim=catalog.Claim(text="It is better.", paper="Table 1"),
    )
    assert card.provides[0].key == "position/sample"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('title = "A Sample"', "", "has no title"),
        ('title = "A Sample"', 'title = ""', "empty title"),
        ('kinds = ["position", "block"]', "kinds = []", "no kinds"),
        ('"block"]', '"blok"]', "unknown kind 'blok'; choose from block"),
        ("year = 2021", "yaer = 2021", "unknown key 'yaer'; choose from year"),
        ("year = 2021", 'year = "2021"', "year is a str, but it should be a int"),
        ("number = 7", "number = true", "number is a bool"),
        ('slug = "sample"', 'slug = "other"', "has the slug 'other'"),
        ('arxiv = "2104.09864"', 'arxiv = "arXiv:2104"', "arxiv = 'arXiv:2104'"),
        ('code = "someone/sample"', 'code = "https://example.org"', "should look like 'owner/repository'"),
        ('"cache"]', '"cahce"]', "unknown position/sample: capability 'cahce'; choose from cache"),
        ("memory = 2", "memroy = 2", "position/sample: unknown key 'memroy'; choose from memory"),
        (':Sample"', '"', 'position/sample needs target = "formwright.module:Attribute"'),
        ('"position/sample"', '"Position"', "a provided part is a table named"),
        ('text = "It is better."', "", "a claim without text"),
        ("[claim]", "[claim", "is not valid TOML"),
    ],
)
def test_a_faulty_card_is_refused_by_a_sentence_that_names_the_file(tmp_path, old, new, says):
    assert GOOD.count(old) == 1
    with pytest.raises(FormwrightError, match=r"^Card sample\.toml: .*\.$") as refusal:
        catalog.read_card(write(tmp_path, GOOD.replace(old, new)))
    assert says in str(refusal.value)


def test_every_card_of_the_catalog_reads_and_the_119_are_complete():
    numbered = [card for card in catalog.cards() if card.number is not None]
    assert [card.number for card in numbered] == list(range(1, 120))
    for card in numbered:
        assert card.arxiv is not None
        assert card.year is not None
        assert card.room is not None
        assert card.claim is not None or "survey" in card.kinds


@pytest.fixture
def systems(tmp_path, monkeypatch):
    """A catalog of its own: write cards to the folder, then read."""
    monkeypatch.setattr(lookup, "SYSTEMS", tmp_path)
    lookup.cards.cache_clear()
    yield tmp_path
    lookup.cards.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "both"), [("number = 7\n", "", "position/sample"), ("position/sample", "position/b", "number 7")]
)
def test_two_cards_cannot_share_a_name_or_a_number(systems, old, new, both):
    write(systems, GOOD)
    write(systems, GOOD.replace('slug = "sample"', 'slug = "twin"').replace(old, new), "twin")
    with pytest.raises(FormwrightError, match=rf"sample\.toml and twin\.toml both have {both}"):
        catalog.cards()


def test_a_name_two_slots_share_must_be_written_whole(systems):
    write(systems, GOOD)
    write(
        systems, GOOD.replace('slug = "sample"', 'slug = "a"').replace("position/", "mixer/").replace("= 7", "= 8"), "a"
    )
    assert catalog.card("sample").slug == "sample"  # a slug wins over a part's name
    write(systems, GOOD.replace("position/sample", "position/x"))
    write(
        systems,
        GOOD.replace('slug = "sample"', 'slug = "a"').replace("position/sample", "mixer/x").replace("= 7", "= 8"),
        "a",
    )
    lookup.cards.cache_clear()
    with pytest.raises(FormwrightError, match=r"mixer/x \(a\) and position/x \(sample\)|position/x .* and mixer/x"):
        catalog.card("x")
    assert catalog.card("mixer/x").slug == "a"


def test_find_names_the_valid_names_nearest_first():
    assert catalog.find("position", "rope").slug == "roformer"
    with pytest.raises(FormwrightError, match=r"No position is called 'roep'; the positions are rope, "):
        catalog.find("position", "roep")
    with pytest.raises(FormwrightError, match=r"No slot is called 'postion'; the slots are position, "):
        catalog.find("postion", "rope")


def test_provided_of_a_slot_is_that_slot_alone():
    everything = catalog.provided()
    for slot in catalog.slots():
        assert catalog.provided(slot) == tuple(part for part in everything if part.slot == slot) != ()


def test_resolve_imports_and_says_what_is_missing():
    assert catalog.resolve("formwright.catalog:card") is catalog.card
    with pytest.raises(FormwrightError, match=r"no module formwright\.nothing"):
        catalog.resolve("formwright.nothing:Part")
    with pytest.raises(FormwrightError, match=r"formwright\.catalog has no Part"):
        catalog.resolve("formwright.catalog:Part")


def test_a_module_missing_inside_a_target_is_not_called_unbuilt(tmp_path, monkeypatch):
    (tmp_path / "broken_target.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        catalog.resolve("broken_target:Part")


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty checkout with one card, whose part, test and evidence the test adds."""
    package = tmp_path / "src" / "formwright"
    (package / "parts" / "position").mkdir(parents=True)
    (tmp_path / "tests" / "parts").mkdir(parents=True)
    (tmp_path / "evidence").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(evidence, "PACKAGE", package)
    evidence._reference_tested.cache_clear()
    yield tmp_path
    evidence._reference_tested.cache_clear()


PART = "src/formwright/parts/position/sample.py"
TEST = "tests/parts/test_sample.py"
MARKED = "import pytest\n\n@pytest.mark.reference\ndef test_twin(): ...\n"
FULL = json.dumps({"claims": [{"scale": "full", "verdict": "holds"}]})
SMOKE = json.dumps({"claims": [{"scale": "smoke", "verdict": "holds"}]})


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({}, "planned"),
        ({PART: "class Other: ...\n"}, "planned"),
        ({PART: "# class Sample\n"}, "planned"),
        ({PART: "class Samples: ...\n"}, "planned"),
        ({TEST: MARKED, "evidence/sample.json": FULL}, "planned"),
        ({PART: "class Sample:\n    ...\n"}, "built"),
        ({PART: "def Sample(): ...\n"}, "built"),
        ({PART: "Sample = int\n"}, "built"),
        ({PART: "from formwright.parts import Sample\n"}, "built"),
        ({"src/formwright/parts/position/sample/__init__.py": "class Sample: ...\n"}, "built"),
        ({PART: "class Sample: ...\n", TEST: "def test_twin(): ...\n"}, "built"),
        ({PART: "class Sample: ...\n", TEST: MARKED}, "matched"),
        ({PART: "class Sample: ...\n", TEST: "pytestmark = pytest.mark.reference\n"}, "matched"),
        ({PART: "class Sample: ...\n", "evidence/sample.json": SMOKE}, "built"),
        ({PART: "class Sample: ...\n", TEST: MARKED, "evidence/sample.json": FULL}, "proven"),
    ],
)
def test_status_is_what_exists(house, files, status):
    for name, text in files.items():
        path = house / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    card = catalog.read_card(write(house, GOOD))
    assert card.status == status
    assert card.verdicts == (("holds",) if FULL in files.values() else ())


def test_one_missing_target_keeps_a_system_planned(house):
    (house / PART).write_text("class Sample: ...\n")
    more = '[provides."position/more"]\ntarget = "formwright.parts.position.sample:More"\n\n[claim]'
    assert catalog.read_card(write(house, GOOD.replace("[claim]", more))).status == "planned"


def test_options_are_the_keywords_with_a_default(house):
    (house / PART).write_text(
        "class Base:\n"
        "    def __init__(self, *, heads: int, layout: Literal['a', 'b'] = 'a', base: float = 1e4) -> None: ...\n"
        "class Sample(Base):\n    ...\n"
        "def Function(*, scale: float = 2.0): ...\n"
    )
    module = "formwright.parts.position.sample"
    assert evidence.options(module, "Sample") == ("layout: Literal['a', 'b'] = 'a'", "base: float = 10000.0")
    assert evidence.options(module, "Function") == ("scale: float = 2.0",)
    assert evidence.options(module, "Absent") == evidence.options("formwright.absent", "Sample") == ()


def test_details_are_the_summary_and_more():
    card = catalog.card("mamba")
    assert card.summary().items() <= card.details().items()
    assert [part["name"] for part in card.details()["parts"]] == [part.name for part in card.provides]
    json.dumps(card.details())


def test_the_catalog_imports_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); from formwright import catalog; catalog.cards()\n"
        "[card.status for card in catalog.cards()]\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['formwright']"


def test_every_built_target_imports():
    for part in catalog.provided():
        if catalog.card(part.slug).status != "planned":
            assert catalog.resolve(part.target) is not None


def test_the_checkout_is_recognised():
    assert evidence.checkout() == Path(__file__).resolve().parents[2]
