"""Requests and answers of the server, on Starlette's test client."""

import asyncio
import base64
import io
import json
import mimetypes

import pytest
from gate import WAIT, Gate, eventually
from PIL import Image
from tiue_runtime import read_record

pytest.importorskip("starlette")
from starlette.testclient import TestClient
from tiue_runtime.serve.app import create_app
from tiue_runtime.serve.jobs import Drawing
from tiue_runtime.serve.server_settings import ServerSettings

URL = "http://127.0.0.1:8080"
DRAW = "/v1/images/generations"


@pytest.fixture
def client(pipe):
    with TestClient(create_app({"tiny": pipe}), base_url=URL) as client:
        yield client


@pytest.fixture
def with_settings(pipe):
    """with_settings(name=value, ...) => a client of a server with these settings."""
    clients = []

    def make(base_url=URL, **settings):
        clients.append(TestClient(create_app({"tiny": pipe}, ServerSettings(**settings)), base_url=base_url))
        return clients[-1].__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def decoded(item):
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def draw(client, **fields):
    answer = client.post(DRAW, json={"prompt": "a red heart", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(answer, status, param=None):
    """Check the form of an error, and return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] and error["code"]
    assert error["param"] == param, error
    assert answer.headers["x-request-id"]
    return error["message"]


def events(text):
    """The data of each event of a stream, and its name."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event"), json.loads(lines["data"])))
    return found


def test_a_picture_equals_that_of_the_library(client, pipe):
    answer = draw(client, seed=3)
    (item,) = answer["data"]
    assert decoded(item).tobytes() == pipe("a red heart", seed=3).images[0].tobytes()
    assert answer["size"] == "12x8" and answer["output_format"] == "png" and answer["created"] > 1.7e9
    assert answer["tiue"]["seeds"] == [3] and answer["tiue"]["bundle"] == "tiny"
    assert {"waiting", "total", "unet_decoder"} <= set(answer["tiue"]["timings"])
    usage = answer["usage"]
    assert usage["input_tokens"] == 5 == usage["total_tokens"] == usage["input_tokens_details"]["text_tokens"]


def test_several_pictures_have_consecutive_seeds(client, pipe):
    answer = draw(client, seed=7, n=3)
    assert answer["tiue"]["seeds"] == [7, 8, 9]
    for seed, item in zip((7, 8, 9), answer["data"], strict=True):
        assert decoded(item).tobytes() == pipe("a red heart", seed=seed).images[0].tobytes()


def test_without_a_seed_each_request_has_another(client):
    assert draw(client)["tiue"]["seeds"] != draw(client)["tiue"]["seeds"]


@pytest.mark.parametrize("name", ["steps", "num_inference_steps"])
def test_steps_by_both_names(client, pipe, name):
    (item,) = draw(client, seed=1, **{name: 2})["data"]
    assert decoded(item).tobytes() == pipe("a red heart", seed=1, steps=2).images[0].tobytes()


@pytest.mark.parametrize(("format", "pillow"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_and_their_records(client, tmp_path, format, pillow):
    answer = draw(client, seed=1, output_format=format)
    assert answer["output_format"] == format and decoded(answer["data"][0]).format == pillow
    path = tmp_path / f"picture.{format}"
    path.write_bytes(base64.b64decode(answer["data"][0]["b64_json"]))
    assert read_record(path).prompt == "a red heart"


def test_compression_decides_the_size_of_files(client):
    sizes = [
        len(draw(client, seed=1, size="96x64", output_format="jpeg", output_compression=c)["data"][0]["b64_json"])
        for c in (0, 50, 100)
    ]
    assert sizes == sorted(set(sizes))


def test_metadata_can_be_left_out(with_settings):
    (item,) = draw(with_settings(metadata=False), seed=1)["data"]
    data = base64.b64decode(item["b64_json"])
    assert b"a red heart" not in data and b"trainedAlgorithmicMedia" in data


@pytest.mark.parametrize(
    ("size", "inner"),
    [
        ("24x16", (0, 0, 24, 16)),  # the same proportions
        ("6x4", (0, 0, 6, 4)),
        ("24x24", (0, 4, 24, 20)),  # borders above and below
        ("36x16", (6, 0, 30, 16)),  # and on both sides
        ("1x1", (0, 0, 1, 1)),
    ],
)
def test_other_sizes_are_drawn_at_the_nearest_size_and_resized(client, pipe, size, inner):
    answer = draw(client, seed=3, size=size)
    picture = decoded(answer["data"][0])
    assert answer["size"] == size == "{}x{}".format(*picture.size) and answer["tiue"]["drawn_size"] == "12x8"
    wanted = inner[2] - inner[0], inner[3] - inner[1]
    expected = pipe("a red heart", seed=3).images[0].resize(wanted, Image.Resampling.LANCZOS)
    assert picture.crop(inner).tobytes() == expected.tobytes()
    borders = {picture.getpixel((x, y)) for x in range(picture.width) for y in range(picture.height)
               if not (inner[0] <= x < inner[2] and inner[1] <= y < inner[3])}  # fmt: skip
    assert len(borders) <= 1


def test_auto_is_the_default_size(client):
    assert draw(client, size="auto")["size"] == "12x8"


def test_fields_that_a_student_has_no_use_for_are_accepted(client):
    fields = {"quality": "hd", "style": "vivid", "background": "auto", "moderation": "low", "user": "me"}
    assert draw(client, seed=1, **fields)["data"] == draw(client, seed=1, n=None, size=None)["data"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a" * 4001}, "prompt"),
        ({"model": "dall-e-3"}, "model"),
        ({"model": 1}, "model"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 1.0}, "n"),
        ({"n": True}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "0x8"}, "size"),
        ({"size": "-8x8"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "٣x٣"}, "size"),
        ({"size": [8, 8]}, "size"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "PNG"}, "output_format"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression"),
        ({"output_compression": 50}, "output_compression"),
        ({"response_format": "file"}, "response_format"),
        ({"response_format": "url", "stream": True}, "response_format"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"partial_images": 1}, "partial_images"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 2**64 - 1, "n": 2}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"steps": 3}, "steps"),
        ({"num_inference_steps": 50}, "num_inference_steps"),
        ({"steps": 2, "num_inference_steps": 4}, "num_inference_steps"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": 1e9}, "timeout"),
        ({"quality": "best"}, "quality"),
        ({"background": "transparent"}, "background"),
        ({"user": 1}, "user"),
        ({"negative_prompt": "blur"}, "negative_prompt"),
        ({"guidance_scale": 7.5}, "guidance_scale"),
        ({"lora": "x"}, "lora"),
    ],
)
def test_wrong_values_are_refused_by_name(client, fields, param):
    answer = client.post(DRAW, json={"prompt": "a", **fields})
    assert param in refused(answer, 400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"a"',
        b"{",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "seed": NaN}',
        b'{"prompt": "a", "seed": Infinity}',
        b'{"prompt": "a", "seed": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "user": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b'\xef\xbb\xbf{"prompt": "a"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "size": "\\ud800"}',
        b'{"prompt": "a", "\\u0000": "\\u0000"}',
    ],
)
def test_hostile_json_is_a_mistake_of_the_client(client, body):
    answer = client.post(DRAW, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert len(answer.content) < 1000
    assert answer.json()["error"]["message"]


def test_a_client_that_hangs_up_while_it_sends_is_no_failure(client, caplog):
    scope = {
        "type": "http", "http_version": "1.1", "scheme": "http", "method": "POST", "path": DRAW, "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-length", b"100")],
    }  # fmt: skip
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 499 and not caplog.records


def test_a_server_that_ends_before_it_is_ready_ends_in_order(pipe):
    app = create_app({"tiny": pipe})
    app.state.queues["tiny"].close()
    with TestClient(app, base_url=URL) as client:
        assert client.get("/ready").status_code == 503


def test_forms(client, pipe):
    fields = {"prompt": "a red heart", "n": "2", "seed": "3", "output_format": "png", "stream": "false", "timeout": "9"}
    for options in ({"data": fields}, {"files": {name: (None, value) for name, value in fields.items()}}):
        answer = client.post(DRAW, **options).json()
        assert decoded(answer["data"][1]).tobytes() == pipe("a red heart", seed=4).images[0].tobytes()
    refused(client.post(DRAW, data={**fields, "n": "two"}), 400, "n")
    refused(client.post(DRAW, files={"prompt": ("a.txt", b"a")}), 400)
    refused(client.post(DRAW, content="prompt=a&prompt=b", headers={"content-type": FORM}), 400, "prompt")
    assert "application/json" in refused(client.post(DRAW, content='{"a": 1}', headers={"content-type": FORM}), 415)
    refused(client.post(DRAW, content="--x", headers={"content-type": "multipart/form-data"}), 400)
    for bad in (b"prompt=%ff", b"prompt=\xff", b"prompt=a&%c3=b"):  # not UTF-8
        assert "UTF-8" in refused(client.post(DRAW, content=bad, headers={"content-type": FORM}), 400)
    assert "UTF-8" in refused(client.post(DRAW, files={"prompt": (None, b"\xe9")}), 400)
    assert client.post(DRAW, data={"prompt": "a red heart", "user": "caf\u00e9 %ff \ufffd"}).status_code == 200
    refused(client.post(DRAW, content="a", headers={"content-type": "text/plain"}), 415)


def test_a_form_is_a_form_whatever_its_boundary(client):
    fields = b"".join(
        b'--xJSONx\r\ncontent-disposition: form-data; name="%b"\r\n\r\n%b\r\n' % field
        for field in ((b"prompt", b"a red heart"), (b"n", b"2"))
    )
    headers = {"content-type": "multipart/form-data; boundary=xJSONx"}
    answer = client.post(DRAW, content=fields + b"--xJSONx--\r\n", headers=headers)
    assert answer.status_code == 200 and len(answer.json()["data"]) == 2, answer.text
    headers = {"content-type": "application/json; charset=form"}
    assert "integer" in refused(client.post(DRAW, content=b'{"prompt": "a", "n": "2"}', headers=headers), 400, "n")


FORM = "application/x-www-form-urlencoded"


def test_a_stream_shows_pictures_while_they_are_drawn(client, pipe):
    answer = client.post(DRAW, json={"prompt": "a red heart", "seed": 3, "stream": True, "partial_images": 3, "n": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    kinds = [name.removeprefix("image_generation.") for name, _ in found]
    assert kinds == [*["partial_image"] * 3, "completed"] * 2
    assert all(name == data["type"] for name, data in found)
    partial = {"partial_image_index", "b64_json", "created_at", "size", "quality", "background", "output_format"}
    assert [data["partial_image_index"] for _, data in found if "partial_image_index" in data] == [0, 1, 2, 0, 1, 2]
    for index, (_, data) in enumerate(found):
        wanted = partial if "partial_image_index" in data else partial - {"partial_image_index"} | {"usage"}
        assert set(data) == wanted | {"type", "tiue"}
        assert decoded(data).size == (12, 8) and data["tiue"]["index"] == index // 4
    done = [data for name, data in found if name.endswith("completed")]
    for seed, data in zip((3, 4), done, strict=True):
        expected = pipe("a red heart", seed=seed, memory="sequential").images[0]
        assert decoded(data).tobytes() == expected.tobytes() and data["tiue"]["seeds"] == [seed]


def test_events_of_a_stream_have_the_times_so_far(client):
    found = events(client.post(DRAW, json={"prompt": "a red heart", "stream": True, "n": 3}).text)
    times = [data["tiue"]["timings"] for _, data in found]
    assert all({"waiting", "text_encoder", "unet_decoder", "vae_decoder", "total"} <= set(each) for each in times)
    totals = [each["total"] for each in times]
    assert len(totals) == 3 and totals == sorted(set(totals))
    assert 'tiue_wait_seconds_count{model="tiny"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize(("steps", "asked", "shown"), [(4, 0, 0), (4, 1, 1), (4, 2, 2), (4, 3, 3), (2, 3, 2)])
def test_as_many_partial_pictures_as_there_are_timesteps(client, steps, asked, shown):
    fields = {"prompt": "a", "stream": True, "partial_images": asked, "steps": steps, "output_format": "jpeg"}
    found = events(client.post(DRAW, json=fields).text)
    assert len(found) == shown + 1
    assert all(decoded(data).format == "JPEG" for _, data in found)


def test_pictures_by_url(with_settings, pipe):
    client = with_settings(kept_pictures=2, api_key="secret")
    key = {"authorization": "Bearer secret"}
    fields = {"prompt": "a red heart", "seed": 3, "response_format": "url", "output_format": "webp"}
    urls = [client.post(DRAW, json=fields, headers=key).json()["data"][0]["url"] for _ in range(3)]
    assert all(url.startswith(f"{URL}/v1/pictures/") and url.endswith(".webp") for url in urls)
    refused(client.get(urls[0]), 404)  # two are kept
    answer = client.get(urls[2])  # whoever knows the name needs no key
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (12, 8)


def test_kept_pictures_have_limits_of_bytes_and_time(monkeypatch):
    from tiue_runtime.serve import kept_pictures

    now = [0.0]
    monkeypatch.setattr(kept_pictures.time, "monotonic", lambda: now[0])
    kept = kept_pictures.KeptPictures(10, 100, 60)
    names = [kept.keep(b"x" * 40, "png") for _ in range(3)]
    assert [kept.get(name) is not None for name in names] == [False, True, True]
    large = kept.keep(b"x" * 200, "png")
    assert kept.get(large) and not kept.get(names[2])
    now[0] = 61
    assert not kept.get(large)


def test_models(client, pipe):
    (model,) = client.get("/v1/models").json()["data"]
    assert model == {"id": "tiny", "object": "model", "created": 0, "owned_by": "tiue"}
    facts = client.get("/v1/models/tiny").json()["tiue"]
    assert facts["sizes"] == ["12x8"] and facts["steps"] == [2, 4] and "a red heart" in facts["examples"]
    refused(client.get("/v1/models/other"), 404, "model")


def test_several_models(pipe, heavy_pipe):
    app = create_app({"tiny": pipe, "heavy": heavy_pipe})
    with TestClient(app, base_url=URL) as client:
        assert draw(client)["size"] == "12x8"
        assert draw(client, model="heavy")["size"] == "128x128"
        assert len(client.get("/v1/models").json()["data"]) == 2


@pytest.mark.parametrize("address", ["/v1/images/edits", "/v1/images/variations"])
def test_edits_are_refused_with_a_reason(client, address):
    files = {"image": ("a.png", b"x" * 1000, "image/png")}
    assert "prompt" in refused(client.post(address, data={"prompt": "a"}, files=files), 400)


def test_scripts_of_the_page_are_scripts_whatever_the_system_says(with_settings, monkeypatch):
    mimetypes.init()
    monkeypatch.setitem(mimetypes.types_map, ".js", "text/plain")  # as in the registry of many a Windows
    answer = with_settings().get("/page/main.js")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/javascript")


def test_addresses_and_methods_that_do_not_exist(client):
    refused(client.get("/v1/nothing"), 404)
    for answer in (client.get(DRAW), client.post("/health")):
        refused(answer, 405)
        assert answer.json()["error"]["code"] == "method_not_allowed" and answer.headers["allow"]


def test_health_ready_and_figures(client):
    assert client.get("/health").json() == {"status": "ok"}
    draw(client, n=2)
    assert client.get("/ready").status_code == 200
    text = client.get("/metrics").text
    for line in (
        'tiue_requests_total{endpoint="generate",status="200"} 1.0',
        'tiue_queue_waiting{model="tiny"} 0.0',
        'tiue_stage_seconds_count{model="tiny",stage="vae_decoder"}',
        'tiue_wait_seconds_count{model="tiny"} 1.0',
    ):
        assert line in text, line


def test_request_ids(client):
    given = client.get("/health", headers={"x-request-id": "my-request_1"})
    assert given.headers["x-request-id"] == "my-request_1"
    for bad in ("short", "x" * 65, "with spaces in it"):
        assert client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_jobs_are_found_by_the_id_of_their_request(client):
    answer = client.post(DRAW, json={"prompt": "a", "n": 2}, headers={"x-request-id": "my-request_1"})
    assert answer.status_code == 200
    job = client.get("/v1/jobs/my-request_1").json()
    assert job["status"] == "done" and job["progress"] == 1 and job["pictures"] == job["of"] == 2
    assert client.delete("/v1/jobs/my-request_1").json()["cancelled"] is False
    refused(client.get("/v1/jobs/other"), 404, "id")
    refused(client.delete("/v1/jobs/other"), 404, "id")


def test_of_two_jobs_with_one_id_the_one_that_runs_is_meant(pipe):
    gate = Gate(pipe)
    app = create_app({"first": pipe, "second": gate})
    with TestClient(app, base_url=URL) as client:
        first, second = app.state.queues.values()
        first.submit(Drawing("a", seed=1), id="my-request_1").future.result(WAIT)
        second.submit(Drawing("a", seed=1), id="my-request_1")
        assert gate.entered.wait(WAIT)
        assert client.get("/v1/jobs/my-request_1").json()["status"] == "running"
        assert client.delete("/v1/jobs/my-request_1").json()["cancelled"] is True


def test_the_end_of_a_stream_leaves_a_later_request_with_its_id_alone(pipe):
    """A client reads nothing of its stream, tries again with the same id, and then hangs up."""
    gate = Gate(pipe)
    app = create_app({"tiny": gate})
    queue = app.state.queues["tiny"]
    headers = {"host": "localhost", "content-type": "application/json", "x-request-id": "retry-0001"}
    scope = {
        "type": "http", "http_version": "1.1", "scheme": "http", "method": "POST", "path": DRAW, "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip

    async def draw():
        hangs_up = asyncio.Event()
        bodies = [json.dumps({"prompt": "a red heart", "stream": True}).encode()]

        async def receive():
            if bodies:
                return {"type": "http.request", "body": bodies.pop()}
            await hangs_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            await hangs_up.wait()

        stream = asyncio.create_task(app(scope, receive, send))
        await asyncio.to_thread(eventually, lambda: (job := queue.job("retry-0001")) and job.ended)
        gate.open.clear()
        later = queue.submit(Drawing("a red heart", seed=1), id="retry-0001")
        hangs_up.set()
        await stream
        gate.open.set()
        return await asyncio.to_thread(later.future.result, WAIT)

    gate.open.set()
    try:
        assert len(asyncio.run(draw()).pictures) == 1
    finally:
        queue.close()


def test_a_time_that_is_over(client, monkeypatch):
    answer = client.post(DRAW, json={"prompt": "a", "timeout": 1e-9})
    assert "timeout" in refused(answer, 504, "timeout")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("/home/me/secret/model.onnx is damaged"), 500),
        (MemoryError("/home/me"), 503),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_that_nobody_expected_name_no_path(pipe, error, status, stream, caplog):
    class Broken:
        def __getattr__(self, name):
            return getattr(pipe, name)

        def __call__(self, *_, **__):
            raise error

    with TestClient(create_app({"tiny": Broken()}), base_url=URL) as client:
        answer = client.post(DRAW, json={"prompt": "a", "stream": stream})
        if stream:
            ((_, data),) = events(answer.text)
            assert data["error"]["message"] and data["error"]["type"] == "server_error"
        else:
            refused(answer, status)
    assert "/home" not in answer.text
    assert "/home/me" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_into_the_file_is_a_mistake_of_the_client(with_settings, stream):
    client = with_settings(most_prompt=100_000)
    fields = {"prompt": "a red heart " * 8000, "output_format": "jpeg", "stream": stream}
    with pytest.warns(UserWarning, match="longer than 8 tokens"):
        answer = client.post(DRAW, json=fields)
    error = events(answer.text)[0][1]["error"] if stream else answer.json()["error"]
    assert error["param"] == "prompt" and "too long" in error["message"]


def test_a_server_needs_a_model():
    with pytest.raises(ValueError, match="at least one model"):
        create_app({})


def test_warnings_are_in_the_answer_of_an_application_without_serve(pipe):
    with TestClient(create_app({"tiny": pipe}), base_url=URL) as client:
        for _ in range(2):
            (warning,) = draw(client, prompt="an elephant")["tiue"]["warnings"]
            assert "knows no word of 'an elephant'" in warning
