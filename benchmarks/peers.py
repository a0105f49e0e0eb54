"""Peers with PyTorch: optimum's ONNX Runtime pipeline, and diffusers' own. Both run the full UNet at every step.

`python -m benchmarks.peers PIPELINE OUT` exports the directory that optimum loads.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import peak_bytes

PROMPT = "a red heart"

# At import, diffusers reports that optimum-onnx shares a namespace with optimum.
logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)


def export_optimum(pipeline: Path, out: Path) -> dict[str, float]:
    """Export a pipeline directory as optimum does, offline.

    The VAE's encoder is left out, because text to image does not use it, and the peer shall load no more than it needs.

    Args:
        pipeline: a diffusers pipeline directory.
        out: where to write. It appears when it is complete.

    Returns:
        {"seconds", "peak_bytes"} of the export, which are also in out/export.json.
    """
    from optimum.exporters.onnx import main_export

    from export.quiet import quiet

    start = time.perf_counter()
    building = out.absolute().with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with quiet():
            main_export(
                str(pipeline),
                output=building,
                task="text-to-image",
                library_name="diffusers",
                do_validation=False,  # The benchmark compares its first noise prediction with ours.
                no_post_process=True,
                local_files_only=True,
            )
        shutil.rmtree(building / "vae_encoder")
        cost = {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes()}
        (building / "export.json").write_text(json.dumps(cost), encoding="utf-8")
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return cost


class Peer:
    """A pipeline in the style of diffusers, with DDIM steps and without guidance, timed by part."""

    def __init__(self, pipe: Any, parts: dict[str, Any], synchronize: Callable[[], None]):
        """Wrap a pipeline.

        Args:
            pipe: the pipeline.
            parts: objects whose `forward` is timed, by stage. The UNet's stage is "unet".
            synchronize: waits until the device has finished.
        """
        self._pipe = pipe
        self._pipe.set_progress_bar_config(disable=True)
        self._seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._eps: NDArray[np.float32] | None = None
        self._only_eps = False
        for name, part in parts.items():
            part.forward = self._timed(name, part.forward)

    def picture(self, latents: NDArray[np.float32], steps: int) -> tuple[NDArray[np.float32], dict[str, float]]:
        """See contender.Contender."""
        self._seconds.clear()
        return self._run(latents, steps, "np"), dict(self._seconds)

    def latents(self, latents: NDArray[np.float32], steps: int) -> NDArray[np.float32]:
        """See contender.Contender."""
        return self._run(latents, steps, "latent").float().cpu().numpy()

    def first_eps(self, latents: NDArray[np.float32], steps: int) -> tuple[NDArray[np.float32], list[int]]:
        """See contender.Contender."""
        self._only_eps = True
        try:
            self._run(latents, steps, "latent")
        finally:
            self._only_eps = False
        assert self._eps is not None
        return self._eps, [int(t) for t in self._pipe.scheduler.timesteps]

    def _run(self, latents: NDArray[np.float32], steps: int, output_type: str) -> Any:
        import torch

        return self._pipe(
            PROMPT,
            num_images_per_prompt=len(latents),
            latents=torch.from_numpy(latents).to(self._pipe.unet.device, self._pipe.unet.dtype),
            height=latents.shape[2] * self._pipe.vae_scale_factor,
            width=latents.shape[3] * self._pipe.vae_scale_factor,
            num_inference_steps=steps,
            guidance_scale=1.0,  # no guidance
            output_type=output_type,
        ).images

    def _timed(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = forward(*args, **kwargs)
            self._synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            if name == "unet" and self._only_eps:
                self._eps = result[0].float().cpu().numpy()
                self._pipe._interrupt = True  # With this switch, diffusers skips the remaining steps.
            return result

        return timed


def optimum(directory: Path, threads: int, *, spinning: bool = False) -> Peer:
    """Load optimum's ORTStableDiffusionPipeline on the CPU.

    Args:
        directory: the output of `export_optimum`.
        threads: of the CPU.
        spinning: whether idle threads spin, as by ONNX Runtime's default. They do not in tiue_runtime, and so not here
            by default. Where other processes want the cores, spinning costs a factor of 2.
    """
    import torch
    from onnxruntime import SessionOptions
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    torch.set_num_threads(threads)
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    pipe = ORTStableDiffusionPipeline.from_pretrained(
        directory, export=False, local_files_only=True, scheduler=_ddim(directory), session_options=options
    )
    parts = {"text_encoder": pipe.text_encoder, "unet": pipe.unet, "vae_decoder": pipe.vae_decoder}
    return Peer(pipe, parts, lambda: None)


def diffusers(directory: Path, threads: int, device: str) -> Peer:
    """Load diffusers' StableDiffusionPipeline: float32 on the CPU, float16 on CUDA, where it has not run yet."""
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(threads)
    cuda = device != "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(
        directory,
        scheduler=_ddim(directory),
        torch_dtype=torch.float16 if cuda else torch.float32,
        use_safetensors=True,
        local_files_only=True,
    ).to(device)
    parts = {"text_encoder": pipe.text_encoder, "unet": pipe.unet, "vae_decoder": pipe.vae.decoder}
    return Peer(pipe, parts, torch.cuda.synchronize if cuda else lambda: None)


def ddim_steps(directory: Path, steps: int) -> list[tuple[int, float, float]]:
    """Return (t, a, b) of every step z <- a z + b eps. diffusers' DDIMScheduler computes them; its steps are linear."""
    import torch

    scheduler = _ddim(directory)
    scheduler.set_timesteps(steps)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def step(eps: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> float:
        return float(scheduler.step(eps, t, z).prev_sample)

    return [(int(t), step(zero, t, one), step(one, t, zero)) for t in scheduler.timesteps]


def noise_levels(directory: Path, timesteps: Sequence[int]) -> list[float]:
    """Return sqrt(1/abar_t - 1) of each timestep."""
    abar = _ddim(directory).alphas_cumprod.double()
    return [float((1 / abar[t] - 1).sqrt()) for t in timesteps]


def _ddim(directory: Path) -> Any:
    from diffusers import DDIMScheduler

    # DDIM clips by default, and configurations of other schedulers may lack the option.
    return DDIMScheduler.from_pretrained(directory, subfolder="scheduler", clip_sample=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Export the directory that optimum loads."
    )
    parser.add_argument("pipeline", type=Path, help="a diffusers pipeline directory")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    arguments = parser.parse_args(argv)
    cost = export_optimum(arguments.pipeline, arguments.out)
    print(f"wrote {arguments.out} in {cost['seconds']:.0f} s, {cost['peak_bytes'] / 2**30:.1f} GiB at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
