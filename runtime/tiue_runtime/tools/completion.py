"""The command `completion`: a script by which a shell completes commands, flags, their values and file names."""

import argparse
from typing import Any, cast

from tiue_runtime.errors import RequestError
from tiue_runtime.tools.console import write
from tiue_runtime.tools.flags import Add

SHELLS = ("bash", "zsh", "tcsh")

# The names of values in the help.
_FILES = {"FILE", "NAME", "NAME_OR_PATH", "BUNDLE", "PEM", "PICTURE", "PROMPTS.jsonl"}
_DIRECTORIES = {"DIR"}


def register(add: Add, whole: argparse.ArgumentParser) -> None:
    """Add the command. whole: the parser of the whole command line."""

    def run(arguments: argparse.Namespace) -> int:
        write(script(whole, arguments.shell), end="")
        return 0

    parser = add("completion", run, "print a script for a shell's completion")
    parser.add_argument("shell", choices=SHELLS, help="whose script is printed")
    parser.epilog = (
        'bash: eval "$(tiue-runtime completion bash)", for example in ~/.bashrc. zsh: save the script as '
        "_tiue-runtime in a directory of $fpath. tcsh: tiue-runtime completion tcsh > FILE, and source FILE."
    )


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script of a shell. Raises RequestError if shtab, which writes it, is not installed."""
    try:
        import shtab
    except ImportError as error:
        raise RequestError("completion: expected shtab, which is not installed: pip install shtab") from error
    writer: Any = shtab
    _mark_paths(parser, writer)
    return str(writer.complete(parser, shell))


def _mark_paths(parser: argparse.ArgumentParser, writer: Any) -> None:
    """Tell shtab which values are files or directories."""
    actions: list[Any] = parser._actions  # pyright: ignore[reportPrivateUsage] (argparse has no public list)
    for action in actions:
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            commands: Any = cast(Any, action).choices
            for command in commands.values():
                _mark_paths(command, writer)
        elif action.metavar in _FILES or action.metavar in _DIRECTORIES:
            action.complete = writer.FILE if action.metavar in _FILES else writer.DIRECTORY
