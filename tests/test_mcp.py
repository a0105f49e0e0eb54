"""The MCP server: with the SDK's own client over stdio, and by raw lines where a client would be too polite."""

import asyncio
import base64
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from PIL import Image
from tiue_runtime import Bundle, Pipeline, RequestError, read_record
from tiue_runtime.tools import cli
from tiue_runtime.tools.mcp_server import MOST, NAME, describe, read_arguments

TINY = Path(__file__).parents[1] / "runtime/tests/data/tiny"
COMMAND = ["-m", "tiue_runtime", "mcp", "--device", "cpu"]
PATIENCE = 60  # seconds
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}


def connected(use, *flags, bundle="emoji"):
    """Run `use(client)` with a client of a new server. Returns what it returns, and the server's stderr."""
    environment = {**os.environ, "TIUE_BUNDLE": str(bundle)}
    server = StdioServerParameters(command=sys.executable, args=[*COMMAND, *flags], env=environment)

    async def run(log):
        async with Client(stdio_client(server, log)) as client:
            async with asyncio.timeout(PATIENCE):
                return await use(client)

    read, write = os.pipe()
    with os.fdopen(read, "rb") as printed, os.fdopen(write, "wb") as log:
        result = asyncio.run(run(log))
        log.close()
        return result, printed.read().decode()


def decoded(content):
    with Image.open(io.BytesIO(base64.b64decode(content.data))) as image:
        return image.convert("RGB").tobytes(), image.format


def texts(result):
    return " ".join(block.text for block in result.content if block.type == "text")


def test_the_tool_draws_what_the_library_draws_and_reports_progress(tmp_path):
    async def use(client):
        reported = []

        async def hear(progress, total, message):
            reported.append((progress, total, message))

        (tool,) = (await client.list_tools()).tools
        given = {"prompt": "a red heart", "seed": 5, "n": 2}
        drawn = await client.call_tool(NAME, given, progress_callback=hear)
        return tool, drawn, reported

    (tool, drawn, reported), printed = connected(use)
    assert tool.name == NAME and "a red heart" in tool.description and "emoji" in tool.description
    assert tool.input_schema["required"] == ["prompt"] and set(tool.input_schema["properties"]) == {
        "prompt",
        "seed",
        "n",
    }
    *pictures, text = drawn.content
    with Pipeline.load("emoji", device="cpu") as pipe:
        expected = pipe("a red heart", seed=5, num_images=2).images
    assert [decoded(picture) for picture in pictures] == [(picture.tobytes(), "PNG") for picture in expected]
    assert {picture.mime_type for picture in pictures} == {"image/png"} and not drawn.is_error
    assert "seeds 5, 6 by emoji" in text.text
    (tmp_path / "heart.png").write_bytes(base64.b64decode(pictures[1].data))
    assert read_record(tmp_path / "heart.png").seed == 6
    fractions = [progress for progress, _, _ in reported]
    assert fractions == sorted(set(fractions)) and fractions[-1] == 1.0 and len(fractions) == 4
    assert {total for _, total, _ in reported} == {1.0} and reported[0][2] == "text_encoder"
    assert not printed


def test_bad_arguments_cancelled_calls_and_calls_at_once_leave_a_server_that_draws():
    async def use(client):
        wrong = [
            await client.call_tool(NAME, given)
            for given in (
                {},
                {"prompt": "a red heart", "seed": -1},
                {"prompt": "a red heart", "seed": 2**64},
                {"prompt": "a red heart", "n": MOST + 1},
                {"prompt": "a red heart", "negative_prompt": "blue"},
            )
        ]
        with pytest.raises(MCPError, match="no tool 'draw'"):
            await client.call_tool("draw", {})
        begun = asyncio.Event()

        async def hear(*_):
            begun.set()

        call = asyncio.create_task(client.call_tool(NAME, {"prompt": "a red heart", "n": MOST}, progress_callback=hear))
        await begun.wait()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        calls = [client.call_tool(NAME, {"prompt": "a red heart", "seed": 5}) for _ in range(3)]
        unknown = await client.call_tool(NAME, {"prompt": "zorblax"})
        return wrong, await asyncio.gather(*calls), unknown, call.cancelled()

    (wrong, drawn, unknown, cancelled), printed = connected(use)
    assert all(result.is_error for result in wrong) and cancelled
    assert [texts(result).partition(":")[0] for result in wrong] == ["prompt", "seed", "seed", "n", "negative_prompt"]
    assert not any(result.is_error for result in drawn) and len({decoded(result.content[0]) for result in drawn}) == 1
    assert not unknown.is_error and "knows no word of 'zorblax'" in texts(unknown)
    assert not printed


def test_a_bundle_that_cannot_be_loaded_is_told_to_the_assistant(tmp_path):
    shutil.copytree(TINY, tmp_path / "bundle")
    graph = tmp_path / "bundle/unet_decoder.onnx"
    graph.write_bytes(b"x" * graph.stat().st_size)  # Another size would be noticed at the start.

    async def use(client):
        return await client.call_tool(NAME, {"prompt": "a red heart"})

    result, _ = connected(use, bundle=tmp_path / "bundle")
    assert result.is_error and "unet_decoder" in texts(result) and "\n" not in texts(result)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None}, "prompt: expected text that says what the picture shows, got nothing"),
        ({"prompt": " \n"}, "prompt: expected text"),
        ({"prompt": ["a red heart"]}, "prompt: expected text"),
        ({"prompt": "a", "seed": "5"}, "seed: expected an integer, got '5'"),
        ({"prompt": "a", "seed": True}, "seed: expected an integer, got True"),
        ({"prompt": "a", "seed": 0.5}, "seed: expected an integer"),
        ({"prompt": "a", "n": 0}, "n: expected 1 to 4 pictures, got 0"),
        ({"prompt": "a", "n": 1e400}, "n: expected an integer, got inf"),
        ({"prompt": "a", "size": "64x64"}, "'size' is no argument of this tool"),
        ({"prompt": "a", "guidance_scale": 7}, "guidance_scale: guidance was distilled"),
        ({"prompt": "a", "x" * 5000: 1}, "is no argument of this tool"),
    ],
)
def test_arguments_are_refused_with_what_was_expected(given, message):
    with pytest.raises(RequestError) as refused:
        read_arguments(given)
    assert message in str(refused.value) and len(str(refused.value)) < 300


def test_arguments_as_assistants_write_them():
    assert read_arguments({"prompt": "a", "seed": None, "n": None}) == read_arguments({"prompt": "a"})
    assert read_arguments({"prompt": "a", "seed": 5.0, "n": 2.0}) == read_arguments({"prompt": "a", "seed": 5, "n": 2})


def test_a_bundle_without_prompts_is_described():
    tool = describe(replace(Bundle.load(TINY).manifest, prompts=None))
    assert tool.description.endswith("pixels each.")


class Raw:
    """A server that is spoken to in lines."""

    def __init__(self):
        command = [sys.executable, *COMMAND]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env={**os.environ, "TIUE_BUNDLE": str(TINY)}, **pipes)

    def __enter__(self):
        self.say(INITIALIZE)
        assert self.hear()["result"]["serverInfo"]["name"] == "tiue-runtime"
        self.say({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    def say(self, message):
        line = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def hear(self):
        return json.loads(self.process.stdout.readline())


def test_lines_that_are_no_messages_do_not_end_the_server():
    with Raw() as server:
        for line in (b"", b"hello", b"\xff\xfe", b"[]", b'{"jsonrpc": "2.0"}', b"[" * 10_000):
            server.say(line)
        server.say({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": NAME, "arguments": []}})
        server.say({"jsonrpc": "2.0", "id": 10, "method": "tools/list"})
        answers = {}
        while 10 not in answers:
            answer = server.hear()
            answers[answer.get("id")] = answer
        assert "error" in answers[9] and answers[10]["result"]["tools"][0]["name"] == NAME
        begun = time.monotonic()
        server.process.stdin.close()
        assert server.process.wait(PATIENCE) == 0 and time.monotonic() - begun < 10


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_at_once(number):
    with Raw() as server:
        server.process.send_signal(number)
        assert server.process.wait(10) == 128 + number
        assert server.process.stderr.read() == b"tiue-runtime: error: interrupted\n"
        assert not server.process.stdout.read()


def test_a_missing_bundle_or_package_is_one_line(tmp_path, capsys, monkeypatch):
    assert cli.main(["mcp", "--bundle", str(tmp_path / "none")]) == 2
    monkeypatch.setitem(sys.modules, "mcp", None)
    monkeypatch.delitem(sys.modules, "tiue_runtime.tools.mcp_server")
    assert cli.main(["mcp", "--bundle", str(TINY)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "none" in first and "pip install mcp" in second
