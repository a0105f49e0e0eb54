"""Who may ask the server: Host headers, origins of pages, the key, and limits."""

import pytest
from tiue_runtime import RequestError

pytest.importorskip("starlette")
from starlette.testclient import TestClient
from tiue_runtime.serve.app import create_app
from tiue_runtime.serve.server_settings import ServerSettings

URL = "http://127.0.0.1:8080"
DRAW = "/v1/images/generations"


@pytest.fixture
def served(pipe):
    """served(name=value, ...) => a client of a server with these settings."""
    clients = []

    def make(**settings):
        clients.append(TestClient(create_app({"tiny": pipe}, ServerSettings(**settings)), base_url=URL))
        return clients[-1].__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


OWN = ["localhost", "LOCALHOST:8080", "localhost.", "localhost.:80", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:8080"]
OWN += ["192.168.1.5:8080", "[fe80::1]:8080"]  # addresses cannot be made to lead elsewhere
FOREIGN = ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "localhost@evil"]
FOREIGN += [
    "",
    " ",
    "localhost:x",
    "localhost:8080:8080",
    "[::1",
    "::1",
    "0x7f.1",
    "2130706433",
    "127.1",
    "localhost..",
]
FOREIGN += ["localhost/evil", "local host", "localhost#", "[localhost]"]


@pytest.mark.parametrize("host", OWN)
def test_names_of_this_machine_are_answered(served, host):
    client = served()
    assert client.get("/health", headers={"host": host}).status_code == 200
    assert client.post(DRAW, json={"prompt": "a"}, headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_names_are_refused(served, host, method):
    answer = served().request(method, DRAW if method == "POST" else "/v1/models", headers={"host": host})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"


def test_named_hosts_are_answered(served):
    client = served(hosts=("Draw.example.org",))
    for host in ("draw.example.org", "DRAW.example.org:443", "draw.example.org."):
        assert client.get("/health", headers={"host": host}).status_code == 200
    assert client.get("/health", headers={"host": "other.example.org"}).status_code == 403


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://127.0.0.1:3000", "null", "http://localhost:8080", "", "http://[", "file://"],
)
def test_pages_of_other_origins_change_nothing(served, method, origin):
    answer = served().request(method, DRAW, json={"prompt": "a"}, headers={"origin": origin})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"


def test_a_foreign_page_whose_origin_is_hidden_changes_nothing(served):
    for site in ("cross-site", "same-site"):
        answer = served().post(DRAW, json={"prompt": "a"}, headers={"sec-fetch-site": site})
        assert answer.status_code == 403 and "pages of 'others' may not draw" in answer.text
    for site in ("none", "same-origin"):
        assert served().post(DRAW, json={"prompt": "a"}, headers={"sec-fetch-site": site}).status_code == 200


def test_the_own_page_and_programs_draw(served):
    client = served()
    assert client.post(DRAW, json={"prompt": "a"}, headers={"origin": URL}).status_code == 200
    assert client.post(DRAW, json={"prompt": "a"}).status_code == 200


def test_without_named_origins_no_page_reads_anything(served):
    answer = served().get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_named_origins_draw_and_read_errors_too(served):
    origin = "https://draw.example.org"
    client = served(origins=(origin,), api_key="secret")
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type, x-stainless-os",  # as the client of OpenAI
    }
    answer = client.options(DRAW, headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    headers = {"origin": origin, "authorization": "Bearer secret"}
    for fields, extra in (({"prompt": "a"}, headers), ({"prompt": 1}, headers), ({"prompt": "a"}, {"origin": origin})):
        assert client.post(DRAW, json=fields, headers=extra).headers["access-control-allow-origin"] == origin
    exposed = client.post(DRAW, json={"prompt": "a"}, headers=headers).headers["access-control-expose-headers"]
    assert set(exposed.split(", ")) == {"x-request-id", "retry-after", "x-should-retry"}
    evil = {**asked, "origin": "https://evil.example"}
    assert "access-control-allow-origin" not in client.options(DRAW, headers=evil).headers
    assert (
        client.post(DRAW, json={"prompt": "a"}, headers={**headers, "origin": "https://evil.example"}).status_code
        == 403
    )


@pytest.mark.parametrize(
    ("named", "origin"),  # as an operator names it, and as browsers send it
    [
        ("HTTPS://Draw.Example.org", "https://draw.example.org"),
        ("https://draw.example.org:443", "https://draw.example.org"),
        ("http://draw.example.org:80", "http://draw.example.org"),
        ("http://draw.example.org:443", "http://draw.example.org:443"),
    ],
)
def test_origins_are_known_however_they_are_named(served, named, origin):
    client = served(origins=(named,))
    answer = client.options(DRAW, headers={"origin": origin, "access-control-request-method": "POST"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    assert client.post(DRAW, json={"prompt": "a"}, headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize(
    "given",
    [None, "", "secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secrett", "Basic secret", "Bearer sécret"],
)
def test_a_wrong_key_is_refused(served, given):
    headers = {} if given is None else {"authorization": given.encode()}
    client = served(api_key="secret")
    for method, address in (("POST", DRAW), ("GET", "/v1/models"), ("GET", "/metrics"), ("DELETE", "/v1/jobs/x")):
        answer = client.request(method, address, headers=headers)
        assert answer.status_code == 401, (method, address)
        assert answer.headers["www-authenticate"] == "Bearer" and answer.json()["error"]["code"] == "invalid_api_key"


def test_the_right_key_is_accepted_and_some_addresses_need_none(served):
    client = served(api_key="secret")
    for scheme in ("Bearer", "bearer"):
        answer = client.post(DRAW, json={"prompt": "a"}, headers={"authorization": f"{scheme} secret"})
        assert answer.status_code == 200
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code in (200, 503)
    assert client.get("/v1/pictures/none.png").status_code == 404
    assert client.get("/page/../v1/models").status_code in (401, 404)


def test_bodies_have_a_limit_with_and_without_a_length(served):
    client = served(most_body=2048)
    large = b'{"prompt": "' + b"a" * 3000 + b'"}'
    headers = {"content-type": "application/json"}
    for content in (large, (large[i : i + 100] for i in range(0, len(large), 100))):
        for address in (DRAW, "/v1/images/edits"):
            answer = client.post(address, content=content, headers=headers)
            assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
            content = large
    assert client.post(DRAW, content=b"{}", headers={**headers, "content-length": "9" * 30}).status_code == 413


def test_other_limits(served):
    client = served(most_prompt=5, most_pictures=2, most_pixels=256)
    for fields, param in (
        ({"prompt": "a" * 6}, "prompt"),
        ({"prompt": "a", "n": 3}, "n"),
        ({"prompt": "a", "size": "17x16"}, "size"),
    ):
        answer = client.post(DRAW, json=fields)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert client.post(DRAW, json={"prompt": "heart"[:5], "n": 2, "size": "16x16"}).status_code == 200


def test_no_address_answers_with_a_path_of_this_machine(served):
    client = served()
    for address in (
        "/page/../../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page//etc/passwd",
        "/v1/jobs/%00",
    ):
        answer = client.get(address)
        assert answer.status_code == 404 and "tiue_runtime" not in answer.text, address


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key": ""},
        {"api_key": "  "},
        {"api_key": " a"},
        {"api_key": "a\nb"},
        {"api_key": "é"},
        {"origins": ("*",)},
        {"origins": ("example.org",)},
        {"origins": ("https://example.org/path",)},
        {"hosts": ("*",)},
        {"hosts": ("example.org:80",)},
        {"hosts": ("",)},
        {"most_waiting": 0},
        {"most_body": 10},
        {"batch": 0},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"grace": -1},
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(RequestError):
        ServerSettings(**settings)


def test_the_key_is_in_no_repr():
    assert "secret" not in repr(ServerSettings(api_key="secret"))
