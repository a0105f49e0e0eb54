"""The tiny bundle (see make_tiny_bundle.py), and its closed form, computed in float64 without ONNX."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest
from tiue_runtime import Pipeline, graphs
from tiue_runtime.ort.devices import KINDS

TINY = Path(__file__).parent / "data" / "tiny"
TAU = {751: 0.9, 501: 0.7, 251: 0.4, 1: 0.2}
SCHEDULES = {2: (0.3, {501: -0.5, 1: 0.25}), 4: (0.2, {751: 0.5, 501: -0.25, 251: 1.5, 1: 0.125})}
TOKENS = {"a red heart": [1, 4, 5, 7, 2], "a blue star": [1, 4, 6, 8, 2]}  # <start> ... <end>, then padding
CLOSED_FORM = {"rtol": 1e-5, "atol": 1e-5}  # float32 graphs against float64


def embedding(prompt: str) -> np.ndarray:
    """Return the embedding (L, D) of a prompt. Padding is masked to zero."""
    text = np.zeros((8, 3))
    for row, i in enumerate(TOKENS[prompt]):
        text[row] = i / 10, -i / 20, 1 / (1 + i)
    return text


def eps(z_t: np.ndarray, text: np.ndarray, timestep: int) -> np.ndarray:
    return np.tanh(0.5 * z_t.astype(np.float64) * TAU[timestep] + text.mean())


@pytest.fixture(autouse=True)
def own_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines of one test share graphs with each other, not with those of other tests."""
    monkeypatch.setattr(graphs, "_shared", WeakValueDictionary())


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    return Pipeline.load(TINY, device="cpu")


@pytest.fixture(scope="session")
def heavy() -> Path:
    """The tiny bundle with estimates of memory and two image decoders."""
    return TINY.with_name("heavy")


@pytest.fixture(scope="session")
def heavy_pipe(heavy: Path) -> Pipeline:
    return Pipeline.load(heavy, device="cpu")


@pytest.fixture(scope="session")
def closed_form() -> Callable[..., np.ndarray]:
    """closed_form(z_T (C, h, w), prompt or text (L, D), steps) => z_0 (C, h, w)."""

    def z_0(z_t: np.ndarray, prompt: str | np.ndarray, steps: int = 4) -> np.ndarray:
        text = embedding(prompt) if isinstance(prompt, str) else prompt
        noise_weight, weights = SCHEDULES[steps]
        return noise_weight * z_t + sum(w * eps(z_t, text, t) for t, w in weights.items())

    return z_0


@pytest.fixture(scope="session")
def closed_form_eps() -> Callable[..., np.ndarray]:
    return lambda z_t, prompt, timestep: eps(z_t, embedding(prompt), timestep)


@pytest.fixture
def close() -> Callable[[Any, Any], None]:
    return lambda actual, expected: np.testing.assert_allclose(actual, expected, **CLOSED_FORM)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the tiny bundle to damage."""
    return Path(shutil.copytree(TINY, tmp_path / "copy"))


@pytest.fixture
def edit(copy: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """edit(change) applies `change` to the bundle.json of a copy, and returns the copy."""

    def apply(change: Callable[[dict[str, Any]], Any]) -> Path:
        path = copy / "bundle.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        return copy

    return apply


@pytest.fixture
def onnxruntime_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """onnxruntime_with(name=value, ...) replaces some names of ONNX Runtime until the test ends."""
    import onnxruntime

    def replace(**names: object) -> ModuleType:
        fake = ModuleType("onnxruntime")
        fake.__dict__.update({**vars(onnxruntime), **names})
        monkeypatch.setitem(sys.modules, "onnxruntime", fake)
        return fake

    return replace


@pytest.fixture
def granting(onnxruntime_with: Callable[..., ModuleType]) -> Callable[..., None]:
    """granting({kind: problem, ...}) fakes an ONNX Runtime with these kinds of device. "" starts, others raise.

    bf16: whether matrix products are rounded, as on a CPU with bf16 instructions.
    """

    def install(problems: dict[str, str], bf16: bool = False) -> None:
        class Session:
            def __init__(self, model: object, sess_options: object, providers: Any, enable_fallback: bool) -> None:
                self.name, _ = providers[0]
                for kind, problem in problems.items():
                    if problem and KINDS[kind].provider == self.name:
                        raise RuntimeError(problem)

            def get_providers(self) -> list[str]:
                return [self.name]

            def disable_fallback(self) -> None:
                pass

            def run(self, outputs: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
                product = feed["a"] @ feed["b"]
                if bf16:
                    product = ((product.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
                return [product]

        names = [KINDS[kind].provider for kind in problems]
        onnxruntime_with(get_available_providers=lambda: names, InferenceSession=Session, preload_dlls=lambda: None)

    return install


@pytest.fixture
def another_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Install a second wheel of ONNX Runtime beside the real one. Returns its name."""
    info = tmp_path / "wheels/onnxruntime_directml-1.20.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-directml\nVersion: 1.20.0\n")
    monkeypatch.syspath_prepend(info.parent)
    return "onnxruntime-directml"
