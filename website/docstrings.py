"""What the API page says about attributes and options, for griffe, which reads the docstrings.

This project describes an attribute where it is declared: in its annotation, `Annotated[int, Field("Pixels.")]`, or in
a comment at the end of its line. The options of a request stand in a docstring as `{options}`.
"""

import importlib
import re
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import griffe


class Described(griffe.Extension):
    """Gives attributes and options the descriptions that stand beside them."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Describe the attributes of a class."""
        hints = _hints(cls.path)
        for name, attribute in cls.attributes.items():
            if attribute.is_alias:
                continue  # It is described where it is declared.
            attribute.labels -= {"instance-attribute", "class-attribute"}  # They say nothing to a reader.
            text = _in_annotation(hints.get(name)) or _in_comment(cls, name)
            if text and not attribute.docstring:
                attribute.docstring = griffe.Docstring(text, parent=attribute)
            if _in_annotation(hints.get(name)):
                attribute.annotation = _shown(get_args(hints[name])[0])

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Name the options, where the running program lists them."""
        if func.docstring and "{options}" in func.docstring.value:
            lines = func.docstring.value.splitlines()
            kept = [line.rstrip(":") if "options of" in line else line for line in lines if "{options}" not in line]
            func.docstring.value = "\n".join(kept)


def _hints(path: str) -> dict[str, Any]:
    """Return the annotations of a class, or none if it cannot be imported by its path."""
    module, _, name = path.rpartition(".")
    try:
        return get_type_hints(getattr(importlib.import_module(module), name), include_extras=True)
    except (ImportError, AttributeError, NameError):  # A class within a class, or names for type checkers only.
        return {}


def _in_annotation(hint: Any) -> str:
    """Return the description in Annotated[type, Option("...")] or Annotated[type, Field("...")], or ""."""
    if get_origin(hint) is not Annotated:
        return ""
    note = get_args(hint)[1]
    return getattr(note, "help", None) or getattr(note, "doc", None) or ""


def _in_comment(cls: griffe.Class, name: str) -> str:
    """Return the comment at the end of an attribute's line, or ""."""
    found = re.search(rf"^ +{name}: [^#\n]*# *(.+)$", "\n".join(cls.lines), re.M)
    return found[1] if found else ""


def _shown(kind: Any) -> str:
    """Return a type as people write it."""
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", re.sub(r"^typing\.Optional\[(.*)\]$", r"\1 | None", text))
