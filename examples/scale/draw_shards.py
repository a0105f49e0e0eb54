"""Draw the pictures of a list of prompts on a Ray cluster, in one Parquet file for each shard.

    python -m examples.scale.draw_shards prompts.txt pictures --shard-size 1000 --workers 8 --gpus 0.25

Picture i has the seed `--seed` + i, whoever draws it. Start the command again to draw what is missing: a shard that is
there is whole. `--shard 17` draws shard 17 alone, for example after its file was deleted.
"""

import argparse
import hashlib
import io
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = os.environ.get("RAY_USAGE_STATS_ENABLED") or "0"  # read when Ray starts

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from tiue_runtime import Bundle, Pipeline, TiueError
from tiue_runtime.bundle.find import find_bundle
from tiue_runtime.noise import check_seed

PLAN = "plan.json"
SCHEMA = pa.schema([("index", pa.int64()), ("prompt", pa.string()), ("seed", pa.uint64()), ("png", pa.binary())])


class Artist:
    """A worker with a loaded pipeline."""

    def __init__(self, out: str, seed: int, batch: int, bundle: str | None, device: str, threads: int) -> None:
        """Load a pipeline. seed: of picture 0. batch: pictures that are drawn at once."""
        self._out, self._seed, self._batch = Path(out), seed, batch
        self._pipeline = Pipeline.load(bundle, device=device, threads=threads)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Draw a shard. If Ray gives it to two workers, both write the same pictures."""
        begun, cpu, rows = time.monotonic(), time.process_time(), []
        for start in range(0, len(shard["prompts"]), self._batch):
            prompts = list(shard["prompts"][start : start + self._batch])
            first = shard["first"] + start
            # The library gives picture j of a request the request's seed + j.
            images = self._pipeline(prompts, seed=self._seed + first, memory="parallel").images
            for i, (prompt, image) in enumerate(zip(prompts, images, strict=True), first):
                file = io.BytesIO()
                image.save(file, "PNG")  # with its record
                rows.append({"index": i, "prompt": prompt, "seed": self._seed + i, "png": file.getvalue()})
        path = self._out / shard["file"]
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), unfinished)
        unfinished.replace(path)
        times = {"seconds": time.monotonic() - begun, "cpu_seconds": time.process_time() - cpu}
        return {"file": shard["file"], "pictures": len(rows), **times}


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0, 1 if pictures are missing, or 2 for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        _draw(arguments)
    except (TiueError, ValueError, OSError) as error:
        print(f"draw_shards: error: {error}", file=sys.stderr)
        return 2
    except ray.exceptions.RayError as error:  # of a worker
        print(f"draw_shards: error: {str(error).splitlines()[-1]}; start again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("draw_shards: interrupted; start again to go on", file=sys.stderr)
        return 1
    return 0


def _draw(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out.resolve()
    text = arguments.prompts.read_text(encoding="utf-8-sig")  # Some editors put a mark at the beginning.
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{arguments.prompts}: expected a prompt in each line, got no lines")
    check_seed(arguments.seed, len(prompts))
    shards = _shards(prompts, arguments.shard_size)
    if arguments.shard is not None and not 0 <= arguments.shard < len(shards):
        raise ValueError(f"--shard: expected a number from 0 to {len(shards) - 1}, got {arguments.shard}")
    out.mkdir(parents=True, exist_ok=True)
    _check_same_plan(out / PLAN, arguments, prompts)
    wanted = shards if arguments.shard is None else [shards[arguments.shard]]
    missing = [shard for shard in wanted if not (out / shard["file"]).exists()]
    print(f"{len(missing)} of {len(wanted)} shards are missing", flush=True)
    if not missing:
        return
    ray.init(os.environ.get("RAY_ADDRESS") or "local", include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    given = str(out), arguments.seed, arguments.batch, arguments.bundle, arguments.device, arguments.cpus
    drawn = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
        Artist,
        fn_constructor_args=given,
        compute=ray.data.ActorPoolStrategy(size=min(arguments.workers, len(missing))),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    )
    for shard in drawn.iter_rows():
        times = f"{shard['seconds']:.2f} s, {shard['cpu_seconds']:.2f} s of a core"
        print(f"{shard['file']}: {shard['pictures']} pictures, {times}", flush=True)


def _shards(prompts: list[str], size: int) -> list[dict[str, Any]]:
    return [
        {"file": f"shard-{first // size:06}.parquet", "first": first, "prompts": prompts[first : first + size]}
        for first in range(0, len(prompts), size)
    ]


def _check_same_plan(path: Path, arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Write down what determines the pictures, or compare it with what an earlier start wrote. Raises ValueError."""
    plan = {
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "bundle_sha256": Bundle.load(find_bundle(arguments.bundle)).sha256,
        "seed": arguments.seed,
        "shard_size": arguments.shard_size,
        "batch": arguments.batch,
    }
    if not path.exists():
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        unfinished.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in plan if before.get(name) != plan[name]]
    if changed:
        raise ValueError(f"{path}: the pictures there have another {', '.join(changed)}; choose another directory")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.scale.draw_shards", description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="a text file with one prompt a line")
    parser.add_argument("out", type=Path, help="a directory that all machines share")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default 0)")
    parser.add_argument("--shard-size", type=_positive, default=1000, help="pictures in a file (default 1000)")
    parser.add_argument("--shard", type=int, help="draw this shard alone (default all)")
    parser.add_argument("--bundle", help="a directory or an installed name (default emoji)")
    parser.add_argument("--device", default="auto", help="as in tiue-runtime (default auto)")
    parser.add_argument("--batch", type=_positive, default=1, help="pictures drawn at once (default 1)")
    parser.add_argument("--workers", type=_positive, default=1, help="pipelines on all machines together (default 1)")
    parser.add_argument("--cpus", type=_positive, default=1, help="CPU threads of a worker (default 1)")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a worker, for example 0.25 (default 0)")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
