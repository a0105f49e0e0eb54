"""Fixtures that several test files share."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from torch import nn

from export import assemble as assembling
from export import graphs
from tiue.components import Components, load_components
from tiue.files import fingerprint
from tiue.unet import TiUE

if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # the programs that tests start: sums of another order are other numbers

GOLDEN_DIRECTORY = Path(__file__).parent / "data" / "sd21-tiny"


class Golden(NamedTuple):
    """One golden case: see tests/data/README.md."""

    steps: int
    timesteps: list[int]
    prompts: list[str]
    noise: torch.Tensor
    input_ids: torch.Tensor
    prompt_embeds: torch.Tensor
    latents: torch.Tensor
    image_uint8: torch.Tensor


CASES = [f"steps{n}.{shape}" for n in (1, 2, 4) for shape in ("batch1.size16", "batch3.size24")]


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    case = request.param
    with safe_open(GOLDEN_DIRECTORY / "golden.safetensors", "pt") as file:
        about = json.loads(file.metadata()[case])
        tensors = {name: file.get_tensor(f"{case}.{name}") for name in Golden._fields[3:]}
    return Golden(len(about["timesteps"]), about["timesteps"], about["prompts"], **tensors)


@pytest.fixture(scope="session")
def golden_directory() -> Path:
    return GOLDEN_DIRECTORY


@pytest.fixture(scope="session")
def golden_components() -> Components:
    return load_components(GOLDEN_DIRECTORY)


@pytest.fixture(autouse=True, scope="session")
def traced_once() -> Iterator[None]:
    """Tracing is most of the time of an export; what is traced the same way again comes from the first time."""
    made: dict[str, list[bytes]] = {}

    def once(trace: Callable[..., Any], described: Callable[..., str]) -> Callable[..., Any]:
        def traced(*given: Any) -> Any:
            key = f"{trace.__name__} {described(*given)}"
            if key not in made:
                found = trace(*given)
                several = found if isinstance(found, tuple) else (found,)
                made[key] = [ir.to_proto(graph).SerializeToString() for graph in several]
                return found
            again = tuple(ir.from_proto(onnx.load_from_string(graph)) for graph in made[key])
            return again if len(again) > 1 else again[0]

        return traced

    def network(module: nn.Module) -> str:
        return f"{fingerprint(module)} {module.config}"

    def student(tiue: TiUE, *given: Any) -> str:
        return f"{network(tiue.unet)} {tiue.encoder_timestep} {tiue.shared_up_blocks} {tiue.schedule} {given}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembling, "unet_graphs", once(graphs.unet_graphs, student))
        vae = once(graphs.vae_decoder_graph, lambda vae, form: f"{network(vae)} {form}")
        patch.setattr(assembling, "vae_decoder_graph", vae)
        yield


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run for all that follow; tests are runs of their own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
