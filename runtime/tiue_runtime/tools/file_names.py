"""Where pictures are saved: default names, templates, and names that no two pictures share."""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from tiue_runtime.bundle.manifest import is_portable
from tiue_runtime.errors import RequestError, clip
from tiue_runtime.saving import check_picture_path, numbered

FIELDS = ("prompt", "seed", "index", "width", "height", "steps", "bundle")
DEFAULT = "{prompt}-{seed}.png"

_CHECKED_FILES = 1000  # names that are tested before anything is drawn
_LONGEST = 60  # characters of a prompt in a name

Values = Mapping[str, str | int]
"""The value of each of FIELDS for one picture."""


def slug(text: str) -> str:
    """Return the words of a text as a part of a file name: "A red heart!" => "a-red-heart"."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", text.lower()))[:_LONGEST].strip("-") or "picture"
    while len(words.encode()) > 2 * _LONGEST:  # File systems count bytes.
        words = words[:-1]
    return words


class Template:
    """A file name with fields in braces, for example "{prompt}-{seed}.png".

    Args:
        text: the name. {index:03} pads a number with zeros, and {{ is a brace.

    Raises:
        RequestError: a field is unknown, or a brace stands alone.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise RequestError(
                f"out: expected a name such as {DEFAULT}, got {clip(text)!r}: {error}; write {{{{ for a brace"
            ) from error
        known = ", ".join(f"{{{field}}}" for field in FIELDS)
        for _, field, form, conversion in self._parts:
            if field is None:
                continue
            if field not in FIELDS or conversion:
                raise RequestError(f"out: unknown field {{{clip(field)}}}; the fields are {known}")
            if form and (field in ("prompt", "bundle") or not re.fullmatch(r"0?[1-9]\d?", form)):
                raise RequestError(f"out: expected a number of digits as in {{index:03}}, got {{{field}:{clip(form)}}}")

    def __call__(self, values: Values) -> Path:
        """Return the name of one picture. Texts in it are safe as parts of a name."""
        name = ""
        for literal, field, form, _ in self._parts:
            name += literal
            if field is not None:
                value = values[field]
                name += slug(value) if isinstance(value, str) else format(value, form or "")
        path = Path(name)
        if not is_portable(path.name) and is_portable(f"_{path.name}"):  # Windows reserves names such as con.png.
            path = path.with_name(f"_{path.name}")
        return path


class Target:
    """Where the pictures of a command go.

    Args:
        out: a file name, a template or a directory; None is the current directory.
        overwrite: replace files that exist. A plain name is an explicit wish, and is always replaced.
    """

    def __init__(self, out: str | None, overwrite: bool) -> None:
        is_folder = out is not None and (Path(out).is_dir() or out.endswith(("/", "\\")))
        self._folder = Path(out) if out is not None and is_folder else None
        self._template = Template(out) if out is not None and not is_folder and re.search("[{}]", out) else None
        self._plain = Path(out) if out is not None and not is_folder and not self._template else None
        self.overwrite = overwrite or self._plain is not None
        self._renames = self._template is None  # whether a name that is taken becomes another one

    def paths(self, pictures: Sequence[Values], default: str = DEFAULT) -> list[Path]:
        """Name pictures, by the template `default` if the user did not choose names, and test the first names.

        Raises:
            RequestError: two pictures have the same name, a file exists, or a file cannot be written.
        """
        if self._plain is not None:
            paths = list(numbered(self._plain, len(pictures)))
        else:
            template = self._template or Template(default)
            paths = [(self._folder or Path()) / template(values) for values in pictures]
        _refuse_twins(paths)
        for path in islice(paths, _CHECKED_FILES):
            if not self.overwrite and not self._renames and path.exists():
                raise RequestError(
                    f"out: {clip(str(path), 300)} exists already; pass --overwrite to replace it, or change the name"
                )
            self._check(path)
        return paths

    def save(self, path: Path, write: Callable[[Path], None]) -> Path:
        """Save a picture at its path. Returns the path, or a free one beside it if the path was chosen here.

        `write` writes a file. It raises FileExistsError if another process was quicker.
        """
        if self._plain is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        again, chosen = 1, path
        while True:
            try:
                if self.overwrite or not chosen.exists():
                    write(chosen)
                    return chosen
            except FileExistsError:
                pass  # Another process has just taken the name.
            if not self._renames:
                raise RequestError(f"out: {clip(str(path), 300)} exists since a moment ago; nothing was replaced")
            again += 1
            chosen = path.with_stem(f"{path.stem}-again-{again}")

    def _check(self, path: Path) -> None:
        folder = path.parent
        while self._plain is None and not folder.exists() and folder != folder.parent:
            folder = folder.parent  # Folders of templates are made when the first picture is there.
        check_picture_path(folder / path.name)


def _refuse_twins(paths: Iterable[Path]) -> None:
    """Raise RequestError if two names are the same on a system that ignores capitals."""
    seen: dict[str, int] = {}
    for index, path in enumerate(paths, start=1):
        other = seen.setdefault(unicodedata.normalize("NFC", str(path)).casefold(), index)
        if other != index:
            raise RequestError(
                f"out: pictures {other} and {index} would both be {clip(str(path), 300)}; "
                "add {index} or {seed} to the name"
            )
