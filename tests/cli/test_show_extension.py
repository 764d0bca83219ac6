"""What show says of reading longer texts than those of training."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from formwright import catalog
from formwright.cli import app
from formwright.ops.relative_kernels import KERNELS, LEARNED


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alibi", "yes: the sum of exp(-n) converges"),
        ("position/decay", "yes: the sum of 1 / n^2 converges"),
        ("kerple", "in heads whose r1 is above 1"),
        ("t5", "no: at far distances the bias does not fall"),
        ("fire-s", "python -m formwright.theory.receptive_field FOLDER"),
    ],
)
def test_a_bias_shows_what_the_criterion_says(name, says):
    assert says in CliRunner().invoke(app, ["show", name]).stdout


def test_other_parts_show_nothing_of_it():
    for name in ("softmax", "rope", "mamba"):
        assert "criterion" not in CliRunner().invoke(app, ["show", name]).stdout


def test_every_kernel_on_a_card_is_known():
    named = {part.kernel for part in catalog.provided() if part.kernel is not None}
    assert "exponential" in named
    assert named <= KERNELS.keys() | LEARNED.keys()


def test_it_is_said_without_torch():
    words = "import sys; from formwright.cli.show import extension; extension('type-1')"
    words += "; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stdout == "[]\n"
