"""A soak of the server: 8 clients, 2,000 requests of every kind, and afterwards nothing is left behind. By hand."""

import base64
import hashlib
import io
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from tiue_runtime import Pipeline

pytest.importorskip("starlette")
pytest.importorskip("openai")
import httpx
import openai

REQUESTS = int(os.environ.get("TIUE_SOAK", "2000"))
WARM_UP = 0.2  # of the requests
GROWTH = 1.05  # of resident memory
CLIENTS = 8
EXECUTOR = min(32, (os.cpu_count() or 1) + 4)  # threads that asyncio makes for files of pictures, as it needs them
PROMPTS = ("a red heart", "a sunflower", "pizza", "cat face", "a rocket")
SEEDS = 10
BAD = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": 1}',
    b'{"prompt": "a", "n": 0}',
    b'{"prompt": "a", "size": "x"}',
    b'{"prompt": "a", "prompt": "b"}',
    b"[" * 9000,
    b'{"prompt": "\\ud800"}',
    b"\xff" * 100,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")]


def digest(data: bytes) -> str:
    return hashlib.sha256(Image.open(io.BytesIO(data)).tobytes()).hexdigest()


class Served:
    """The command, as a process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tiue_runtime", "serve", "--port", "0", "--device", "cpu", "--bundle", "emoji"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = re.match(r"(\S+)/ draws", self.process.stdout.readline())[1]
        while httpx.get(f"{self.url}/ready").status_code != 200:
            time.sleep(0.1)

    def state(self) -> dict[str, int]:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return {
            "bytes": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024,
            "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
            "files": len(list(Path(f"/proc/{self.process.pid}/fd").iterdir())),
        }

    def end(self) -> str:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return errors


@pytest.fixture
def served():
    served = Served()
    yield served
    served.process.kill()
    served.process.communicate()


@pytest.fixture(scope="module")
def twins():
    """The library's pictures: (prompt, seed, streamed with partial pictures) => sha256 of the pixels."""
    with Pipeline.load("emoji", device="cpu") as pipe:
        return {
            (prompt, seed, mode == "sequential"): hashlib.sha256(
                pipe(prompt, seed=seed, memory=mode).images[0].tobytes()
            ).hexdigest()
            for prompt in PROMPTS
            for seed in range(SEEDS + 2)
            for mode in ("auto", "sequential")
        }


class Client:
    """One of the clients. It checks every answer, and counts them by kind."""

    def __init__(self, served, twins, number):
        self.url, self.twins = served.url, twins
        self.draws = random.Random(number)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=20, timeout=120)
        self.counts: dict[str, int] = {}
        self.seconds: list[float] = []

    def ask(self) -> None:
        draws = self.draws
        prompt, seed = draws.choice(PROMPTS), draws.randrange(SEEDS)
        kinds = {"plain": 50, "stream": 15, "hang up": 15, "malformed": 10, "slow": 5, "url": 5}
        (kind,) = draws.choices(list(kinds), kinds.values())
        {
            "plain": self.plain,
            "stream": self.stream,
            "hang up": self.hang_up,
            "malformed": self.malformed,
            "slow": self.slow,
            "url": self.by_url,
        }[kind](prompt, seed)
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def plain(self, prompt, seed):
        n, begun = self.draws.choice((1, 1, 1, 2, 3)), time.perf_counter()
        answer = self.client.images.generate(prompt=prompt, n=n, extra_body={"seed": seed})
        self.seconds.append(time.perf_counter() - begun)
        made = [digest(base64.b64decode(item.b64_json)) for item in answer.data]
        assert made == [self.twins[prompt, seed + i, False] for i in range(n)]

    def stream(self, prompt, seed):
        stream = self.client.images.generate(prompt=prompt, stream=True, partial_images=3, extra_body={"seed": seed})
        found = list(stream)
        assert len(found) == 4
        assert digest(base64.b64decode(found[3].b64_json)) == self.twins[prompt, seed, True]

    def by_url(self, prompt, seed):
        answer = self.client.images.generate(prompt=prompt, response_format="url", extra_body={"seed": seed})
        assert digest(httpx.get(answer.data[0].url).content) == self.twins[prompt, seed, False]

    def malformed(self, *_):
        body = self.draws.choice(BAD)
        kind = self.draws.choice(("application/json", "text/plain", "application/x-www-form-urlencoded"))
        answer = httpx.post(f"{self.url}/v1/images/generations", content=body, headers={"content-type": kind})
        assert answer.status_code in (400, 415) and answer.json()["error"]["message"]

    def hang_up(self, prompt, seed):
        with self.connected({"prompt": prompt, "n": 3, "stream": self.draws.random() < 0.5}):
            time.sleep(self.draws.random() * 0.5)

    def slow(self, prompt, seed):
        fields = {"prompt": prompt, "seed": seed, "stream": True, "partial_images": 3, "size": "256x256"}
        with self.connected(fields) as connection:
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += connection.recv(20_000)
                time.sleep(0.005)
        assert data.count(b"image_generation.completed") == 2  # the event's name, and its type

    def connected(self, fields):
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), 120)
        body = json.dumps(fields).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        return connection


def test_two_thousand_requests_leave_nothing_behind(served, twins):
    clients = [Client(served, twins, number) for number in range(CLIENTS)]
    left, lock, states = [REQUESTS], threading.Lock(), []

    def work(client):
        while True:
            with lock:
                if not left[0]:
                    return
                left[0] -= 1
                if left[0] == int(REQUESTS * (1 - WARM_UP)):
                    states.append(served.state())
            client.ask()

    begun = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(work, clients))
    seconds = time.perf_counter() - begun
    for client in clients:
        client.client.close()
    time.sleep(2)
    before, after = states[0], served.state()
    counts = {kind: sum(client.counts.get(kind, 0) for client in clients) for kind in clients[0].counts}
    times = sorted(second for client in clients for second in client.seconds)
    p50, p99 = statistics.median(times), times[int(len(times) * 0.99)]
    print(f"\n{counts} in {seconds:.0f} s; plain requests: p50 {p50:.2f} s, p99 {p99:.2f} s")
    print(f"{before} after {WARM_UP:.0%}, {after} at the end")
    figures = httpx.get(f"{served.url}/metrics").text
    print("\n".join(line for line in figures.splitlines() if line.startswith("tiue_requests_total")))
    assert 'status="500"' not in figures
    assert not served.end()
    assert after["bytes"] <= GROWTH * before["bytes"]
    assert after["files"] <= before["files"]
    assert after["threads"] <= before["threads"] + EXECUTOR


@pytest.mark.parametrize("connections", [1, 4, 16])
@pytest.mark.parametrize("kind", ["bytes", "openai"])
def test_throughput_beside_the_library(served, kind, connections):
    """Pictures in a second, as PNG files with metadata, of the server and of the library.

    They take short turns, so that other work disturbs both. Clients are a process of their own on the same cores.
    """
    rounds, each = (12, 16) if connections < 16 else (10, 32)
    seconds: dict[str, list[float]] = {"library": [], "server": []}  # of a picture
    times: list[float] = []
    command = [sys.executable, str(Path(__file__).with_name("load_client.py")), kind, served.url, str(connections)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with Pipeline.load("emoji", device="cpu") as pipe, subprocess.Popen(command, **pipes) as client:

        def server():
            print(each, file=client.stdin, flush=True)
            answer = json.loads(client.stdout.readline())
            times.extend(answer["times"])
            return answer["seconds"]

        def library():
            begun = time.perf_counter()
            for seed in range(each):
                pipe("a red heart", seed=seed).images[0].save(io.BytesIO(), "PNG")
            return time.perf_counter() - begun

        library(), server()  # Nothing is warm before.
        times.clear()
        for _ in range(rounds):
            seconds["library"].append(library() / each)
            seconds["server"].append(server() / each)
        client.stdin.close()
    times.sort()
    ratios = [ours / theirs for ours, theirs in zip(seconds["library"], seconds["server"], strict=True)]
    rates = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    print(f"\n{kind}, {connections} connections: {rates['server']:.2f} pictures/s, library {rates['library']:.2f}")
    print(f"server beside library: {statistics.median(ratios):.3f} (quartiles {statistics.quantiles(ratios, n=4)})")
    print(f"p50 {statistics.median(times):.3f} s, p99 {times[int(len(times) * 0.99)]:.3f} s")
    assert statistics.median(ratios) > 0.8


def test_the_first_partial_picture_comes_early(served):
    shares, whole = [], []
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        for seed in range(30):
            begun = time.perf_counter()
            stream = client.images.generate(
                prompt="a red heart", stream=True, partial_images=3, extra_body={"seed": seed}
            )
            arrived = [time.perf_counter() - begun for _ in stream]
            shares.append(arrived[0] / arrived[-1])
            whole.append(arrived[-1])
    print(f"\nfirst partial picture after {statistics.median(shares):.0%} of {statistics.median(whole):.3f} s")
    assert statistics.median(shares) < 0.4
