"""formwright moments."""

import json

import pytest
from typer.testing import CliRunner

from formwright.cli import app
from formwright.models.transformer import TransformerConfig, TransformerModel

SMALL = ("hidden_size=32", "vocab_size=40", "--batch", "4", "--length", "16")


def run(*words):
    return CliRunner().invoke(app, ["moments", *words])


def test_the_table_has_a_line_a_place_and_the_errors():
    lines = run("block=post", "init=xavier", "num_hidden_layers=3", *SMALL).stdout.splitlines()
    assert lines[0].split("\t")[:5] == ["stack", "layer", "what", "predicted", "measured"]
    assert len(lines) == 1 + 3 * 4 + 1
    assert lines[-1].startswith("error: median ")


@pytest.mark.parametrize(
    "fields", [("architecture=encoder-decoder",), ("image_size=8", "vocab_size=0", "position=none")]
)
def test_json_holds_the_same_for_any_architecture(fields):
    result = run(*SMALL, *fields, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {row["what"] for row in found["rows"]} >= {"attention", "feedforward", "stream", "gradient"}
    assert found["errors"]["median"] < 1


def test_a_saved_configuration_is_where_it_starts_from(tmp_path):
    TransformerModel(TransformerConfig(num_hidden_layers=1, hidden_size=32, vocab_size=40)).save_pretrained(tmp_path)
    lines = run("--config", str(tmp_path), "dropout=0.5", "--length", "16").stdout.splitlines()
    assert len(lines) == 1 + 4 + 1


def test_seeds_tell_models_apart():
    assert run(*SMALL).stdout == run(*SMALL).stdout != run(*SMALL, "--seed", "1").stdout


@pytest.mark.parametrize("field", ["blok=post", "block"])
def test_what_is_no_field_is_refused(field):
    result = run(field)
    assert result.exit_code == 2
    assert "FIELD=VALUE" in result.stderr
