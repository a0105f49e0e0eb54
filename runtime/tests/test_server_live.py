"""The server as clients meet it: real sockets, the client of OpenAI, hang-ups, a full queue, the end."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from gate import WAIT, Gate, eventually, running
from PIL import Image

pytest.importorskip("starlette")
pytest.importorskip("openai")
import openai
from tiue_runtime.serve.app import create_app
from tiue_runtime.serve.server_settings import ServerSettings

DRAW = "/v1/images/generations"
HEAD = f"POST {DRAW} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n".encode()


@pytest.fixture
def gate(pipe):
    return Gate(pipe)


@pytest.fixture
def served(request):
    """served(pipeline, name=value, ...) => the queue and the URL of a server with these settings."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def make(pipeline, **settings):
            app = create_app({"tiny": pipeline}, ServerSettings(**{"grace": 0.0, **settings}))
            return app.state.queues["tiny"], stack.enter_context(running(app, 0.0))

        yield make


CLIENTS = []


@pytest.fixture(autouse=True)
def closed_clients():
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def client_of(url, **options):
    options = {"max_retries": 0, "timeout": WAIT, **options}
    CLIENTS.append(openai.OpenAI(base_url=f"{url}/v1", api_key="secret", **options))
    return CLIENTS[-1]


def pixels(item):
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json))).tobytes()


def connected(url, fields=None, size=None):
    """A connection that has sent a request for pictures."""
    host, port = re.fullmatch(r"http://(.+):(\d+)", url).groups()
    connection = socket.socket()
    if size:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    connection.connect((host, int(port)))
    connection.settimeout(WAIT)
    body = json.dumps({"prompt": "a", **(fields or {})}).encode()
    head = f"POST {DRAW} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def test_the_client_of_openai_draws(served, pipe):
    _, url = served(pipe)
    answer = client_of(url).images.generate(
        prompt="a red heart", model="tiny", n=2, size="24x16", output_format="png", extra_body={"seed": 3}
    )
    assert answer.size == "24x16" and answer.output_format == "png" and answer.usage.input_tokens == 5
    assert answer.created > 1.7e9 and len(answer.data) == 2
    answer = client_of(url).images.generate(prompt="a red heart", extra_body={"seed": 3})
    assert pixels(answer.data[0]) == pipe("a red heart", seed=3).images[0].tobytes()
    answer = client_of(url).images.generate(prompt="a red heart", response_format="url")
    assert answer.data[0].url.startswith(url)
    assert [model.id for model in client_of(url).models.list()] == ["tiny"]


def test_the_client_of_openai_streams(served, pipe):
    _, url = served(pipe)
    stream = client_of(url).images.generate(
        prompt="a red heart", n=2, stream=True, partial_images=3, extra_body={"seed": 3}
    )
    found = list(stream)
    kinds = [type(event).__name__ for event in found]
    assert kinds == [*["ImageGenPartialImageEvent"] * 3, "ImageGenCompletedEvent"] * 2
    for event in found:
        type(event).model_validate(event.to_dict(), strict=True)  # all fields, of the right types
    assert pixels(found[7]) == pipe("a red heart", seed=4, memory="sequential").images[0].tobytes()
    assert found[3].usage.total_tokens == 5


def test_the_client_of_openai_streams_in_asyncio(served, pipe):
    import asyncio

    _, url = served(pipe)

    async def draw():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", timeout=WAIT) as client:
            stream = await client.images.generate(prompt="a", stream=True, partial_images=1)
            return [event.type async for event in stream]

    assert asyncio.run(draw()) == ["image_generation.partial_image", "image_generation.completed"]


def test_the_client_of_openai_gets_errors(served, pipe):
    _, url = served(pipe, api_key="secret")
    client = client_of(url)
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", size="huge")
    assert caught.value.param == "size" and caught.value.code == "invalid_value" and caught.value.request_id
    with pytest.raises(openai.BadRequestError, match="edits"):
        client.images.edit(image=("a.png", b"x"), prompt="a")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").images.generate(prompt="a")


def test_a_full_queue_is_429_and_the_client_of_openai_tries_again(served, gate):
    queue, url = served(gate, most_waiting=1)
    connections = [connected(url, {"seed": 1})]
    assert gate.entered.wait(WAIT)
    connections.append(connected(url, {"seed": 2}))
    eventually(lambda: queue.waiting == 1)
    with pytest.raises(openai.RateLimitError) as caught:
        client_of(url).images.generate(prompt="a")
    assert int(caught.value.response.headers["retry-after"]) >= 1 and caught.value.code == "queue_full"
    threading.Timer(0.2, gate.open.set).start()
    assert client_of(url, max_retries=2).images.generate(prompt="a").data
    for connection in connections:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "partial_images": 3}])
@pytest.mark.parametrize("waits", [False, True])
def test_hanging_up_cancels(served, gate, fields, waits):
    queue, url = served(gate)
    first = connected(url, fields)
    assert gate.entered.wait(WAIT)
    gone = connected(url, fields) if waits else first
    eventually(lambda: queue.waiting == waits)
    gone.close()
    eventually(lambda: queue.waiting + queue.running == waits)
    gate.open.set()
    if waits:
        assert first.recv(100).startswith(b"HTTP/1.1 200")
    first.close()
    assert client_of(url).images.generate(prompt="a").data


def test_leaving_a_stream_of_the_client_cancels(served, gate):
    queue, url = served(gate)
    stream = client_of(url).images.generate(prompt="a", stream=True, partial_images=3)
    assert gate.entered.wait(WAIT)
    stream.close()
    eventually(lambda: not queue.running)


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_is_watched_and_cancelled_by_others(served, gate, stream):
    import httpx

    _, url = served(gate)
    answers = []

    def ask():
        fields = {"prompt": "a", "stream": stream}
        answers.append(httpx.post(url + DRAW, json=fields, headers={"x-request-id": "my-request"}, timeout=WAIT))

    thread = threading.Thread(target=ask)
    thread.start()
    assert gate.entered.wait(WAIT)
    job = httpx.get(f"{url}/v1/jobs/my-request").json()
    assert (job["status"], job["progress"], job["ahead"]) == ("running", 0, 0)
    twice = httpx.post(url + DRAW, json={"prompt": "a"}, headers={"x-request-id": "my-request"})
    assert twice.status_code == 400 and "already" in twice.text
    assert httpx.delete(f"{url}/v1/jobs/my-request").json()["cancelled"] is True
    thread.join(WAIT)
    if stream:
        assert json.loads(answers[0].text.removeprefix("data: "))["error"]["code"] == "cancelled"
    else:
        assert answers[0].status_code == 409 and answers[0].headers["x-should-retry"] == "false"
        assert answers[0].json()["error"]["code"] == "cancelled"


def test_errors_in_a_stream_reach_the_client_of_openai(served, gate):
    _, url = served(gate)
    stream = client_of(url).images.generate(prompt="a", stream=True, extra_body={"timeout": 0.05})
    with pytest.raises(openai.APIError, match="timeout"):
        list(stream)


def test_a_slow_reader_holds_nobody_up(served, pipe):
    _, url = served(pipe)
    slow = connected(url, {"n": 10, "size": "320x320", "stream": True, "partial_images": 3}, size=2**16)
    eventually(lambda: figure(url, 'tiue_pictures_total{model="tiny"}') >= 10)
    for _ in range(5):
        assert client_of(url).images.generate(prompt="a").data
    data = bytearray()
    while not data.endswith(b"0\r\n\r\n"):
        data += slow.recv(2**20)
    assert len(data) > 2**20 and data.count(b"event: image_generation.completed") == 10
    slow.close()


def test_a_slow_body_is_given_up(served, pipe):
    _, url = served(pipe, body_seconds=0.1)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), WAIT) as connection:
        head = (
            f"POST {DRAW} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
        )
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_large_body_in_chunks_is_refused(served, pipe):
    _, url = served(pipe, most_body=1024)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), WAIT) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        connection.sendall(b"400\r\n" + b"a" * 1024 + b"\r\n" + b"10\r\n" + b"a" * 16 + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_in_order(heavy, started, number):
    process, url = started("--bundle", heavy, "--grace", "20")
    fields = {"prompt": "a red heart", "n": 4, "size": "256x256"}
    connections = [connected(url, fields) for _ in range(8)]
    eventually(lambda: figure(url, 'tiue_queue_running{model="heavy"}') == 1)
    process.send_signal(number)
    answers = [connection.recv(100) for connection in connections]
    for connection in connections:
        connection.close()
    _, errors = process.communicate(timeout=WAIT)
    assert process.returncode == 0 and not errors, errors
    assert [answer[:12] for answer in answers] == [b"HTTP/1.1 200"] * 8


def test_a_second_signal_cancels(heavy, started):
    process, url = started("--bundle", heavy, "--grace", "100")
    connections = [connected(url, {"prompt": "a red heart", "n": 10, "size": "256x256"}) for _ in range(20)]
    eventually(lambda: figure(url, 'tiue_queue_running{model="heavy"}') == 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT)
    assert process.returncode == 0
    answers = [connection.recv(100) for connection in connections]
    assert any(answer.startswith(b"HTTP/1.1 409") for answer in answers)
    for connection in connections:
        connection.close()


@pytest.fixture
def started():
    """started(argument, ...) starts the command, and waits until it listens. Returns the process and its URL."""
    processes = []

    def start(*arguments):
        command = [sys.executable, "-m", "tiue_runtime", "serve", "--port", "0", "--device", "cpu"]
        environment = {key: value for key, value in os.environ.items() if key != "TIUE_API_KEY"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
        processes.append(subprocess.Popen([*command, *map(str, arguments)], **pipes))
        line = processes[-1].stdout.readline()
        found = re.match(r"(http://\S+)/ draws with \w+ on cpu", line)
        assert found, line
        return processes[-1], found[1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def figure(url, name):
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next((line for line in lines if line.startswith(name)), "0").rpartition(" ")[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host: other computers"),
        (["--port", "70000"], "--port: "),
        (["--host", "192.0.2.1", "--without-key"], "--host, --port: cannot listen"),
        (["--api-key", ""], "--api-key: "),
        (["--allow-origin", "*"], "--allow-origin: "),
        (["--most-waiting", "0"], "--most-waiting: "),
        (["--bundle", "a", "--bundle", "a"], "two bundles"),
    ],
)
def test_mistakes_of_the_command_are_one_line(tiny, arguments, message, capsys, monkeypatch):
    from tiue_runtime.tools.cli import main

    monkeypatch.delenv("TIUE_API_KEY", raising=False)
    arguments = [str(tiny) if word == "a" else word for word in arguments]
    if "--bundle" not in arguments:
        arguments += ["--bundle", str(tiny)]
    assert main(["serve", "--device", "cpu", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_port_that_is_taken_is_one_line(tiny, capsys):
    from tiue_runtime.tools.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--device", "cpu", "--bundle", str(tiny), "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--host, --port: " in line and "in use" in line


def test_the_key_comes_from_the_environment(tiny, monkeypatch):
    from tiue_runtime.serve import server
    from tiue_runtime.tools.cli import main

    seen = []
    monkeypatch.setattr(server, "serve", lambda pipelines, settings, *others: seen.append(settings))
    monkeypatch.setenv("TIUE_API_KEY", "from-the-environment")
    main(["serve", "--device", "cpu", "--bundle", str(tiny), "--host", "0.0.0.0"])
    main(["serve", "--device", "cpu", "--bundle", str(tiny), "--api-key", "given"])
    assert [settings.api_key for settings in seen] == ["from-the-environment", "given"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_lines_with_curl_in_the_document_work(served, pipe):
    _, url = served(pipe)
    document = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    lines = [line for line in document.replace("\\\n", " ").splitlines() if line.startswith("curl ")]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line.replace("http://127.0.0.1:8080", url))
        done = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True)
        assert done.returncode == 0 and "error" not in done.stdout, line
        assert any(word in done.stdout for word in ("b64_json", '"url"', '"tiny"')), line


def test_warnings_of_drawing_are_in_the_answer(tiny, started):
    process, url = started("--bundle", tiny)
    try:
        answer = client_of(url).images.generate(prompt="an elephant", extra_body={"seed": 1})
        assert "knows no word" in answer.to_dict()["tiue"]["warnings"][0]
        assert "warnings" not in client_of(url).images.generate(prompt="a red heart").to_dict()["tiue"]
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=WAIT)
    assert not errors
