"""list, show and what all commands share."""

import errno
import json
import os
import pty
import re
import resource
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from formwright import __version__, catalog, cli
from formwright.cli import app
from formwright.errors import FormwrightError

HEAVY = ("torch", "numpy", "transformers")  # pydantic comes with Typer, which checks its options with it


def run(*words):
    return CliRunner().invoke(app, list(words))


def stdout_of(*words):
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_json_has_the_119_and_the_baselines():
    systems = json.loads(stdout_of("list", "--json"))
    assert [system["number"] for system in systems[:119]] == list(range(1, 120))
    assert all(system["number"] is None for system in systems[119:])
    assert len(systems) > 119
    for system in systems:
        assert {"number", "slug", "title", "kinds", "status", "provides"} <= system.keys()
        assert system["status"] in catalog.STATUSES


@pytest.mark.parametrize(
    ("option", "value", "kept"),
    [
        ("--kind", "position", lambda system: "position" in system["kinds"]),
        ("--status", "planned", lambda system: system["status"] == "planned"),
        ("--capability", "cache", lambda system: "cache" in system["capabilities"]),
    ],
)
def test_a_filter_keeps_those_and_only_those(option, value, kept):
    everything = json.loads(stdout_of("list", "--json"))
    chosen = json.loads(stdout_of("list", option, value, "--json"))
    assert chosen == [system for system in everything if kept(system)]
    assert 0 < len(chosen) < len(everything)


@pytest.mark.parametrize(
    ("option", "typed", "meant"),
    [("--kind", "positon", "position"), ("--status", "bilt", "built"), ("--capability", "causl", "causal")],
)
def test_an_unknown_filter_value_names_the_nearest_first(option, typed, meant):
    result = run("list", option, typed)
    assert result.exit_code == 2
    assert re.fullmatch(rf"Error: {option} is '{typed}'; choose from {meant}, .*\.\n", result.stderr)
    assert result.stdout == ""


def test_a_pipe_gets_one_whole_line_a_system():
    lines = stdout_of("list").splitlines()
    assert len(lines) == len(catalog.cards())
    assert all(line.count("\t") == 5 for line in lines)


@pytest.mark.parametrize("columns", [30, 60, 80, 120, 200])
def test_a_terminal_of_any_width_shows_every_slug_whole(columns):
    output = in_terminal(columns, "list", "--kind", "survey")
    for system in catalog.cards():
        if "survey" in system.kinds:
            assert system.slug in output
    if columns >= 60:  # below, one line a system, which the terminal itself breaks
        assert all(len(line) <= columns for line in output.splitlines())


@pytest.mark.parametrize("columns", [30, 80])
def test_show_wraps_at_the_terminal_and_not_in_a_pipe(columns):
    words = [line for line in in_terminal(columns, "show", "mamba").splitlines() if "https" not in line]
    assert max(map(len, words)) <= columns
    assert catalog.card("mamba").claim.text in stdout_of("show", "mamba")


def in_terminal(columns, *words):
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-m", "formwright", *words], stdout=slave, env=environment) as process:
        os.close(slave)
        output = b""
        try:
            while chunk := os.read(master, 65536):
                output += chunk
        except OSError:  # Linux: the other end of the terminal is closed
            pass
        finally:
            os.close(master)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", output.decode()).replace("\r\n", "\n")


@pytest.mark.parametrize("name", ["roformer", "28", "028", "rope", "position/rope", "RoPE"])
def test_show_finds_a_system_by_any_of_its_names(name):
    assert json.loads(stdout_of("show", name, "--json"))["slug"] == "roformer"


def test_show_gives_paper_parts_and_claim():
    output = stdout_of("show", "aft")
    for expected in ("An Attention Free Transformer", "2105.14103", "mixer/aft-simple", "causal", "claim"):
        assert expected in output


def test_an_unknown_name_suggests_the_nearest():
    result = run("show", "roformr")
    assert result.exit_code == 2
    assert "'roformer'" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("raised", "says", "status"),
    [
        (FormwrightError("No such thing."), "Error: No such thing.\n", 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "Error: a/b: Not a directory\n", 2),
        (OSError("It cannot be read."), "Error: It cannot be read.\n", 2),
        (KeyboardInterrupt(), "Interrupted.\n", 130),
    ],
)
def test_an_error_is_one_line_and_an_exit_status(raised, says, status, monkeypatch):
    def fail(name: str) -> None:
        assert name == "aft"
        raise raised

    monkeypatch.setattr("formwright.cli.show.show", fail)
    result = run("show", "aft")
    assert (result.exit_code, result.stderr, result.stdout) == (status, says, "")


def test_version():
    assert stdout_of("--version") == f"formwright {__version__}\n"


@pytest.mark.parametrize("command", cli.Commands().list_commands(None))
def test_help_has_an_example(command):
    assert f"Example: formwright {command}" in " ".join(stdout_of(command, "--help").split())


def test_every_file_of_the_folder_is_a_command():
    group = typer.main.get_command(app)
    assert {"list", "show"} <= set(group.list_commands(None))
    assert group.get_command(None, "nothing") is None


@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("show", "rope"), ("--version",)])
def test_quick_and_without_torch(words):
    code = (
        "import sys, formwright.cli\n"
        f"sys.argv = ['formwright', *{words!r}]\n"
        "try: formwright.cli.main()\n"
        f"finally: print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    if seconds(code) >= 0.5:  # nothing was compiled yet, or the machine is slow: then Typer alone takes long, too
        typer_alone = min(seconds("import sys, typer; print([], file=sys.stderr)") for _ in range(2))
        assert min(seconds(code), seconds(code)) < max(0.5, 6 * typer_alone)


def seconds(code):
    """Processor time, which a busy machine does not stretch as it does wall time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "[]"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
