"""What a GPU computes, beside the CPU. `python -m benchmarks.gpu --parts tests` runs these tests."""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from tiue_runtime import Pipeline
from tolerances import ALMOST_ZERO, GPU_FLOAT16, GPU_FLOAT32, GPU_LOSSES

from tiue.distill.config import DistillConfig
from tiue.distill.vsd import prepare
from tiue.text_encoder import encode_text
from tiue.unet import TiUE

DEVICE = os.environ.get("TIUE_GPU_TESTS_ON", "cuda")  # the dry run of the benchmark sets cpu
BUNDLE = Path(__file__).parents[1] / "runtime/tests/data/tiny"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def relative(found, expected):
    """The root of the mean square difference, relative to the root of the mean square."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, GPU_FLOAT32), (torch.float16, GPU_FLOAT16)], ids=["float32", "float16"]
)
@pytest.mark.parametrize("model", ["sd15", "v_prediction"])
def test_a_student_makes_the_latents_of_the_cpu(model, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    components = getattr(tiny, model)()
    schedule = components.noise_schedule.closed_form(4)
    tiue = TiUE(components.unet, schedule, schedule.timesteps[0])
    noise = torch.randn(3, *components.geometry.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        text = encode_text(components, ["a red heart", "a cat", ""])
        expected = tiue(noise, text)
        found = tiue.to(DEVICE, dtype)(noise.to(DEVICE, dtype), text.to(DEVICE, dtype))
    assert found.device.type == DEVICE and found.dtype == dtype
    assert relative(found.float().cpu(), expected) < tolerance


def losses_of(out, on, monkeypatch):
    """VSD, KL and the fake score's loss of two updates on a device, (2, 3)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(on == "cpu").lower())
    config = DistillConfig(batch_size=2, learning_rate=1e-4, lora_rank=2, lora_alpha=2)
    run, method = prepare(tiny.emoji(), ["a red heart", "a cat", "the sea"], out, config)
    assert run.accelerator.device.type == on
    updates = [method.update(step, run.batch(step)) for step in range(2)]
    return np.array([[float(update[name]) for name in ("vsd", "kl", "fake")] for update in updates])


def test_updates_have_the_losses_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = losses_of(tmp_path / "cpu", "cpu", monkeypatch)
    found = losses_of(tmp_path / "gpu", DEVICE, monkeypatch)
    np.testing.assert_allclose(found, expected, rtol=GPU_LOSSES, atol=ALMOST_ZERO)


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["without CUDA graphs", "CUDA graphs"])
def test_a_bundle_makes_the_latents_of_the_cpu(cuda_graphs):
    if DEVICE == "cuda":
        runtime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" not in runtime.get_available_providers():
            pytest.skip(f"ONNX Runtime {runtime.__version__} has no CUDAExecutionProvider")
    cuda_graphs = cuda_graphs and DEVICE == "cuda"
    options = {"seed": 7, "output_type": "latent"}
    expected = Pipeline.load(BUNDLE, device="cpu")(["a red heart", "a blue star"], **options)
    pipe = Pipeline.load(BUNDLE, device=DEVICE, cuda_graphs=cuda_graphs)
    if cuda_graphs:
        pipe.warmup(num_images=2)
    found = pipe(["a red heart", "a blue star"], **options)
    assert found.device == DEVICE
    assert relative(found.images, expected.images) < GPU_FLOAT32
