"""The server of `tiue-runtime serve` on a Ray cluster, with as many replicas as its queue needs.

    python -m examples.scale.serve_replicas --most 8 --gpus 0.25

Every replica is a whole server: a pipeline, its queue and its worker. Ray's proxies spread the requests.
"""

import argparse
import os
import sys
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ.get("RAY_USAGE_STATS_ENABLED") or "0"  # read when Ray starts

import ray
from ray import serve
from starlette.applications import Starlette
from tiue_runtime import Bundle, Pipeline, TiueError
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.serve.app import create_app
from tiue_runtime.serve.server_settings import KEY_VARIABLE, ServerSettings

MOST_WAITING = 8  # requests in a replica; further ones wait in Ray's proxies
MOST_QUEUED = 256  # requests in a proxy; further ones are answered with 503
NAME = "tiue"  # of the application in Ray Serve
GOAL = 2  # requests in a replica, on average; above it Ray starts replicas, below it Ray ends some


@serve.deployment(max_ongoing_requests=MOST_WAITING, max_queued_requests=MOST_QUEUED, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Server:
    """A replica."""

    def __init__(self, bundle: str | None, device: str, threads: int, settings: ServerSettings) -> None:
        """Load a pipeline. On the device "auto", that is the GPU that Ray gave to this replica, if any."""
        self._pipeline = Pipeline.load(bundle, device=device, threads=threads)
        self._settings = settings

    def __serve_build_asgi_app__(self) -> Starlette:
        """Return the application, which Ray calls for each request."""
        return create_app({self._pipeline.bundle.manifest.name: self._pipeline}, self._settings)


def main(argv: list[str] | None = None) -> int:
    """Run the command until Ctrl-C. Returns 0, 1 if Ray fails, or 2 for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        _serve(arguments)
    except (TiueError, ValueError, OSError) as error:
        print(f"serve_replicas: error: {error}", file=sys.stderr)
        return 2
    except ray.exceptions.RayError as error:
        print(f"serve_replicas: error: {str(error).splitlines()[-1]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _serve(arguments: argparse.Namespace) -> None:
    key = os.environ.get(KEY_VARIABLE) or None
    if key is None and arguments.host != "127.0.0.1":
        raise ValueError(f"--host: others reach {arguments.host}; set a key in the variable {KEY_VARIABLE}")
    if not 1 <= arguments.least <= arguments.most:
        raise ValueError(f"--least, --most: expected 1 <= least <= most, got {arguments.least} and {arguments.most}")
    Bundle.load(find_bundle(arguments.bundle))  # A mistake shows here, not in the log of a replica.
    settings = ServerSettings(api_key=key, hosts=tuple(arguments.allow_host), most_waiting=MOST_WAITING)
    scaling: dict[str, Any] = {"min_replicas": arguments.least, "max_replicas": arguments.most}
    replicas = Server.options(
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        autoscaling_config=scaling | {"target_ongoing_requests": GOAL},
    )
    ray.init(os.environ.get("RAY_ADDRESS") or "local", include_dashboard=False)
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    application = replicas.bind(arguments.bundle, arguments.device, arguments.cpus, settings)
    try:
        serve.run(application, name=NAME, blocking=True)
    except KeyboardInterrupt:
        serve.delete(NAME)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.scale.serve_replicas", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--bundle", help="a directory that all machines have, or an installed name (default emoji)")
    parser.add_argument("--device", default="auto", help="as in tiue-runtime (default auto)")
    parser.add_argument("--least", type=int, default=1, help="replicas that always run (default 1)")
    parser.add_argument("--most", type=int, default=4, help="replicas that may run (default 4)")
    parser.add_argument("--cpus", type=int, default=1, help="CPU threads of a replica (default 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a replica, for example 0.25 (default 0)")
    parser.add_argument("--host", default="127.0.0.1", help="the address of each proxy (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="of each proxy (default 8000)")
    parser.add_argument("--allow-host", action="append", default=[], help="a name that clients use for this server")
    return parser


if __name__ == "__main__":
    sys.exit(main())
