"""The lines of a batch: each is one JSON object, checked as a request is, with the names of its pictures."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from tiue_runtime.bundle import Manifest
from tiue_runtime.bundle.fields import parse_json
from tiue_runtime.bundle.manifest import is_portable
from tiue_runtime.errors import BundleError, RequestError, TiueError, clip, shorten
from tiue_runtime.noise import SEED_LIMIT
from tiue_runtime.options import LESSONS, RequestOptions, complete, described
from tiue_runtime.request import Request
from tiue_runtime.saving import ENDINGS, numbered

MOST_PICTURES = 4096
"""Of one line, which runs as one batch."""

OPTIONS = tuple(name for name, (_, option, _) in described(RequestOptions).items() if option.flag)
FIELDS = ("prompt", "name", *OPTIONS)


@dataclass(frozen=True)
class Task:
    """One valid line."""

    line: int  # from 1
    prompt: str
    options: RequestOptions  # without a seed until `with_seeds`, if the line has none
    files: tuple[str, ...]  # relative to the directory of the batch, one per picture


@dataclass(frozen=True)
class Failure:
    """A line that could not be read, or whose pictures could not be made."""

    line: int
    problem: str


class Reader:
    """Turns lines into tasks.

    Args:
        manifest: of the bundle.
        defaults: options of lines that do not name them.
        ending: of files whose names have none, for example ".png".
        digits: of the numbers of lines in names.
        dots: whether a name may hold dots. Keys of webdataset may not.
    """

    def __init__(
        self, manifest: Manifest, defaults: RequestOptions, ending: str, digits: int, *, dots: bool = True
    ) -> None:
        self._manifest, self._defaults, self._ending = manifest, defaults, ending
        self._digits, self._dots = digits, dots
        self._taken: dict[str, int] = {}  # a name, folded => its line
        self._folders: dict[str, int] = {}

    def read(self, line: int, data: bytes) -> Task:
        """Check one line. Raises RequestError."""
        content = self._content(data)
        prompt, name = content.pop("prompt", None), content.pop("name", None)
        if not isinstance(prompt, str):
            raise RequestError(f"prompt: expected a string, got {shorten(prompt)}")
        options = cast(RequestOptions, {**self._defaults, **content})
        given = complete(RequestOptions, options)
        memory = given["memory"] = given["memory"] or "auto"
        request = Request.make(self._manifest, None, lambda: None, prompt, "pil", given)
        count = request.num_images
        if count > MOST_PICTURES:
            raise RequestError(f"num_images: expected at most {MOST_PICTURES:,} in one line, got {count:,}")
        options["memory"] = memory
        return Task(line, prompt, options, self._names(line, name, count))

    def _content(self, data: bytes) -> dict[str, Any]:
        try:
            content = parse_json(data)
        except BundleError as error:
            raise RequestError(str(error)) from error
        if not isinstance(content, dict):
            raise RequestError(f'expected an object such as {{"prompt": "a red heart"}}, got {shorten(content)}')
        fields = dict(cast(Mapping[str, Any], content))
        for name in fields:
            if name in LESSONS:
                raise RequestError(f"{name}: {LESSONS[name]}")
            if name not in FIELDS:
                raise RequestError(f"unknown field {shorten(name)}; expected some of {', '.join(FIELDS)}")
        return fields

    def _names(self, line: int, name: object, count: int) -> tuple[str, ...]:
        """Name the pictures of a line. Raises RequestError if another line has one of the names."""
        if name is None:
            name = f"{line:0{self._digits}}"
        elif not isinstance(name, str) or not is_portable(name) or re.search(r"(^|/)\.", name):
            raise RequestError(
                "name: expected a file name inside of the directory that every system can store, without a leading "
                f"dot, got {shorten(name)}"
            )
        path = Path(name) if Path(name).suffix.lower() in ENDINGS else Path(f"{name}{self._ending}")
        if not self._dots and "." in path.with_suffix("").as_posix():
            raise RequestError(f"name: a name in shards may hold no dot, got {shorten(name)}")
        files = tuple(one.as_posix() for one in numbered(path, count))
        if not is_portable(files[-1]):
            raise RequestError(f"name: expected a shorter name, got {shorten(name)}")
        folded = [unicodedata.normalize("NFC", file).casefold() for file in files]
        if not self._dots:  # Two pictures of a shard may not have one key.
            folded = [one.rpartition(".")[0] for one in folded]
        folders = {str(parent) for one in folded for parent in Path(one).parents} - {"."}
        for one in folded:
            other = self._taken.get(one) or self._folders.get(one)
            if other:
                raise RequestError(f"name: {clip(files[0])} would be a second picture of the name in line {other}")
        for folder in folders:
            if folder in self._taken:
                raise RequestError(f"name: {clip(folder)} is the name of a picture in line {self._taken[folder]}")
        self._taken |= dict.fromkeys(folded, line)
        self._folders |= dict.fromkeys(folders, line)
        return files


def read_tasks(lines: Iterable[tuple[int, bytes]], reader: Reader) -> tuple[list[Task], list[Failure]]:
    """Read all lines, given with their numbers. Returns the valid ones, and the others with their problems."""
    tasks: list[Task] = []
    failures: list[Failure] = []
    for number, data in lines:
        try:
            tasks.append(reader.read(number, data))
        except TiueError as error:
            failures.append(Failure(number, str(error)))
    return tasks, failures


def with_seeds(tasks: Iterable[Task], first: int) -> list[Task]:
    """Give pictures of lines without a seed the seeds from `first` on, in their order."""
    seeded: list[Task] = []
    for task in tasks:
        if task.options.get("seed") is None:
            options: RequestOptions = {**task.options, "seed": first % SEED_LIMIT}
            task = replace(task, options=options)
            first += len(task.files)
        seeded.append(task)
    return seeded
