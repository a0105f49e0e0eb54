"""What a worker does with the files of a case, and what may come out of it. Imported by workers only."""

import contextlib
import gc
import io
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 1000  # characters
_SECONDS = 2.0  # of a request
_ROUNDING = 1e-5  # between two orders of the same sums
_LARGEST = 2**20  # pixels of a default size that is drawn as it is
PROMPT = "a red heart"


class Wrong(AssertionError):
    """Something was accepted that must not be, or made what it must not."""


@dataclass(frozen=True)
class Target:
    """One kind of files."""

    run: Callable[[Path, dict[str, Any]], str]  # takes the folder of the files; says in what way they were accepted
    refusals: tuple[type[Exception], ...]  # that the documentation promises, and no subclass of others
    exact: bool = False  # whether subclasses are other errors


def bundle(folder: Path, about: dict[str, Any]) -> str:
    """Load, verify and draw, as an application does; then again with graphs that are loaded in each call."""
    from tiue_runtime import Pipeline, TiueError
    from tiue_runtime.bundle import Bundle

    found = Bundle.load(folder)
    refused: list[TiueError] = []
    try:
        found.verify()
    except TiueError as error:
        refused.append(error)
    if about.get("stale") and not refused:
        raise Wrong("verify accepted files that differ from bundle.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn: list[Any] = []
        for memory in ("auto", "low"):
            pipe = None
            try:
                pipe = Pipeline.load(folder, device="cpu", threads=1, memory=memory)
                drawn.append(_draw(pipe, found, about))
            except TiueError as error:
                refused.append(error)
                if memory == "low" and pipe is not None:
                    _check_refused_again(pipe, found, about, error)
    if refused:
        if drawn and not about.get("stale") and len(drawn) != 2 and not _may_depend_on_shapes(refused):
            raise Wrong(f"one way to draw works, another one does not: {refused[0]}")
        raise refused[0]
    if about.get("refuse"):
        raise Wrong("accepted what must be refused")
    if abs(drawn[0] - drawn[1]).max() > _ROUNDING:
        return "a picture that depends on the memory mode"
    same = abs(drawn[0] - _undamaged(drawn[0].shape)).max() <= _ROUNDING
    return "the same picture" if same else "another picture"


def _may_differ(refused: list[Any]) -> bool:
    """Whether memory or time decided, which differ between runs."""
    from tiue_runtime import Cancelled, OutOfMemoryError

    return any(isinstance(error, OutOfMemoryError | Cancelled) for error in refused)


def _may_depend_on_shapes(refused: list[Any]) -> bool:
    """Whether a graph may run in one memory mode and fail in another, where it gets other shapes."""
    from tiue_runtime import InferenceError

    return _may_differ(refused) or any(isinstance(error, InferenceError) for error in refused)


def _draw(pipe: Any, found: Any, about: dict[str, Any]) -> Any:
    import numpy as np

    manifest = found.manifest
    sides = {"height": manifest.default_height, "width": manifest.default_width}
    if sides["height"] * sides["width"] > _LARGEST:
        sides = dict.fromkeys(sides, manifest.size_multiple)
    made = pipe(about.get("prompt", PROMPT), seed=1, output_type="np", timeout=_SECONDS, **sides).images
    if made.shape != (1, sides["height"], sides["width"], 3) or made.dtype != np.float32:
        raise Wrong(f"drew an array of shape {made.shape} of {made.dtype}")
    if not (np.isfinite(made).all() and made.min() >= 0 and made.max() <= 1):
        raise Wrong("drew values that are no colors")
    return made


def _check_refused_again(pipe: Any, found: Any, about: dict[str, Any], first: Exception) -> None:
    """A graph that was refused is not used by the next call."""
    try:
        _draw(pipe, found, about)
    except type(first):
        return
    except Exception as error:
        if _may_differ([first, error]):
            return
        raise Wrong(f"{type(first).__name__}, and {type(error).__name__} at the next call: {error}") from error
    if not _may_differ([first]):
        raise Wrong(f"refused, and drawn at the next call: {first}")


def _undamaged(shape: tuple[int, ...]) -> Any:
    import numpy as np
    from tiue_runtime import Pipeline

    if shape not in _PICTURES:
        pipe = Pipeline.load(Path(__file__).parents[2] / "runtime/tests/data/tiny", device="cpu", threads=1)
        try:
            made = pipe(PROMPT, seed=1, output_type="np", height=shape[1], width=shape[2]).images
        except ValueError:  # a size that the undamaged bundle does not make
            made = np.full(shape, np.nan)
        _PICTURES[shape] = made
    return _PICTURES[shape]


_PICTURES: dict[tuple[int, ...], Any] = {}


def student(folder: Path, about: dict[str, Any]) -> str:
    """Load a student, check it as a run does before its first update, and make latents with it."""
    import torch

    from tiue.checkpoint import check_savable, load_student

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = load_student(folder / "student.safetensors")
        check_savable(found)
        return _latents(found)


def pipeline(folder: Path, about: dict[str, Any]) -> str:
    """Load a pipeline, or a single file with one as its base, as the exporter does, and make latents with it."""
    import torch

    from export.source import load_source

    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always", UserWarning)
        base = folder / "base" if about["source"] != "base" else None
        found = load_source(folder / about["source"], base=base)
        for warning in said:
            message = str(warning.message)
            if len(message) > LONGEST_MESSAGE or not message.isprintable():
                raise Wrong(f"warned in {len(message)} characters: {message!a:.200}")
        return _latents(found)


def _latents(found: Any) -> str:
    """Make latents with a student."""
    import torch

    if not found.share_encoder:
        return "a control"
    network = found.tiue()
    text = torch.zeros(1, 4, found.components.unet.config.cross_attention_dim)
    size = found.components.geometry.multiple
    latents = torch.zeros(1, found.components.unet.config.in_channels, size, size)
    made = network(latents, text)
    if made.shape != latents.shape:
        raise Wrong(f"made latents of shape {tuple(made.shape)}")
    return "finite latents" if made.isfinite().all() else "latents that are not finite, which the exporter refuses"


def captions(folder: Path, about: dict[str, Any]) -> str:
    """Read all captions of a file or a folder."""
    from tiue.prompts import LONGEST, read_prompts

    files = list(folder.iterdir())
    path = files[0] if len(files) == 1 else folder
    found = list(read_prompts(path, about["field"]))
    for caption in found:
        if not isinstance(caption, str) or not caption.strip() or caption != caption.strip():
            raise Wrong(f"read {caption!r:.60}")
        if len(caption) > LONGEST or any(0xD800 <= ord(character) < 0xE000 for character in caption):
            raise Wrong(f"read {caption!r:.60} of {len(caption)} characters")
    return "captions" if found else "none"


def picture(folder: Path, about: dict[str, Any]) -> str:
    """Draw by the command line, and read the prompt from the picture."""
    from tiue_runtime.saving import read_record
    from tiue_runtime.tools.cli import main

    out = folder / "picture.png"
    said, errors = io.StringIO(), io.StringIO()
    arguments = ["generate", f"--out={out}", f"--bundle={_TINY}", "--seed=1", "--threads=1", "--device=cpu"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = main([*arguments, "--", about["prompt"]])
    if status:
        if out.exists():
            raise Wrong(f"wrote a picture and ended with {status}")
        raise Refused(errors.getvalue().removesuffix("\n"))
    text = read_record(out).prompt
    if text != about["prompt"]:
        raise Wrong(f"wrote {text!r:.60} instead of the prompt")
    return "a picture"


def code(folder: Path, about: dict[str, Any]) -> str:
    """Run any Python code, for tests of the fuzzer itself."""
    exec(about["code"])
    return "code"


class Refused(Exception):
    """The command line said no."""


_TINY = Path(__file__).parents[2] / "runtime/tests/data/tiny"


def target(name: str) -> Target:
    """Return the target of a kind of cases."""
    if name in ("manifests", "tokenizers", "graphs", "external"):
        from tiue_runtime import TiueError

        return Target(bundle, (TiueError,))
    if name == "students":
        from tiue.checkpoint import CheckpointError

        return Target(student, (CheckpointError,))
    if name == "pipelines":
        from export.errors import ExportError
        from tiue.checkpoint import CheckpointError
        from tiue.components import ComponentsError

        return Target(pipeline, (ExportError, CheckpointError, ComponentsError))
    if name == "code":
        return Target(code, (ValueError,), exact=True)
    if name == "captions":
        return Target(captions, (ValueError,), exact=True)
    return Target(picture, (Refused,))


def run(name: str, files: dict[str, bytes], about: dict[str, Any], scratch: Path) -> tuple[str, str]:
    """Run a case. Returns (kind of outcome, detail)."""
    chosen, folder = target(name), scratch / "case" / "files"
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, data in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    try:
        return f"accepted: {chosen.run(folder, about)}", ""
    except Wrong as error:
        return "WRONG", str(error)
    except BaseException as error:
        said = str(error)
        if not (type(error) in chosen.refusals if chosen.exact else isinstance(error, chosen.refusals)):
            return f"FOREIGN {type(error).__name__}", f"{_place(error)}: {said[:300]}"
        if len(said) > LONGEST_MESSAGE or not said.isprintable():
            return "MESSAGE", json.dumps(said[:300]) + f" ({len(said)} characters)"
        return f"refused: {type(error).__name__}", said
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
        gc.collect()  # errors hold what they came from


def _place(error: BaseException) -> str:
    """Say which line raised an error, and which line of ours called it."""
    trace, places = error.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return " > ".join(places[-6:])
