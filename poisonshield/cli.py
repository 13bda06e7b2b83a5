"""The `poisonshield` command: finds the commands, and turns our errors into one worded message.

A command is a file in commands/ with a function of its name, or a Typer `app` of commands, and its GROUP in --help.
"""

import importlib
import logging
import os
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer

from poisonshield import __version__
from poisonshield.errors import PoisonShieldError, reason_of
from poisonshield.registry import Registry
from poisonshield.terminal import Formatter, guard

COMMANDS = Registry("poisonshield.commands", kind="command")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _tell_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def poisonshield(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Train safely on data that may be poisoned, and know what that costs."""


def _add_commands() -> None:
    """Every command of commands/, by scanning."""
    for name in COMMANDS.names():
        module = importlib.import_module(f"poisonshield.commands.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, rich_help_panel=module.GROUP)
        else:
            app.command(name.replace("_", "-"), rich_help_panel=module.GROUP)(getattr(module, name))


_add_commands()


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Errors of ours end with status 1 and their words only; a preempted run ends with 75."""
    _speak_alone()
    with guard():
        try:
            app(arguments, standalone_mode=True)
        except PoisonShieldError as err:
            print(f"{_name_rank()}{type(err).__name__}: {err}", file=sys.stderr)
            sys.exit(1)
        except Exception as err:
            if not _name_rank():
                raise
            print(_tell_of_rank(err), file=sys.stderr)
            sys.exit(1)


def _name_rank() -> str:
    """What begins a message of one process of several; "" for one alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return "" if world < 2 else f"rank {os.environ.get('RANK', '?')} of {world} on {socket.gethostname()}: "


def _tell_of_rank(err: Exception) -> str:
    """One line for a rank of several that failed, often because another one did; its traceback is in a file."""
    rank = os.environ.get("RANK", "?")
    place = Path(f"poisonshield-rank-{rank}.traceback.txt").absolute()
    try:
        place.write_text("".join(traceback.format_exception(err)))
        told = f"its traceback is in {place}"
    except OSError as refused:
        told = f"its traceback cannot be written to {place}: {refused.strerror}"
    return f"{_name_rank()}{type(err).__name__}: {reason_of(err)} ({told})"


def _speak_alone() -> None:
    """Logs of ours from INFO on; of libraries errors only. `-W` and PYTHONWARNINGS show their warnings."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(Formatter("%(message)s"))
    logging.getLogger("poisonshield").setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
