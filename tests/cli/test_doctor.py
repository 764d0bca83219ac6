"""doctor says what is there."""

import json

import torch
from typer.testing import CliRunner

from formwright.cli import app
from formwright.cli.doctor import extras, missing
from formwright.ops import native


def doctor(*options, **environment):
    result = CliRunner().invoke(app, ["doctor", *options], env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_names_versions_kernels_and_data(tmp_path):
    found = json.loads(doctor("--json", FORMWRIGHT_DATA=str(tmp_path)))
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["native kernels"] == native.describe()
    assert found["data"] == str(tmp_path)
    assert "no folder" in json.loads(doctor("--json", FORMWRIGHT_DATA=str(tmp_path / "absent")))["data"]
    assert "not set" in json.loads(doctor("--json", FORMWRIGHT_DATA=""))["data"]


def test_a_missing_extra_comes_with_its_remedy(monkeypatch):
    monkeypatch.setattr("formwright.cli.doctor.extras", lambda: {"report": ["absent-one", "torch"], "data": ["torch"]})
    lines = doctor().splitlines()
    assert 'extra report    no: pip install "formwright[report]" brings absent-one' in lines
    assert "extra data      yes" in lines


def test_the_extras_are_those_of_the_metadata():
    found = extras()
    assert {"data", "report", "ray", "onnx"} <= found.keys()
    assert not {"test", "docs", "all"} & found.keys()
    assert "plotly" in found["report"]
    assert missing(["torch", "surely-absent"]) == ["surely-absent"]
