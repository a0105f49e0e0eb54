"""The command `batch`: pictures of many prompts in a directory. The same command continues a batch that ended."""

import argparse
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_runtime.errors import Cancelled, InferenceError, RequestError
from tiue_runtime.options import LoadOptions, RequestOptions
from tiue_runtime.tools import stop_signals
from tiue_runtime.tools.console import say, write
from tiue_runtime.tools.flags import Add, drawing_flags, given, saver

if TYPE_CHECKING:
    from PIL.Image import Image

    from tiue_runtime.bundle import Bundle
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.result import Result
    from tiue_runtime.tools.batch_directory import BatchDirectory, Row
    from tiue_runtime.tools.batch_lines import Task
    from tiue_runtime.tools.flags import Save
    from tiue_runtime.tools.progress_bar import Bar

EXIT_CODES = (
    "Exit codes: 0 all pictures are there; 1 some lines failed, the others are there; 2 a mistake, in one line on "
    "stderr; 130 Ctrl-C; 143 SIGTERM. After 1, 130, 143 or a kill, the same command continues."
)
LINE = '{"prompt": "a red heart", "seed": 1, "num_images": 2, "name": "heart"}'

_LINE_FAILED, _MISTAKE = 1, 2
_SHOWN_FAILURES = 50
_FEWEST_DIGITS = 6  # of numbers of lines in names


def register(add: Add) -> None:
    """Add the command."""
    parser = add("batch", batch, "make pictures of many prompts; the same command continues it")
    parser.epilog = EXIT_CODES
    parser.add_argument(
        "prompts",
        metavar="PROMPTS.jsonl",
        help=f"one JSON object a line, for example {LINE}; - is stdin. Fields but prompt may be absent: flags and the "
        "bundle give them",
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="a new directory, or that of this batch")
    parser.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="of pictures (default: png)")
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="pack pictures into N tar files in webdataset's layout, key.png and key.json for each picture",
    )
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first line that fails")
    drawing_flags(parser, "print the line of the manifest for each new picture")


def batch(arguments: argparse.Namespace) -> int:
    """Run the command. Raises RequestError, and errors of loading."""
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.bundle.find import find_bundle
    from tiue_runtime.noise import check_seed
    from tiue_runtime.tools.batch_directory import BatchDirectory, continue_or_begin, locked
    from tiue_runtime.tools.batch_lines import Reader, read_tasks, with_seeds
    from tiue_runtime.tools.shards import Shards
    from tiue_runtime.tools.text_lines import read_lines, shown

    loading, request = given(arguments, LoadOptions), given(arguments, RequestOptions)
    if arguments.shards is not None and arguments.shards < 1:
        raise RequestError(f"shards: expected at least 1, got {arguments.shards}")
    save, seed = saver(arguments), request.pop("seed", None)
    if seed is not None:
        check_seed(seed)
    lines = list(read_lines(arguments.prompts, "PROMPTS.jsonl"))
    if not lines:
        raise RequestError(f"PROMPTS.jsonl: expected one JSON object a line, but {shown(arguments.prompts)} has none")
    bundle = Bundle.load(find_bundle(arguments.bundle))
    digits = max(len(str(lines[-1][0])), _FEWEST_DIGITS)
    reader = Reader(bundle.manifest, request, f".{arguments.format}", digits, dots=arguments.shards is None)
    tasks, failures = read_tasks(lines, reader)
    report = _Report(arguments, shown(arguments.prompts))
    for failure in failures:
        report.failed(failure.line, failure.problem)
    if not tasks or (failures and arguments.fail_fast):
        return _MISTAKE
    directory = Path(arguments.out)
    with locked(directory):
        state = continue_or_begin(directory, _state(arguments, loading, request, bundle, lines, seed))
        tasks = with_seeds(tasks, state["seed"])
        files = [file for task in tasks for file in task.files]
        shards = Shards(files, arguments.shards) if arguments.shards else None
        target = BatchDirectory(directory, files, shards)
        there = len(target)
        _make_all(arguments, loading, tasks, target, save, report)
        target.finish()
    report.end(f"{arguments.out}: {_counted(len(target), 'picture')}, {len(target) - there} new")
    return _LINE_FAILED if report.failures else 0


def _state(
    arguments: argparse.Namespace,
    loading: LoadOptions,
    request: RequestOptions,
    bundle: "Bundle",
    lines: list[tuple[int, bytes]],
    seed: int | None,
) -> dict[str, Any]:
    """Return everything on which the files of a batch depend. A batch is only continued with the same."""
    saved = {name: getattr(arguments, name) for name in ("format", "shards", "metadata", "ai_mark", "certificates")}
    made = {name: value for name, value in request.items() if name != "timeout"}  # A line may get more time later.
    return {
        "prompts_sha256": hashlib.sha256(b"".join(b"%d:%b\n" % line for line in lines)).hexdigest(),
        "lines": len(lines),
        "bundle": bundle.manifest.name,
        "bundle_sha256": bundle.sha256,
        "seed": seed,
        "options": {**saved, "certificates": saved["certificates"] is not None, **loading, **made},
    }


def _make_all(
    arguments: argparse.Namespace,
    loading: LoadOptions,
    tasks: "list[Task]",
    target: "BatchDirectory",
    save: "Save",
    report: "_Report",
) -> None:
    """Make the pictures that are missing, in the order of the lines."""
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.tools.progress_bar import bar_for

    missing = [task for task in tasks if not all(file in target for file in task.files)]
    pictures = [sum(len(task.files) for task in some) for some in (tasks, missing)]
    bar = bar_for(arguments, pictures[0], pictures[0] - pictures[1])
    with bar or nullcontext():
        if missing:
            memory = missing[0].options.get("memory") or "auto"
            with Pipeline.load(arguments.bundle, memory=memory, **loading) as pipeline:
                for task in missing:
                    stop_signals.check()
                    problem = _make(pipeline, task, target, save, report, bar)
                    if problem:
                        report.failed(task.line, problem)
                        if arguments.fail_fast:
                            return
                    target.pack_before(task.files[0])
        target.pack_all()


def _make(
    pipeline: "Pipeline",
    task: "Task",
    target: "BatchDirectory",
    save: "Save",
    report: "_Report",
    bar: "Bar | None",
) -> str | None:
    """Make the pictures of one line. Returns the problem if they cannot be made."""
    from tiue_runtime.images import RECORD

    if bar:
        bar.begin(len(task.files))
    call: Any = pipeline
    options: dict[str, Any] = {**task.options, "callback": bar}
    try:
        result: Result[list[Image]] = call(task.prompt, output_type="pil", **options)
        for index, (file, image) in enumerate(zip(task.files, result.images, strict=True)):
            if file not in target:
                facts = {"line": task.line, "index": index, "record": json.loads(image.info[RECORD].to_json())}
                report.made(target.add(file, facts, lambda path, image=image: save(image, path, True)))
    except (RequestError, InferenceError, Cancelled) as error:
        return str(error)
    finally:
        if bar:
            bar.end()
    return None


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


class _Report:
    """Says what was made and which lines failed."""

    def __init__(self, arguments: argparse.Namespace, source: str) -> None:
        self._arguments, self._source = arguments, source
        self.failures = 0

    def made(self, row: "Row") -> None:
        """Print the line of the manifest, for programs."""
        if self._arguments.json:
            write(json.dumps(row))

    def failed(self, line: int, problem: str) -> None:
        """Report a line that failed. After many, only their number is reported."""
        self.failures += 1
        if self.failures <= _SHOWN_FAILURES:
            say("error", f"line {line} of {self._source}: {problem}", flags=False)

    def end(self, summary: str) -> None:
        """Say what is there."""
        more = self.failures - _SHOWN_FAILURES
        if more > 0:
            say("error", f"{_counted(more, 'more line')} failed")
        if not (self._arguments.quiet or self._arguments.json):
            write(summary + (f"; {_counted(self.failures, 'line')} failed" if self.failures else ""))
