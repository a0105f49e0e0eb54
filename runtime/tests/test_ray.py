"""examples/scale: when a worker, a replica or the whole job is killed, nothing is lost and nothing comes twice."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image
from tiue_runtime import Pipeline

ROOT = Path(__file__).parents[2]
EMOJI = ROOT / "models" / "emoji" / "tiue_emoji"
TINY = Path(__file__).parent / "data" / "tiny"
PROMPTS = ("a red heart", "a rocket", "cat face", "a rainbow")
LAST = 2**64 - 115  # the first of the last seeds that there are
MARK = "TIUE_TEST_MARK"  # a variable that all processes of a test inherit

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='pip install "ray[data,serve]==2.60.*"'),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]
starts_ray = pytest.mark.slow  # half a minute each


class Program:
    """A module that runs as a program, and the processes that Ray starts for it."""

    def __init__(self, module: str, *arguments: object, **variables: str) -> None:
        self.mark = secrets.token_hex(8)
        command = [sys.executable, "-m", module, *map(str, arguments)]
        path = os.pathsep.join([str(ROOT), *sys.path])
        environment = {**os.environ, MARK: self.mark, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment.pop("RAY_ADDRESS", None)
        environment |= variables
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def wait(self, seconds: float = 240) -> int:
        status = self.process.wait(seconds)
        self._reader.join(10)
        return status

    def until(self, condition: Callable[[], object], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.1)

    def processes(self, title: str = "") -> list[int]:
        """Find processes of this program by a part of their title."""
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment, command = (path / "environ").read_bytes(), (path / "cmdline").read_text()
            except OSError:  # It has ended.
                continue
            if f"{MARK}={self.mark}".encode() in environment.split(b"\0") and title in command:
                found.append(int(path.name))
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdout.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(module: str, *arguments: object, **variables: str) -> Program:
        programs.append(Program(module, *arguments, **variables))
        return programs[-1]

    yield begin
    for program in reversed(programs):
        program.end()


@pytest.fixture
def short_path() -> Iterator[str]:
    """A directory for Ray's sockets. In its own, Ray would leave the address of a cluster that later programs join."""
    with TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as path:
        yield path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{PROMPTS[i % len(PROMPTS)]}\n" for i in range(115)))
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("shard-*.parquet"))


def rows(path: Path) -> list[dict]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def assert_complete(out: Path, seed: int) -> None:
    """Every picture is there once, with its prompt and seed, and the pixels that the library draws."""
    pictures = [row for path in shards(out) for row in rows(path)]
    assert [row["index"] for row in pictures] == list(range(115))
    assert all(row["seed"] == seed + i and row["prompt"] == PROMPTS[i % 4] for i, row in enumerate(pictures))
    with Pipeline.load(EMOJI, device="cpu", threads=1) as pipeline:
        for row in pictures[::19]:
            (expected,) = pipeline(row["prompt"], seed=row["seed"], memory="parallel").images
            np.testing.assert_array_equal(pixels(row["png"]), np.asarray(expected))


@starts_ray
def test_a_killed_worker_loses_no_picture(start, prompts, tmp_path):
    out = tmp_path / "pictures"
    options = "--shard-size", 10, "--workers", 2, "--bundle", EMOJI, "--seed", LAST, "--device", "cpu"
    job = start("examples.scale.draw_shards", prompts, out, *options)
    job.until(lambda: len(shards(out)) >= 3)
    workers = job.processes("ray::MapWorker")
    assert len(workers) == 2, job.said
    assert b"RAY_USAGE_STATS_ENABLED=0" in Path(f"/proc/{workers[0]}/environ").read_bytes().split(b"\0")
    os.kill(workers[0], signal.SIGKILL)
    assert job.wait() == 0, job.said
    assert_complete(out, LAST)
    assert len(shards(out)) == 12


@starts_ray
def test_a_killed_node_loses_no_picture(start, prompts, tmp_path, short_path):
    """Two nodes of a cluster, on this machine, and a job that joins them."""
    out, port = tmp_path / "pictures", free_port()
    address = f"127.0.0.1:{port}"
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    node = "ray.scripts.scripts", "start", "--num-cpus", 1, "--block"
    head = start(*node, "--head", "--port", port, "--include-dashboard", "false", "--temp-dir", short_path, **secret)
    head.until(lambda: "will now block" in head.said)
    other = start(*node, "--address", address, **secret)
    other.until(lambda: "will now block" in other.said)
    options = "--shard-size", 10, "--workers", 2, "--bundle", EMOJI, "--device", "cpu"
    job = start("examples.scale.draw_shards", prompts, out, *options, **secret, RAY_ADDRESS=address)
    job.until(lambda: len(shards(out)) >= 3)
    assert other.processes("ray::MapWorker")
    for process in other.processes():
        os.kill(process, signal.SIGKILL)
    assert job.wait() == 0, job.said
    assert_complete(out, 0)


@starts_ray
def test_a_killed_job_goes_on_and_a_shard_can_be_drawn_alone(start, prompts, tmp_path):
    out = tmp_path / "pictures"
    options = "--shard-size", 10, "--workers", 2, "--bundle", EMOJI, "--device", "cpu"
    job = start("examples.scale.draw_shards", prompts, out, *options)
    job.until(lambda: len(shards(out)) >= 3)
    for process in job.processes():
        os.kill(process, signal.SIGKILL)
    job.wait()
    before = {path: path.stat().st_mtime_ns for path in shards(out)}
    assert 3 <= len(before) < 12

    again = start("examples.scale.draw_shards", prompts, out, *options)
    assert again.wait() == 0, again.said
    assert f"{12 - len(before)} of 12 shards are missing" in again.said
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert_complete(out, 0)

    lost = shards(out)[7]
    content = rows(lost)
    lost.unlink()
    alone = start("examples.scale.draw_shards", prompts, out, *options, "--shard", 7)
    assert alone.wait() == 0, alone.said
    assert "1 of 1 shards are missing" in alone.said
    assert rows(lost) == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", 1), "the pictures there have another seed"),
        (("--shard-size", 5), "the pictures there have another shard_size"),
        (("--shard", 12), "--shard: expected a number from 0 to 11, got 12"),
        (("--bundle", "missing"), "'missing' is neither a directory"),
        (("--seed", LAST + 1), "seed: expected an integer in [0, 2**64)"),
    ],
)
def test_a_directory_holds_the_pictures_of_one_plan(start, prompts, tmp_path, options, message):
    out = tmp_path / "pictures"
    out.mkdir()
    bundle = Pipeline.load(TINY, device="cpu").bundle
    text = "\n".join(prompts.read_text().splitlines())
    plan = {"prompts_sha256": hashlib.sha256(text.encode()).hexdigest(), "bundle_sha256": bundle.sha256}
    (out / "plan.json").write_text(json.dumps(plan | {"seed": 0, "shard_size": 10, "batch": 1}))
    job = start("examples.scale.draw_shards", prompts, out, "--bundle", TINY, "--shard-size", 10, *options)
    assert job.wait() == 2
    assert message in job.said and "Traceback" not in job.said
    assert sorted(path.name for path in out.iterdir()) == ["plan.json"]


def test_a_line_is_one_prompt_whatever_it_holds(start, tmp_path):
    """Only line feeds end a line, and an editor's mark at the beginning belongs to no prompt."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "pictures"
    prompts.write_bytes("\ufeffa red\u2028heart\r\na\x0crocket\n\n".encode())
    out.mkdir()
    expected = hashlib.sha256("a red\u2028heart\na\x0crocket".encode()).hexdigest()
    plan = {"prompts_sha256": expected, "bundle_sha256": "another"}
    (out / "plan.json").write_text(json.dumps(plan | {"seed": 0, "shard_size": 1000, "batch": 1}))
    job = start("examples.scale.draw_shards", prompts, out, "--bundle", TINY)
    assert job.wait() == 2
    assert "the pictures there have another bundle_sha256; choose" in job.said


@pytest.fixture
def serve(start):
    """Start a server of the default model, and return it with a client, when it answers."""
    openai = pytest.importorskip("openai")

    def begin(least: int):
        port = free_port()
        options = "--least", least, "--most", 2, "--port", port, "--device", "cpu"
        server = start("examples.scale.serve_replicas", "--bundle", EMOJI, *options)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=8)

        def ready() -> bool:
            try:
                return bool(client.with_options(max_retries=0).models.list().data)
            except openai.APIError:
                return False

        server.until(ready)
        return server, client

    return begin


def ask(client, seed: int) -> bytes:
    answer = client.images.generate(prompt=PROMPTS[seed % 4], extra_body={"seed": seed})
    (picture,) = answer.data
    return base64.b64decode(picture.b64_json)


@starts_ray
def test_a_killed_replica_loses_no_request(serve):
    server, client = serve(2)
    assert len(server.processes("ray::ServeReplica")) == 2

    def ask_or_kill(seed: int) -> bytes:
        if seed == 20:
            os.kill(server.processes("ray::ServeReplica")[0], signal.SIGKILL)
        return ask(client, seed)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask_or_kill, range(60)))
    with Pipeline.load(EMOJI, device="cpu", threads=1) as pipeline:
        for seed, answer in enumerate(answers):
            (expected,) = pipeline(PROMPTS[seed % 4], seed=seed).images
            np.testing.assert_array_equal(pixels(answer), np.asarray(expected))
    server.until(lambda: len(server.processes("ray::ServeReplica")) == 2)  # Ray has started another one.
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0, server.said
    assert "Traceback" not in server.said


@starts_ray
def test_replicas_follow_the_queue(serve):
    server, client = serve(1)
    assert len(server.processes("ray::ServeReplica")) == 1
    enough = threading.Event()

    def go_on(first: int) -> int:
        seed = first
        while not enough.is_set():
            ask(client, seed)
            seed += 1
        return seed - first

    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(go_on, 1000 * i) for i in range(6)]
        try:
            server.until(lambda: len(server.processes("ray::ServeReplica")) == 2)
        finally:
            enough.set()
    assert all(one.result() > 0 for one in asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "set a key in the variable TIUE_API_KEY"),
        (("--least", 3, "--most", 2), "expected 1 <= least <= most, got 3 and 2"),
        (("--bundle", "missing"), "'missing' is neither a directory"),
        (("--allow-host", "a b"), "allow_host: expected a name"),
    ],
)
def test_a_server_that_cannot_start_says_why(start, monkeypatch, options, message):
    monkeypatch.delenv("TIUE_API_KEY", raising=False)
    server = start("examples.scale.serve_replicas", "--bundle", TINY, *options)
    assert server.wait() == 2
    assert message in server.said and "Traceback" not in server.said
