"""The MCP server: the tool `generate_image`, over stdin and stdout.

Only the protocol goes to stdout. Everything else goes to stderr. The bundle is loaded at the first call, so that an
assistant which starts the server with every chat does not wait for a large one.
"""

import asyncio
import base64
import io
import os
import signal
import warnings
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from mcp import MCPError
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.types import (
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    ContentBlock,
    ImageContent,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
    ToolAnnotations,
)
from PIL.Image import Image

from tiue_runtime import Bundle, Pipeline, Result, TiueError, __version__
from tiue_runtime.aio import stream
from tiue_runtime.bundle import Manifest
from tiue_runtime.errors import RequestError, shorten
from tiue_runtime.options import LESSONS

NAME = "generate_image"
MOST = 4  # pictures of a call: assistants limit the size of an answer

_SOME = 12  # things that a description names
Report = Callable[[float, float | None, str | None], Awaitable[None]]


@dataclass(frozen=True)
class Arguments:
    """The checked arguments of a call."""

    prompt: str
    seed: int | None
    n: int


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """Check the arguments of a call. Raises RequestError. The library checks the range of the seed."""
    for name in given:
        if name not in ("prompt", "seed", "n"):
            unknown = f"{shorten(name)} is no argument of this tool, which has prompt, seed and n"
            raise RequestError(f"{name}: {LESSONS[name]}" if name in LESSONS else unknown)
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        got = "nothing" if prompt is None else shorten(prompt)
        raise RequestError(f"prompt: expected text that says what the picture shows, got {got}")
    seed, n = _integer("seed", given.get("seed")), _integer("n", given.get("n"))
    n = 1 if n is None else n
    if not 1 <= n <= MOST:
        raise RequestError(f"n: expected 1 to {MOST} pictures, got {shorten(n)}")
    return Arguments(prompt, seed, n)


def _integer(name: str, value: object) -> int | None:
    """Return an integer of JSON, in which 2.0 is one as well."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise RequestError(f"{name}: expected an integer, got {shorten(value)}")


def describe(manifest: Manifest) -> Tool:
    """Describe the tool to an assistant: what the bundle draws, and the arguments as a JSON schema."""
    size = f"{manifest.default_width}x{manifest.default_height}"
    text = f"Draw pictures from a description, on this computer, with the model {manifest.name}: {size} pixels each."
    prompts = manifest.prompts
    if prompts and prompts.vocabulary:
        some = prompts.vocabulary[:: max(len(prompts.vocabulary) // _SOME, 1)][:_SOME]
        text += f" It knows things by {len(prompts.vocabulary)} names and no others, for example {', '.join(some)}."
    if prompts and prompts.examples:
        text += f" Prompts that it draws well: {'; '.join(prompts.examples[:_SOME])}."
    seed = "0 to 2**64 - 1. The same prompt and seed give the same picture. Picture j has seed + j. Default: a new one."
    properties: dict[str, Any] = {
        "prompt": {"type": "string", "description": "What the picture shows, in English."},
        "seed": {"type": ["integer", "null"], "minimum": 0, "default": None, "description": seed},
        "n": {"type": "integer", "minimum": 1, "maximum": MOST, "default": 1, "description": "How many pictures."},
    }
    return Tool(
        name=NAME,
        title="Draw pictures",
        description=text,
        input_schema={
            "type": "object",
            "properties": properties,
            "required": ["prompt"],
            "additionalProperties": False,
        },
        annotations=ToolAnnotations(read_only_hint=True, destructive_hint=False, open_world_hint=False),
    )


class ImageTool:
    """The tool. Calls are drawn one after another. `loading` has options of `Pipeline.load`."""

    def __init__(self, bundle: Bundle, format: str, loading: Mapping[str, Any]) -> None:
        self._bundle, self._format, self._loading = bundle, format, dict(loading)
        self._pipeline: Pipeline | None = None
        self._drawing = asyncio.Lock()

    async def list_tools(self, _: ServerRequestContext, __: PaginatedRequestParams | None) -> ListToolsResult:
        """Answer `tools/list`."""
        return ListToolsResult(tools=[describe(self._bundle.manifest)])

    async def call_tool(self, context: ServerRequestContext, params: CallToolRequestParams) -> CallToolResult:
        """Answer `tools/call`. What is wrong with a call is told to the assistant, which can mend it."""
        if params.name != NAME:
            raise MCPError(INVALID_PARAMS, f"there is no tool {shorten(params.name)}; this server has {NAME}")
        try:
            arguments = read_arguments(params.arguments or {})
            content = await self.draw(arguments, context.session.report_progress)
        except TiueError as error:
            return CallToolResult(content=[TextContent(text=str(error))], is_error=True)
        return CallToolResult(content=content)

    async def draw(self, arguments: Arguments, report: Report) -> list[ContentBlock]:
        """Draw pictures. Returns them, and a text with seeds and warnings. Raises TiueError.

        `report` is called with the finished fraction, 1.0, and the stage.
        """
        async with self._drawing:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                if self._pipeline is None:
                    self._pipeline = await asyncio.to_thread(Pipeline.load, self._bundle.directory, **self._loading)
                result = await self._run(self._pipeline, arguments, report)
        seeds = f"seed {result.seeds[0]}" if len(result.seeds) == 1 else f"seeds {', '.join(map(str, result.seeds))}"
        lines = [f"Drawn with {seeds} by {self._bundle.manifest.name} in {result.timings['total']:.2f} s."]
        lines += [f"Warning: {warning.message}" for warning in caught]
        pictures = [self._content(picture) for picture in result.images]
        return [*pictures, TextContent(text="\n".join(lines))]

    async def _run(self, pipeline: Pipeline, arguments: Arguments, report: Report) -> Result[list[Image]]:
        told = 0.0
        drawn = stream(pipeline, arguments.prompt, seed=arguments.seed, num_images=arguments.n, previews=False)
        async with aclosing(drawn) as parts:  # Leaving early, because the call was cancelled, ends the request.
            async for part in parts:
                if isinstance(part, Result):
                    return cast("Result[list[Image]]", part)
                if part.fraction > told:  # The protocol asks for growing numbers.
                    told = part.fraction
                    await report(told, 1.0, part.stage)
        raise RuntimeError("the stream ended without a result")

    def _content(self, picture: Image) -> ImageContent:
        file = io.BytesIO()
        picture.save(file, self._format)
        return ImageContent(data=base64.b64encode(file.getvalue()).decode("ascii"), mime_type=f"image/{self._format}")


def serve(bundle: Bundle, format: str, loading: Mapping[str, Any]) -> int:
    """Serve until stdin ends. The arguments are those of ImageTool."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    asyncio.run(_serve(bundle, format, loading))
    return 0


async def _serve(bundle: Bundle, format: str, loading: Mapping[str, Any]) -> None:
    tool = ImageTool(bundle, format, loading)
    server = Server("tiue-runtime", version=__version__, on_list_tools=tool.list_tools, on_call_tool=tool.call_tool)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


def _end(number: int, _: object) -> None:
    """End the process at once. A thread waits for stdin, and Python would wait for that thread.

    Nothing is lost: this process writes no files, and an assistant that ends it takes no answer.
    """
    os.write(2, b"tiue-runtime: error: interrupted\n")
    os._exit(128 + number)
