"""bundle.schema.json, which describes bundle.json for readers in other languages."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiue_runtime import bundle
from tiue_runtime.errors import BundleError

ROOT = Path(__file__).parents[2]
BUNDLES = sorted(path for place in ("runtime/tests/data", "models") for path in (ROOT / place).rglob("bundle.json"))

_spec = importlib.util.spec_from_file_location("make_schema", Path(__file__).with_name("make_schema.py"))
make_schema = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_schema)


def test_the_schema_is_up_to_date():
    """`python make_schema.py` writes the schema."""
    written = make_schema.SCHEMA.read_text(encoding="utf-8")
    assert written == make_schema.written() and json.loads(written) == make_schema.bundle_schema()


def test_every_field_has_a_description():
    for name, schema in make_schema.bundle_schema()["properties"].items():
        assert schema.get("description"), name


def test_the_page_for_other_readers_names_every_field():
    page = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")

    def names(schema):
        for name, inner in schema.get("properties", {}).items():
            yield name
            yield from names(inner)
        for inner in ("items", "additionalProperties"):
            if isinstance(schema.get(inner), dict):
                yield from names(schema[inner])

    missing = {name for name in names(make_schema.bundle_schema()) if f"`{name}`" not in page}
    assert missing <= {"sha256", "size"} and '`{"sha256": ..., "size": ...}`' in page


def test_the_example_of_the_page_is_the_tiny_bundle(tiny):
    page = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    content = json.loads((tiny / "bundle.json").read_text(encoding="utf-8"))
    del content["files"]
    assert json.loads(page.split("```json\n")[1].split("```")[0]) == content


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is in the full environment only")
    schema = json.loads(make_schema.SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", BUNDLES, ids=lambda path: path.parent.name)
def test_committed_bundles_follow_the_schema(validator, path):
    validator.validate(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"name": ""},
        {"precision": "fp8"},
        {"vaes": ["large"]},
        {"text_length": 8.5},
        {"text_length": "8"},
        {"colour": 1},
        {"schedules": {"four": {}}},
        {"schedules": {"2": {"timesteps": [2, 1], "noise_weight": 1}}},
        {"preview": {"matrix": [[1, 2]], "bias": [0, 0, 0]}},
        {"sizes": [[8]]},
        {"files": {}},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_reader_refuses(validator, edit, change):
    directory = edit(lambda content: content.update(change))
    assert not validator.is_valid(json.loads((directory / "bundle.json").read_text(encoding="utf-8")))
    with pytest.raises(BundleError):
        bundle.Bundle.load(directory)
