"""The command `generate`: pictures of prompts, or of a saved picture's record, in files."""

import argparse
import json
import secrets
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_runtime.errors import RequestError
from tiue_runtime.options import LoadOptions, RequestOptions
from tiue_runtime.tools import stop_signals
from tiue_runtime.tools.console import write
from tiue_runtime.tools.flags import Add, drawing_flags, given, saver

if TYPE_CHECKING:
    from PIL.Image import Image

    from tiue_runtime.contact_sheet import Sheet
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.record import Record
    from tiue_runtime.result import Result
    from tiue_runtime.tools.file_names import Target, Values
    from tiue_runtime.tools.flags import Save
    from tiue_runtime.tools.progress_bar import Bar

EXIT_CODES = "Exit codes: 0 all pictures are saved; 2 a mistake, in one line on stderr; 130 Ctrl-C; 143 SIGTERM."
FIELDS_HELP = "{prompt}, {seed}, {index}, {width}, {height}, {steps} and {bundle}"


def register(add: Add) -> None:
    """Add the command."""
    parser = add("generate", generate, "make pictures of a prompt and save them")
    parser.epilog = EXIT_CODES
    parser.add_argument("prompt", nargs="*", help="a description of the picture, for example: a red heart")
    parser.add_argument("--prompt", dest="prompt_flag", metavar="TEXT", help=argparse.SUPPRESS)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, from a file, or from stdin with -; blank lines are skipped",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="NAME",
        help="a file, .png, .jpg or .webp (it is replaced; several pictures become NAME-1.png, NAME-2.png, ...); a "
        f"directory; or a name with fields in braces: {FIELDS_HELP} (default: a new file named after prompt and seed)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files also if their names come from prompts and seeds"
    )
    parser.add_argument(
        "--grid", action="store_true", help="save one sheet of all pictures, row by row, instead of a file for each"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PICTURE",
        help="make a saved picture again, with the bundle given here or the one that made it",
    )
    drawing_flags(parser, "print a JSON object per picture, for programs")


def generate(arguments: argparse.Namespace) -> int:
    """Run the command. Raises RequestError, and errors of the pipeline."""
    from tiue_runtime.pipeline import Pipeline
    from tiue_runtime.tools.file_names import Target
    from tiue_runtime.tools.progress_bar import bar_for

    loading, request = given(arguments, LoadOptions), given(arguments, RequestOptions)
    _check_sources(arguments, request)
    target = Target(arguments.out, arguments.overwrite)
    save = saver(arguments)
    if arguments.source:
        return _repeat(arguments, loading, target, save, request.get("timeout"))
    plan = _plan(arguments, request, target)
    bar, memory = bar_for(arguments, len(plan.values)), request.get("memory") or "auto"
    with bar or nullcontext(), Pipeline.load(arguments.bundle, memory=memory, **loading) as pipeline:
        output = _Output(arguments, target, save, plan)
        result = None
        for result in _results(pipeline, plan, request, bar):
            output.take(result)
        output.end(result)
    return 0


def _check_sources(arguments: argparse.Namespace, request: RequestOptions) -> None:
    """Raise RequestError unless exactly one thing says what to draw."""
    if arguments.prompt_flag is not None:
        raise RequestError("prompt: write the description without a flag, as in: tiue-runtime generate a red heart")
    sources = {
        "a description": arguments.prompt,
        "--prompts FILE": arguments.prompts,
        "--from PICTURE": arguments.source,
    }
    found = [name for name, value in sources.items() if value]
    if len(found) != 1:
        got = " and ".join(found) or "nothing"
        raise RequestError(
            "prompt: expected either a description of the picture, --prompts FILE or --from PICTURE, "
            f"got {'both ' if len(found) > 1 else ''}{got}"
        )
    decided = [name for name in request if name != "timeout"]
    if arguments.source and decided:
        raise RequestError(f"{decided[0]}: with --from, the record of the picture decides this")
    if arguments.source and arguments.grid:
        raise RequestError("grid: with --from, there is one picture only; leave out --grid")


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before anything is drawn."""

    prompts: list[str]
    num_images: int  # per prompt
    seed: int  # of the first picture
    values: "list[Values]"  # of each picture, for its name
    paths: list[Path]  # of each picture, or of the sheet
    sheet: "Sheet | None"


def _plan(arguments: argparse.Namespace, request: RequestOptions, target: "Target") -> _Plan:
    """Read prompts, choose seeds and names, and check all that can be checked without drawing."""
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.bundle.find import find_bundle
    from tiue_runtime.contact_sheet import Sheet
    from tiue_runtime.noise import check_seed
    from tiue_runtime.request import LARGEST, check_num_images, check_prompts, check_upscale
    from tiue_runtime.saving import ENDINGS
    from tiue_runtime.tools.text_lines import read_prompts

    prompts = read_prompts(arguments.prompts) if arguments.prompts else check_prompts(" ".join(arguments.prompt))
    num_images = check_num_images(request.get("num_images", 1))
    count = len(prompts) * num_images
    if count > LARGEST:
        raise RequestError(f"num_images: expected at most {LARGEST:,} pictures at once, got {count:,}")
    chosen = request.get("seed")
    seed = secrets.randbits(32) if chosen is None else check_seed(chosen, count)
    manifest = Bundle.load(find_bundle(arguments.bundle)).manifest
    enlarged = check_upscale(request.get("upscale"), manifest) or 1
    width = (request.get("width") or manifest.default_width) * enlarged
    height = (request.get("height") or manifest.default_height) * enlarged
    fixed = {"width": width, "height": height, "bundle": manifest.name}
    fixed |= {"steps": request.get("steps") or manifest.default_steps}
    values: list[Values] = [
        {"prompt": prompts[i // num_images], "seed": seed + i, "index": i + 1, **fixed} for i in range(count)
    ]
    if not arguments.grid:
        return _Plan(prompts, num_images, seed, values, target.paths(values), None)
    sheet = Sheet(len(prompts), num_images, width, height)
    paths = target.paths(values[:1], "{prompt}-{seed}-grid.png")
    sheet.check(ENDINGS[paths[0].suffix.lower()])
    return _Plan(prompts, num_images, seed, values, paths, sheet)


def _results(
    pipeline: "Pipeline", plan: _Plan, request: RequestOptions, bar: "Bar | None"
) -> "Iterator[Result[list[Image]]]":
    """Run one request for each prompt. Its pictures are those that one request for all prompts would make."""
    for i, prompt in enumerate(plan.prompts):
        stop_signals.check()
        if bar:
            bar.begin(plan.num_images)
        options: Any = {**request, "seed": plan.seed + i * plan.num_images, "callback": bar}
        yield pipeline(prompt, **options)
        if bar:
            bar.end()


class _Output:
    """Saves pictures, or one sheet of them, and says so."""

    def __init__(self, arguments: argparse.Namespace, target: "Target", save: "Save", plan: _Plan) -> None:
        self._arguments, self._target, self._save, self._plan = arguments, target, save, plan
        self._made: list[Image] = []  # for the sheet
        self._count = 0
        self._seconds = 0.0

    def take(self, result: "Result[list[Image]]") -> None:
        """Save the pictures of one prompt, or keep them for the sheet."""
        self._seconds += result.timings["total"]
        for image, seed in zip(result.images, result.seeds, strict=True):
            values = self._plan.values[self._count]
            if self._plan.sheet is not None:
                self._made.append(image)
            else:
                path = _save_to(self._target, self._save, image, self._plan.paths[self._count])
                _say_saved(self._arguments, path, image, seed, str(values["prompt"]))
            self._count += 1

    def end(self, result: "Result[list[Image]] | None") -> None:
        """Save the sheet, if there is one, and say how long all took."""
        if self._plan.sheet is not None:
            self._save_sheet(self._plan.sheet)
        if result is not None:
            _say_time(self._arguments, result, self._seconds)

    def _save_sheet(self, sheet: "Sheet") -> None:
        image = sheet.make(self._made)
        path = _save_to(self._target, self._save, image, self._plan.paths[0])
        seeds = [int(values["seed"]) for values in self._plan.values]
        if self._arguments.json:
            row = {"path": str(path), "width": image.width, "height": image.height}
            write(json.dumps({**row, "columns": sheet.columns, "seeds": seeds, "prompts": self._plan.prompts}))
        elif not self._arguments.quiet:
            which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}, row by row"
            write(f"{path}  {sheet.columns}x{sheet.rows} pictures, {which}")


def _repeat(
    arguments: argparse.Namespace, loading: LoadOptions, target: "Target", save: "Save", timeout: float | None
) -> int:
    """Make a saved picture again. Its file is read once."""
    from tiue_runtime.repeating import load_for, repeat
    from tiue_runtime.saving import read_record
    from tiue_runtime.tools.progress_bar import bar_for

    record = read_record(arguments.source)
    (path,) = target.paths([_values(record)])
    bar = bar_for(arguments, 1)
    with bar or nullcontext(), load_for(record, arguments.bundle, **loading) as pipeline:
        if bar:
            bar.begin(1)
        result = repeat(pipeline, record, arguments.source, callback=bar, timeout=timeout)
        path = _save_to(target, save, result.images[0], path)
        _say_saved(arguments, path, result.images[0], result.seeds[0], record.prompt)
        _say_time(arguments, result, result.timings["total"])
    return 0


def _values(record: "Record") -> "Values":
    return {
        "prompt": record.prompt or "",
        "seed": record.seed or 0,
        "index": 1,
        "width": record.width * (record.upscale or 1),
        "height": record.pixel_height,
        "steps": record.steps,
        "bundle": record.bundle,
    }


def _save_to(target: "Target", save: "Save", image: "Image", path: Path) -> Path:
    return target.save(path, lambda chosen: save(image, chosen, target.overwrite))


def _say_saved(arguments: argparse.Namespace, path: Path, image: "Image", seed: int, prompt: str | None) -> None:
    row: dict[str, Any] = {"path": str(path), "width": image.width, "height": image.height, "seed": seed}
    record: Record | None = getattr(image, "record", None)
    flagged = None if record is None else record.flagged
    if arguments.json:
        write(json.dumps({**row, "prompt": prompt} | ({} if flagged is None else {"flagged": flagged})))
    elif not arguments.quiet:
        note = "  flagged by the safety checker, and blurred" if flagged else ""
        write(f"{path}  {image.width}x{image.height}  seed {seed}{note}")


def _say_time(arguments: argparse.Namespace, result: "Result[list[Image]]", seconds: float) -> None:
    if not (arguments.json or arguments.quiet):
        computed = f" in {result.precision}" if result.precision else ""
        write(f"{seconds:.2f} s on {result.device}{computed}, without loading")
