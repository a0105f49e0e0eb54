"""A cache of traced graphs, for tests that export the same model again and test something else than tracing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from torch import nn

from export import assemble, trace
from tiue.files import fingerprint
from tiue.unet import TiUE

_TRACED: dict[str, list[bytes]] = {}


@contextmanager
def traced_once() -> Iterator[None]:
    """Within the block, an export takes graphs from the cache if the same graph was traced in such a block before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "unet_graphs", _once(trace.unet_graphs, _student))
        patch.setattr(assemble, "vae_decoder_graph", _once(trace.vae_decoder_graph, _vae))
        yield


def _once(make: Callable[..., Any], describe: Callable[..., str]) -> Callable[..., Any]:
    def traced(*given: Any) -> Any:
        key = f"{make.__name__} {describe(*given)}"
        if key not in _TRACED:
            found = make(*given)
            several = found if isinstance(found, tuple) else (found,)
            _TRACED[key] = [ir.to_proto(graph).SerializeToString() for graph in several]
            return found
        again = tuple(ir.from_proto(onnx.load_from_string(graph)) for graph in _TRACED[key])
        return again if len(again) > 1 else again[0]

    return traced


def _student(tiue: TiUE, *given: Any) -> str:
    return f"{_network(tiue.unet)} {tiue.encoder_timestep} {tiue.shared_up_blocks} {tiue.schedule} {given}"


def _vae(vae: nn.Module, *given: Any) -> str:
    return f"{_network(vae)} {given}"


def _network(module: nn.Module) -> str:
    return f"{fingerprint(module)} {module.config}"
