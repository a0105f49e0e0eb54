"""Bodies that nobody would send by mistake: never an error of the server, never a word about this machine."""

import json
from pathlib import Path

import pytest

pytest.importorskip("starlette")
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from tiue_runtime.serve.app import create_app
from tiue_runtime.serve.image_request import _FIELDS
from tiue_runtime.serve.server_settings import ServerSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of unknown words and long prompts

DRAW = "/v1/images/generations"
TYPES = ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", ""]

LIKELY = ["a", "auto", "8x8", "12x8", "png", "jpeg", "webp", "url", "b64_json", "tiny", "high", 0, 1, 2, 4, 2**63, 0.5]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(LIKELY)
nested = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)  # noqa: E731
values = st.recursive(scalars, nested)
names = st.sampled_from(_FIELDS) | st.text(max_size=10)
objects = st.dictionaries(names, values, max_size=8).map(lambda fields: {"prompt": "a", **fields})


@pytest.fixture(scope="module")
def client(pipe):
    app = create_app({"tiny": pipe}, ServerSettings(most_pixels=4096, most_pictures=2))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=True) as client:
        yield client


def check(answer):
    assert answer.status_code in (200, 400, 413, 415, 504), answer.text
    assert str(Path.home()) not in answer.text and "tiue_runtime/" not in answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert isinstance(error["message"], str) and error["message"].isprintable() and len(error["message"]) <= 1200
        assert error["param"] is None or isinstance(error["param"], str)


SLOW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(fields=objects)
@SLOW
def test_objects(client, fields):
    check(client.post(DRAW, content=json.dumps(fields), headers={"content-type": "application/json"}))


@given(body=st.binary(max_size=200), kind=st.sampled_from(TYPES))
@SLOW
def test_bytes(client, body, kind):
    check(client.post(DRAW, content=body, headers={"content-type": kind}))


texts = st.text(max_size=20) | st.sampled_from([str(value) for value in LIKELY])


@given(fields=st.dictionaries(names, texts, max_size=8))
@SLOW
def test_forms(client, fields):
    fields = {name.encode("utf-8", "replace").decode(): value.encode("utf-8", "replace").decode()
              for name, value in fields.items()}  # fmt: skip
    check(client.post(DRAW, data=fields))


@given(header=st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=50))
@SLOW
def test_headers(client, header):
    for name in ("host", "origin", "authorization", "x-request-id", "content-type"):
        answer = client.post(DRAW, content=b"{}", headers={name: header.encode("latin-1")})
        assert 400 <= answer.status_code < 500
