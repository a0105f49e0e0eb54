"""Make bundle.schema.json, the JSON schema of bundle.json, from the dataclasses in manifest.py.

python make_schema.py

The schema limits each value by itself. Relations between values are described in docs/bundle.md and checked by
`Manifest`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from tiue_runtime import bundle
from tiue_runtime.bundle.fields import STEPS_PATTERN, TEXT_PATTERN, Field, fields_of, unwrap
from tiue_runtime.bundle.manifest import FORMAT, Manifest

SCHEMA = Path(bundle.__file__).with_name("bundle.schema.json")


def bundle_schema() -> dict[str, Any]:
    """Return the schema, of JSON Schema 2020-12."""
    schema = _object(Manifest)
    about = {"const": FORMAT, "description": "The version of this format."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "bundle.json of a TiUE bundle",
        **schema,
        "required": ["format", *schema["required"]],
        "properties": {"format": about, **schema["properties"]},
    }


def _schema(hint: Any) -> dict[str, Any]:
    kind, note = unwrap(hint)
    about = {"description": note.doc} if note.doc else {}
    if dataclasses.is_dataclass(kind):
        return {**about, **_object(kind)}
    if get_origin(kind) is tuple:
        return {**about, **_list(get_args(kind), note)}
    if kind is str:
        return {**about, **_string(note)}
    if kind is bool:
        return {**about, "type": "boolean"}
    if kind in (int, float):
        bounds = {"minimum": note.least, "maximum": note.most}
        limits = {key: value for key, value in bounds.items() if value is not None}
        return {**about, "type": "integer" if kind is int else "number", **limits}
    if not issubclass(get_origin(kind), Mapping):
        raise TypeError(f"no schema for {kind}")
    key_kind, item = get_args(kind)
    keys = {"propertyNames": {"pattern": STEPS_PATTERN}} if key_kind is int else {}
    limits = {"minProperties": note.shortest, "maxProperties": note.longest}
    return {**about, "type": "object", **limits, **keys, "additionalProperties": _schema(item)}


def _string(note: Field) -> dict[str, Any]:
    if note.choices:
        return {"type": "string", "enum": list(note.choices)}
    if note.pattern:
        return {"type": "string", "pattern": note.pattern}
    return {"type": "string", "minLength": note.shortest, "maxLength": note.longest, "pattern": TEXT_PATTERN}


def _list(items: tuple[Any, ...], note: Field) -> dict[str, Any]:
    varies = items[-1] is ...
    shortest, longest = (note.shortest, note.longest) if varies else (len(items), len(items))
    return {"type": "array", "minItems": shortest, "maxItems": longest, "items": _schema(items[0])}


def _object(cls: Any) -> dict[str, Any]:
    fields = fields_of(cls)
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, (_, required) in fields.items() if required],
        "properties": {name: _schema(hint) for name, (hint, _) in fields.items()},
    }


def written() -> str:
    """Return the text of the file: one field of bundle.json a line."""
    schema = bundle_schema()
    lines = [f"    {json.dumps(name)}: {json.dumps(field)}" for name, field in schema.pop("properties").items()]
    text = json.dumps({**schema, "properties": {}}, indent=2)
    return text.replace('"properties": {}', '"properties": {\n' + ",\n".join(lines) + "\n  }") + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(written(), encoding="utf-8")
