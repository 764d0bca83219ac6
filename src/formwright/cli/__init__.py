"""The command line. cli/<command>.py holds one function of that name; a command is imported when it is asked for.

Exit status: 0 done, 1 a trial or check failed, 2 bad input, 130 interrupted.
"""

import errno
import importlib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from formwright import __version__
from formwright.errors import FormwrightError

FOLDER = Path(__file__).resolve().parent


class Commands(TyperGroup):
    """The files of this folder as commands, and the errors a user reads instead of a traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        del ctx
        return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.list_commands(ctx):
            return None
        function = getattr(importlib.import_module(f"formwright.cli.{cmd_name}"), cmd_name)
        single = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        single.command(cmd_name)(function)
        return typer.main.get_command(single)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FormwrightError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:  # a folder that cannot be made, a file that cannot be read
            if error.errno == errno.EPIPE:  # the reader of a pipe has gone: nobody reads a sentence either
                raise
            where = f"{error.filename}: " if error.filename else ""
            typer.echo(f"Error: {where}{error.strerror or error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"formwright {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def formwright(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Transformer parts behind one interface, measured on one bench.

    Example: formwright list --kind position
    """
    del version


def main() -> None:
    app(prog_name="formwright")
