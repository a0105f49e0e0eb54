"""The command `serve`: pictures over HTTP, in the way of OpenAI's images API."""

import argparse
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tiue_runtime.errors import RequestError
from tiue_runtime.options import LoadOptions, RequestOptions
from tiue_runtime.serve.server_settings import KEY_VARIABLE, ServerSettings
from tiue_runtime.tools.flags import Add, given, option_flags

if TYPE_CHECKING:
    from tiue_runtime.pipeline import Pipeline

_LIMITS = {
    "most_body": "bytes of a request's body",
    "most_prompt": "characters of a prompt",
    "most_pictures": "pictures of a request",
    "most_pixels": "pixels of a picture",
    "most_waiting": "requests that may wait",
    "batch": "pictures that are drawn at once (default: 1 on a CPU, 4 on a GPU)",
    "timeout": "seconds that a request may take, waiting included",
    "grace": "seconds that requests have to end, when the server is told to stop",
    "kept_pictures": "pictures that are kept for answers with URLs",
    "kept_seconds": "seconds that they are kept",
}
NAMES = ("host", "port", "api_key", "without_key", "allow_host", "allow_origin", *_LIMITS)
"""Of its arguments that messages speak of."""

_LOCAL = ("127.0.0.1", "localhost", "::1")


def register(add: Add) -> None:
    """Add the command."""
    parser = add(
        "serve", _serve, "draw for other programs over HTTP, as OpenAI's images API does, with a page for people"
    )
    defaults = ServerSettings()
    parser.add_argument(
        "--bundle",
        action="append",
        metavar="NAME_OR_PATH",
        help="a bundle's directory or installed name; several may be given (default: TIUE_BUNDLE, else emoji)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one (default: 8080)")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send as a bearer token (default: {KEY_VARIABLE}, if set)"
    )
    parser.add_argument(
        "--without-key", action="store_true", help="let anyone draw who reaches an address beyond this computer"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name under which the server is reached"
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages that may use the server, for example https://draw.example.org",
    )
    for name, help in _LIMITS.items():
        default = getattr(defaults, name)
        kind, metavar = (float, "SECONDS") if isinstance(default, float) else (int, "N")
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            metavar=metavar,
            help=help if default is None else f"{help} (default: {default:,})",
        )
    parser.add_argument(
        "--metadata", action=argparse.BooleanOptionalAction, default=True, help="say in pictures how they were made"
    )
    option_flags(parser, RequestOptions, only=("memory",))
    option_flags(parser, LoadOptions)


def _serve(arguments: argparse.Namespace) -> int:
    from tiue_runtime.pipeline import Pipeline as Loaded
    from tiue_runtime.serve import server
    from tiue_runtime.tools.console import write  # `console` needs NAMES.

    values, loading = vars(arguments), given(arguments, LoadOptions)
    limits = {name: values[name] for name in _LIMITS if values[name] is not None}
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    settings = ServerSettings(
        api_key=key,
        hosts=tuple(arguments.allow_host),
        origins=tuple(arguments.allow_origin),
        metadata=arguments.metadata,
        **limits,
    )
    if arguments.host not in _LOCAL and key is None and not arguments.without_key:
        raise RequestError(
            f"host: other computers can reach {arguments.host}: set `api_key` or {KEY_VARIABLE}, or pass `without_key`"
        )
    if not 0 <= arguments.port < 2**16:
        raise RequestError(f"port: expected a number from 0 to 65535, got {arguments.port}")
    with ExitStack() as stack:
        pipelines: dict[str, Pipeline] = {}
        for bundle in arguments.bundle or [None]:
            pipeline = stack.enter_context(Loaded.load(bundle, memory=arguments.memory or "auto", **loading))
            name = pipeline.bundle.manifest.name
            if name in pipelines:
                raise RequestError(f"bundle: two bundles have the name {name}")
            pipelines[name] = pipeline
        server.serve(
            pipelines,
            settings,
            arguments.host,
            arguments.port,
            lambda url: write(f"{url} draws with {_described(pipelines)}; Ctrl-C ends it"),
        )
    return 0


def _described(pipelines: "dict[str, Pipeline]") -> str:
    return ", ".join(f"{name} on {pipeline.device}" for name, pipeline in pipelines.items())
