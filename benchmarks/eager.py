"""The algorithm in eager PyTorch: `tiue.unet.TiUE` around the UNet of a pipeline, without an export."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers import PROMPT

Float32 = NDArray[np.float32]


class EagerStudent:
    """The parts of a diffusers pipeline, with its UNet as a TiUE.

    It computes in float32 on the CPU, and in float16 on CUDA, where it has not run yet.
    """

    def __init__(self, directory: Path, device: str, threads: int, *, compile: bool = False):
        """Load a pipeline.

        Args:
            directory: a diffusers pipeline directory.
            device: "cpu" or "cuda".
            threads: of the CPU.
            compile: run the TiUE through torch.compile.

        Raises:
            RuntimeError: torch.compile finds no C++ compiler.
        """
        compiler = os.environ.get("CXX", "g++")
        if compile and not shutil.which(compiler):
            raise RuntimeError(f"torch.compile needs a C++ compiler: expected {compiler} (or CXX) on PATH, found none")
        # Every start compiles anew. Files of an earlier start would turn the cold start into a warm one.
        self._cache = tempfile.TemporaryDirectory()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._cache.name

        import torch

        from tiue.components import load_components

        torch.set_num_threads(threads)
        cuda = device != "cpu"
        self._synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
        self._components = load_components(directory)
        for part in (self._components.unet, self._components.text_encoder, self._components.vae):
            part.to(device, torch.float16 if cuda else torch.float32)
        self._compile = compile
        self._predictors: dict[int, tuple[Any, list[int]]] = {}

    def picture(self, latents: Float32, steps: int) -> tuple[Float32, dict[str, float]]:
        """See contender.Contender."""
        import torch

        from tiue.components import decode_latents

        seconds: dict[str, float] = {}
        with torch.inference_mode():
            z, _ = self._predict(latents, steps, seconds)
            start = time.perf_counter()
            image = decode_latents(self._components.vae, z)
            self._synchronize()
            seconds["vae_decoder"] = time.perf_counter() - start
            image = (
                (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
            )  # (B, 3, H, W) in [-1, 1] => (B, H, W, 3) in [0, 1]
            return image.float().cpu().numpy(), seconds

    def latents(self, latents: Float32, steps: int) -> Float32:
        """See contender.Contender."""
        import torch

        with torch.inference_mode():
            return self._predict(latents, steps, {})[0].float().cpu().numpy()

    def first_eps(self, latents: Float32, steps: int) -> tuple[Float32, list[int]]:
        """See contender.Contender."""
        import torch

        with torch.inference_mode():
            _, eps = self._predict(latents, steps, {})
            return eps[0].float().cpu().numpy(), self._predictor(steps)[1]

    def _predict(self, latents: Float32, steps: int, seconds: dict[str, float]) -> Any:
        """Return (z_0, eps), and write the time of each part into `seconds`."""
        import torch

        from tiue.text_encoder import encode_text

        predict, _ = self._predictor(steps)
        start = time.perf_counter()
        text = encode_text(self._components, [PROMPT]).expand(len(latents), -1, -1)
        self._synchronize()
        seconds["text_encoder"] = time.perf_counter() - start
        start = time.perf_counter()
        result = predict(torch.from_numpy(latents).to(text.device, text.dtype), text)
        self._synchronize()
        seconds["unet"] = time.perf_counter() - start
        return result

    def _predictor(self, steps: int) -> tuple[Any, list[int]]:
        if steps not in self._predictors:
            import torch

            from tiue.unet import TiUE

            schedule = self._components.noise_schedule.closed_form(steps)
            tiue = TiUE(self._components.unet, schedule, encoder_timestep=schedule.timesteps[0])
            predict = torch.compile(tiue.predict) if self._compile else tiue.predict
            self._predictors[steps] = predict, list(schedule.timesteps)
        return self._predictors[steps]
