"""Fixtures that several test files share."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tracing
from accelerate.state import AcceleratorState
from safetensors import safe_open

from tiue.components import Components, load_components

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


@pytest.fixture(scope="session", autouse=True)
def place_of_traces(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All workers of a run share it. See tracing.py."""
    own = tmp_path_factory.getbasetemp()
    is_of_worker = own.name.startswith("popen-")  # A test may start pytest itself, with a worker's environment.
    tracing.place = (own.parent if is_of_worker else own) / "traces"
    tracing.place.mkdir(exist_ok=True)


@pytest.fixture
def traced_once() -> Iterator[None]:
    """For a test that exports, and tests something else than tracing. See tracing.py."""
    with tracing.traced_once():
        yield


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of a process's first run for all that follow. Every test is a run of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
