"""The command line: `tiue-runtime` and `python -m tiue_runtime`."""

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from tiue_runtime import __version__
from tiue_runtime.errors import RequestError, TiueError
from tiue_runtime.options import LoadOptions, RequestOptions, choices, described

T = TypeVar("T", bound=Any)
_USER_ERROR = 2
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of one line after the usage."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after one line on stderr about what the user can fix."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A redirected stdout on Windows is not UTF-8. No prompt and no file name may stop the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            return command(arguments)
    except BrokenPipeError:
        # The reader of stdout, such as head, has gone. Python must not try to write to it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (TiueError, OSError) as error:
        _say("error", error)
        return _USER_ERROR
    except KeyboardInterrupt:
        _say("error", "interrupted")
        return _INTERRUPTED


def _show_warning(message: object, *_: object, **__: object) -> None:
    _say("warning", message)


def _say(kind: str, message: object) -> None:
    print(f"tiue-runtime: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


def _generate(arguments: argparse.Namespace) -> int:
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.png import check_png_path, save_png

    paths = _numbered(Path(arguments.out), arguments.num_images or 1)
    for path in paths:
        check_png_path(path)
    options = _given(arguments, RequestOptions)
    pipeline = Pipeline.load(arguments.bundle, memory=options.get("memory") or "auto", **_given(arguments, LoadOptions))
    result = pipeline(arguments.prompt, **options)
    for path, image, seed in zip(paths, result.images, result.seeds, strict=True):
        text = {
            "prompt": arguments.prompt,
            "seed": str(seed),
            "bundle": pipeline.bundle.manifest.name,
            "steps": str(result.steps),
            "Software": f"tiue-runtime {__version__}",
        }
        save_png(image, path, text)
        print(f"{path}  {image.width}x{image.height}  seed {seed}")
    computed = f" in {result.precision}" if result.precision else ""
    print(f"{result.timings['total']:.2f} s on {result.device}{computed}, without loading")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from tiue_runtime.bundle import MANIFEST, Bundle
    from tiue_runtime.bundle.find import find_bundle

    bundle = Bundle.load(find_bundle(arguments.bundle))
    if arguments.json:
        content = json.loads((bundle.directory / MANIFEST).read_text(encoding="utf-8"))
        print(json.dumps({"directory": str(bundle.directory), **content}, indent=2, ensure_ascii=False))
        return 0
    manifest = bundle.manifest
    megabytes = sum(file.size for file in manifest.files.values()) / 1e6
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
        **{f"from {key}": text for key, text in manifest.created_from.items()},
    }
    _print_rows(rows)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.bundle.find import find_bundle

    bundle = Bundle.load(find_bundle(arguments.bundle))
    bundle.verify()
    print(f"{bundle.directory}: {len(bundle.manifest.files)} files are as the exporter wrote them")
    return 0


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
        print(f"{key:<{column}}{value}")


def _numbered(path: Path, count: int) -> list[Path]:
    """heart.png for one image, heart-1.png, heart-2.png ... for several."""
    if count <= 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i + 1:0{len(str(count))}}") for i in range(count)]


def _parser() -> _Parser:
    parser = _Parser(
        prog="tiue-runtime",
        description="Make images from text with a TiUE bundle, offline, on the CPU or an NVIDIA GPU.",
        epilog='Start with: tiue-runtime generate "a red heart" --out heart.png',
    )
    parser.add_argument("--version", action="version", version=f"tiue-runtime {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = _command(commands, "generate", _generate, "make pictures of a prompt and save them as PNG")
    generate.add_argument("prompt", help='what to draw, such as "a red heart"')
    generate.add_argument("--out", required=True, metavar="FILE.png", help="where to save; several get -1, -2, ...")
    _bundle_flag(generate)
    _option_flags(generate, RequestOptions)
    _option_flags(generate, LoadOptions)

    info = _command(commands, "info", _info, "show what a bundle is: license, sizes, step counts, origin")
    _bundle_flag(info)
    info.add_argument("--json", action="store_true", help="print bundle.json and the directory, for programs")

    verify = _command(commands, "verify", _verify, "compare every file of a bundle with its sha256")
    _bundle_flag(verify)

    doctor = _command(commands, "doctor", _doctor, "show versions, devices and installed bundles, and what is wrong")
    _bundle_flag(doctor)
    doctor.add_argument("--device", help="with this or --bundle, load the graphs and count the nodes of each provider")

    bench = _command(commands, "bench", _bench, "measure seconds per image, graph by graph")
    bench.add_argument("--runs", type=int, default=10, metavar="N", help="timed runs after the warm-up (default 10)")
    bench.add_argument("--cuda-graphs", action="store_true", help="record the kernels once and replay them (cuda)")
    _bundle_flag(bench)
    _option_flags(bench, RequestOptions)
    _option_flags(bench, LoadOptions)
    return parser


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
    """Add a flag for every option that is written in a TypedDict of options.py."""
    for name, (kind, option) in described(options).items():
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


def _given(arguments: argparse.Namespace, options: type[T]) -> T:
    """Return the options that the user gave, as keyword arguments."""
    values = vars(arguments)
    named = {name: values[name] for name in described(options) if values.get(name) is not None}
    return cast(T, named)
