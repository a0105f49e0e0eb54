"""The command line: `tiue-runtime` and `python -m tiue_runtime`."""

import argparse
import errno
import io
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from tiue_runtime import __version__
from tiue_runtime.errors import RequestError, TiueError
from tiue_runtime.options import LESSONS, LoadOptions, RequestOptions, choices, described
from tiue_runtime.tools import generate_command, model_commands

if TYPE_CHECKING:
    from tiue_runtime.bundle import Prompts

T = TypeVar("T", bound=Any)
_USER_ERROR = 2
_INTERRUPTED = 128 + signal.SIGINT
_SHOWN = 300  # characters of a message about flags
_SOME = 12  # things that `info` names


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        short = message if len(message) <= _SHOWN else f"{message[: _SHOWN - 3]}..."
        raise RequestError(f"{short} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        _write(message, sys.stderr if file is None else file, end="")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after one line on stderr about a problem that the user can fix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A redirected stdout on Windows is not UTF-8. No prompt and no file name may stop the command.
            stream.reconfigure(errors="backslashreplace")
    in_main = threading.current_thread() is threading.main_thread()  # Only there can signals be handled.
    before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            return command(arguments)
    except (TiueError, OSError) as error:
        _say("error", error)
        return _USER_ERROR
    except _Terminated:
        _say("error", "terminated")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        _say("error", "interrupted")
        return _INTERRUPTED
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Everything that handles Ctrl-C handles it as well, so nothing stays half written."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _show_warning(message: object, *_: object, **__: object) -> None:
    _say("warning", message)


def _say(kind: str, message: object) -> None:
    _write(f"tiue-runtime: {kind}: {_with_flags(' '.join(str(message).split()))}", sys.stderr)


def _write(text: str, stream: IO[str] | None = None, end: str = "\n") -> None:
    """Print to a stream, or to stdout. If its reader (for example head) has gone, the command continues silently."""
    output: IO[str] | None = stream or sys.stdout
    if output is None:  # Programs without a console have none.
        return
    try:
        print(text, file=output, end=end, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno != errno.EINVAL:  # EINVAL: a closed pipe on Windows
            raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, output.fileno())
        os.close(nothing)


def _with_flags(message: str) -> str:
    """Replace the names of options in a message of the library by the flags of the command line."""
    message = re.sub(rf"^{_NAME}(, {_NAME})*(?=:)", lambda found: re.sub(_NAME, _flag, found[0]), message)
    message = re.sub(rf"\b{_NAME}=\"([^\"]+)\"", lambda found: f"{_flag(found)} {found[2]}", message)
    return re.sub(f"`{_NAME}`", _flag, message)


def _flag(found: re.Match[str]) -> str:
    return "--" + found[1].replace("_", "-")


def _names() -> Iterator[str]:
    """List the options that have flags."""
    yield from ("bundle", "cuda_graphs", "out", "runs", "name", "offline", "allow_http", "key", "certificates")
    for options in (RequestOptions, LoadOptions):
        yield from (name for name, (_, option, _) in described(options).items() if option.flag)


_NAME = f"({'|'.join(_names())})"


def _generate(arguments: argparse.Namespace) -> int:
    loading, request = _given(arguments, LoadOptions), _given(arguments, RequestOptions)
    return generate_command.generate(arguments, loading, request, _write)


def _info(arguments: argparse.Namespace) -> int:
    from tiue_runtime.bundle import MANIFEST, Bundle
    from tiue_runtime.bundle.find import find_bundle

    bundle = Bundle.load(find_bundle(arguments.bundle))
    if arguments.json:
        content = json.loads((bundle.directory / MANIFEST).read_text(encoding="utf-8"))
        # ASCII, because `_write` would replace characters that the terminal cannot show by escapes foreign to JSON.
        _write(json.dumps({"directory": str(bundle.directory), **content}, indent=2))
        return 0
    manifest = bundle.manifest
    megabytes = manifest.size / 1e6
    rows: dict[str, object] = {
        "name": manifest.name,
        "license": manifest.license,
        "directory": bundle.directory,
        "size": f"{megabytes:.1f} MB in {len(manifest.files)} files; weights in {manifest.weights}",
        "precision": manifest.precision,
        "variants": ", ".join(manifest.variants),
        "vae": f"{', '.join(manifest.vaes)} (default {manifest.vaes[0]})",
        "image": f"{manifest.default_width}x{manifest.default_height}; multiples of {manifest.size_multiple}",
        "prompt": f"up to {manifest.text_length} tokens",
        "steps": f"{', '.join(map(str, sorted(manifest.schedules)))} (default {manifest.default_steps})",
        **_drawable(manifest.prompts),
        **{f"from {key}": text for key, text in manifest.created_from.items()},
    }
    _print_rows(rows)
    return 0


def _drawable(prompts: "Prompts | None") -> dict[str, object]:
    """Return rows that say what a model can draw."""
    if prompts is None:
        return {}
    rows: dict[str, object] = {"examples": "; ".join(prompts.examples)} if prompts.examples else {}
    count = len(prompts.vocabulary)
    if count:
        some = ", ".join(prompts.vocabulary[:: max(count // _SOME, 1)][:_SOME])
        rows["knows"] = f"{count} things, for example {some}; all of them: tiue-runtime info --json"
    return rows


def _doctor(arguments: argparse.Namespace) -> int:
    from tiue_runtime.tools.doctor import examine

    rows, problems = examine(arguments.bundle, arguments.device)
    _print_rows(rows)
    for problem in problems:
        _say("error", problem)
    return _USER_ERROR if problems else 0


def _bench(arguments: argparse.Namespace) -> int:
    from tiue_runtime.tools.bench import bench

    loading = _given(arguments, LoadOptions)
    loading["cuda_graphs"] = arguments.cuda_graphs
    rows = bench(arguments.bundle, runs=arguments.runs, loading=loading, request=_given(arguments, RequestOptions))
    _print_rows(rows)
    return 0


def _print_rows(rows: dict[str, object]) -> None:
    column = max(map(len, rows)) + 2
    for key, value in rows.items():
        _write(f"{key:<{column}}{value}")


def _parser() -> _Parser:
    parser = _Parser(
        prog="tiue-runtime",
        description="Make images from text with a TiUE bundle, offline, on the CPU or an NVIDIA GPU.",
        epilog="Start with: tiue-runtime generate a red heart",
    )
    parser.add_argument("--version", action="version", version=f"tiue-runtime {__version__}")
    parser.set_defaults(command=partial(_help, parser))
    commands = parser.add_subparsers(metavar="COMMAND")

    generate = _command(commands, "generate", _generate, "make pictures of a prompt and save them")
    generate_command.add_arguments(generate)
    _bundle_flag(generate)
    _option_flags(generate, RequestOptions)
    _option_flags(generate, LoadOptions)
    _lesson_flags(generate)

    info = _command(commands, "info", _info, "describe a bundle: license, sizes, step counts, origin")
    _bundle_flag(info)
    info.add_argument("--json", action="store_true", help="print bundle.json and the directory, for programs")

    model_commands.register(partial(_command, commands), _write)

    doctor = _command(commands, "doctor", _doctor, "show versions, devices, installed bundles and problems")
    _bundle_flag(doctor)
    doctor.add_argument("--device", help="with this or --bundle, load the graphs and count the nodes of each provider")

    bench = _command(commands, "bench", _bench, "measure seconds per image, graph by graph")
    bench.add_argument("--runs", type=int, default=10, metavar="N", help="timed runs after the warm-up (default 10)")
    bench.add_argument("--cuda-graphs", action="store_true", help=described(LoadOptions)["cuda_graphs"].option.help)
    _bundle_flag(bench)
    _option_flags(bench, RequestOptions)
    _option_flags(bench, LoadOptions)
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
    parser.set_defaults(command=run)
    return parser


def _bundle_flag(parser: _Parser) -> None:
    parser.add_argument(
        "--bundle",
        metavar="NAME_OR_PATH",
        help="a bundle's directory or installed name (default: TIUE_BUNDLE, else emoji)",
    )


def _option_flags(parser: _Parser, options: type) -> None:
    """Add a flag for every option of a TypedDict whose `flag` is set."""
    for name, (kind, option, _) in described(options).items():
        if not option.flag:
            continue
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=option.help)
            continue
        listed = choices(kind, option) or None
        parse = {int: int, float: float}.get(kind, str)
        metavar = option.metavar if option.metavar or listed else None
        parser.add_argument(flag, type=parse, choices=listed, metavar=metavar, help=option.help)


class _Lesson(argparse.Action):
    """A flag that people from diffusers may try. It ends in one sentence that teaches."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        raise RequestError(f"{self.option_strings[0]}: {LESSONS[self.dest]}")


def _lesson_flags(parser: _Parser) -> None:
    for name in LESSONS:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, nargs="?", action=_Lesson, help=argparse.SUPPRESS)


def _given(arguments: argparse.Namespace, options: type[T]) -> T:
    """Return the options that the user gave, as keyword arguments."""
    values = vars(arguments)
    named = {name: values[name] for name in described(options) if values.get(name) is not None}
    return cast(T, named)
