"""An installed wheel says of every system what the checkout says, and is built with or without a compiler."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout in which `mlp` has a reference test and `glu` evidence at full scale."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("src", "tests"):
        junk = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "status.json")
        shutil.copytree(ROOT / name, copy / name, ignore=junk)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "tests" / "test_mlp.py").write_text("@pytest.mark.reference\ndef test_twin(): ...\n")
    (copy / "evidence").mkdir()
    verdict = {"claims": [{"scale": "full", "verdict": "does not hold here"}]}
    (copy / "evidence" / "glu.json").write_text(json.dumps(verdict))
    return copy


def wheel(checkout, folder, environment):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = folder.glob("*.whl")
    return built


def listed(path, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "formwright", "list", "--json"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_wheel_built_without_a_compiler_knows_what_the_checkout_knows(checkout, tmp_path):
    with zipfile.ZipFile(wheel(checkout, tmp_path / "wheel", NO_COMPILER)) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert not [name for name in names if "native/_kernels" in name]
    assert not [name for name in names if name.startswith(("tests/", "evidence/"))]
    in_wheel, in_checkout = listed(tmp_path / "installed", tmp_path), listed(checkout / "src", tmp_path)
    assert in_wheel == in_checkout
    status = {system["slug"]: system["status"] for system in in_wheel}
    assert (status["mlp"], status["glu"]) == ("matched", "proven")
    [glu] = [system for system in in_wheel if system["slug"] == "glu"]
    assert glu["verdicts"] == ["does not hold here"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="There is no g++ here to build the native kernels with.")
def test_a_wheel_built_with_a_compiler_has_the_kernels(checkout, tmp_path):
    with zipfile.ZipFile(wheel(checkout, tmp_path, {"CC": "gcc", "CXX": "g++"})) as archive:
        kernels = [name for name in archive.namelist() if name.startswith("formwright/ops/native/_kernels")]
    assert len(kernels) == 1
