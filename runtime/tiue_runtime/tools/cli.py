"""The command line: `tiue-runtime` and `python -m tiue_runtime`."""

import argparse
import difflib
import io
import re
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from tiue_runtime import __version__
from tiue_runtime.errors import RequestError, TiueError, remedy
from tiue_runtime.options import LoadOptions, RequestOptions, described
from tiue_runtime.tools import (
    batch_command,
    completion,
    generate_command,
    info_command,
    mcp_command,
    model_commands,
    serve_command,
    stop_signals,
)
from tiue_runtime.tools.console import print_rows, say, write
from tiue_runtime.tools.flags import bundle_flag, given, option_flags

_USER_ERROR = 2
_INTERRUPTED = 128 + signal.SIGINT
_FOREIGN = {
    **{"--model": "--bundle", "-p": "--prompts", "-s": "--seed"},
    **{"--size": "--width", "-W": "--width", "-H": "--height"},
    **dict.fromkeys(("-n", "--count", "--batch-size"), "--num-images"),
}
_SHOWN = 300  # characters of a message about flags


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice: "):
            said, _, listed = message.partition(" (choose from ")
            close = difflib.get_close_matches(said.rpartition(": ")[2].strip("'"), re.findall(r"[\w-]+", listed), 1)
            draw = f"{message}; to draw something: tiue-runtime generate a red heart"
            message = f"{said}; did you mean {close[0]}?" if close else draw
        short = message if len(message) <= _SHOWN else f"{message[: _SHOWN - 100]} ... {message[-100:]}"
        raise RequestError(f"{short} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        write(message, "stderr" if file in (None, sys.stderr) else "stdout", end="")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after one line on stderr about a problem that the user can fix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A redirected stdout on Windows is not UTF-8. No prompt and no file name may stop the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        with stop_signals.handled():
            return _run(argv)
    except TiueError as error:
        say("error", error)
        return _USER_ERROR
    except OSError as error:
        advice = remedy(error)
        say("error", f"{error}: {advice}" if advice else error)
        return _USER_ERROR
    except stop_signals.Terminated:
        say("error", "terminated")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        say("error", "interrupted")
        return _INTERRUPTED


def _run(argv: list[str] | None) -> int:
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown[0], arguments.parser)}")
    command: Callable[[argparse.Namespace], int] = arguments.command
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _show_warning
        return command(arguments)


def _meant(flag: str, parser: argparse.ArgumentParser) -> str:
    """Suggest the flag that was probably meant, if there is one."""
    flags: list[str] = re.findall(r"(?<![\w-])--[a-z][\w-]*", parser.format_help())
    close = difflib.get_close_matches(_FOREIGN.get(flag, flag), flags, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _show_warning(message: object, *_: object, **__: object) -> None:
    say("warning", message)


def _doctor(arguments: argparse.Namespace) -> int:
    from tiue_runtime.tools.doctor import examine

    rows, problems = examine(arguments.bundle, arguments.device)
    print_rows(rows)
    for problem in problems:
        say("error", problem)
    return _USER_ERROR if problems else 0


def _bench(arguments: argparse.Namespace) -> int:
    from tiue_runtime.tools.bench import bench

    loading = given(arguments, LoadOptions)
    loading["cuda_graphs"] = arguments.cuda_graphs
    rows = bench(arguments.bundle, runs=arguments.runs, loading=loading, request=given(arguments, RequestOptions))
    print_rows(rows)
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        prog="tiue-runtime",
        description="Make images from text with a TiUE bundle, offline, on the CPU or an NVIDIA GPU.",
        epilog="Start with: tiue-runtime generate a red heart",
    )
    parser.add_argument("--version", action="version", version=f"tiue-runtime {__version__}")
    parser.set_defaults(command=partial(_help, parser), parser=parser)
    add = partial(_command, parser.add_subparsers(metavar="COMMAND"))
    for group in (generate_command, batch_command, info_command, model_commands, mcp_command, serve_command):
        group.register(add)
    completion.register(add, parser)

    doctor = add("doctor", _doctor, "show versions, devices, installed bundles and problems")
    bundle_flag(doctor)
    doctor.add_argument("--device", help="with this or --bundle, load the graphs and count the nodes of each provider")

    bench = add("bench", _bench, "measure seconds per image, graph by graph")
    bench.add_argument("--runs", type=int, default=10, metavar="N", help="timed runs after the warm-up (default 10)")
    bench.add_argument("--cuda-graphs", action="store_true", help=described(LoadOptions)["cuda_graphs"].option.help)
    bundle_flag(bench)
    option_flags(bench, RequestOptions)
    option_flags(bench, LoadOptions)
    return parser


def _help(parser: _Parser, _: argparse.Namespace) -> int:
    parser.print_help(sys.stdout)
    return 0


def _command(
    commands: "argparse._SubParsersAction[_Parser]",  # pyright: ignore[reportPrivateUsage]
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> _Parser:
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(command=run, parser=parser)
    return parser
