"""Traced graphs that tests share, for exports that test something else than tracing, which takes most of their time."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from filelock import FileLock
from torch import nn

from export import assemble, trace
from tiue.files import fingerprint
from tiue.unet import TiUE

place = Path()  # conftest.py sets it to a directory that all workers of a run of pytest share


@contextmanager
def traced_once() -> Iterator[None]:
    """Within the block, an export takes graphs that any test of this run has traced in such a block before.

    Exports of `tiny.sd15()` and `tiny.emoji()` with the four steps of test_export.py's SCHEDULES share theirs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "unet_graphs", _once(trace.unet_graphs, _student))
        patch.setattr(assemble, "vae_decoder_graph", _once(trace.vae_decoder_graph, _vae))
        yield


def _once(make: Callable[..., Any], describe: Callable[..., str]) -> Callable[..., Any]:
    def traced(*given: Any) -> Any:
        key = hashlib.sha256(f"{make.__name__} {describe(*given)}".encode()).hexdigest()
        with FileLock(place / f"{key}.lock"):
            if not (place / key).exists():
                found = make(*given)
                several = found if isinstance(found, tuple) else (found,)
                (place / key).mkdir()
                for number, graph in enumerate(several):
                    onnx.save(ir.to_proto(graph), place / key / f"{number}.onnx")
                return found
        paths = sorted((place / key).iterdir())
        again = tuple(ir.from_proto(onnx.load(path)) for path in paths)
        return again if len(again) > 1 else again[0]

    return traced


def _student(tiue: TiUE, *given: Any) -> str:
    return f"{_network(tiue.unet)} {tiue.encoder_timestep} {tiue.shared_up_blocks} {tiue.schedule} {given}"


def _vae(vae: nn.Module, *given: Any) -> str:
    return f"{_network(vae)} {given}"


def _network(module: Any) -> str:
    """Describe weights and configuration, without where they were read from."""
    own = {name: value for name, value in module.config.items() if not name.startswith("_")}
    return f"{fingerprint(module)} {json.dumps(own, sort_keys=True)}"
