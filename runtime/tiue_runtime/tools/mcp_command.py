"""The command `mcp`: pictures for assistants that speak the Model Context Protocol."""

import argparse
import sys

from tiue_runtime.errors import RequestError
from tiue_runtime.options import LoadOptions
from tiue_runtime.tools.console import write
from tiue_runtime.tools.flags import Add, bundle_flag, given, option_flags


def register(add: Add) -> None:
    """Add the command."""
    parser = add("mcp", _run, "draw for an assistant that starts this command as an MCP server")
    bundle_flag(parser)
    option_flags(parser, LoadOptions, only=("device", "threads"))
    parser.add_argument(
        "--format", choices=("png", "jpeg", "webp"), default="png", help="of the pictures (default: png, without loss)"
    )


def _run(arguments: argparse.Namespace) -> int:
    """Serve until the assistant closes stdin."""
    from tiue_runtime.bundle import Bundle
    from tiue_runtime.bundle.find import find_bundle

    try:
        from tiue_runtime.tools.mcp_server import serve
    except ImportError as error:
        name = str(error.name).partition(".")[0]
        raise RequestError(f"mcp: expected the package {name}, got none: pip install mcp") from error
    bundle = Bundle.load(find_bundle(arguments.bundle))
    loading = given(arguments, LoadOptions)
    if sys.stdin is not None and sys.stdin.isatty():
        write("tiue-runtime: waiting for an assistant on stdin; docs/mcp.md says how one is set up", "stderr")
    return serve(bundle, arguments.format, loading)
