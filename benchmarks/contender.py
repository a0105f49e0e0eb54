"""One contender in a process of its own, so that its peak memory is measured alone: JSON lines in, JSON lines out.

Requests: {"do": "picture" | "latents" | "eps", "noise": a .npy path, "steps"[, "save": a .npy path][, "png": a path]}.
Replies hold seconds, peak_bytes, and the result. The first reply comes before any request, when the model is loaded.
The interpreter needs numpy, Pillow, and the imports of the contender itself.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.eager import EagerStudent
from benchmarks.machine import peak_bytes
from benchmarks.native import OpenVino, StableDiffusionCpp
from benchmarks.peers import PROMPT, diffusers, optimum

Float32 = NDArray[np.float32]


class Contender(Protocol):
    """A program that makes pictures from given noise."""

    def picture(self, latents: Float32, steps: int) -> tuple[Float32, dict[str, float]]:
        """Make pictures: z_T (B, C, h, w) => images (B, H, W, 3) in [0, 1], and seconds by stage.

        Names of stages begin with text, unet or vae.
        """
        ...

    def latents(self, latents: Float32, steps: int) -> Float32 | None:
        """Denoise: z_T (B, C, h, w) => z_0 (B, C, h, w), or None if the program hides it."""
        ...

    def first_eps(self, latents: Float32, steps: int) -> tuple[Float32 | None, list[int]]:
        """Return the UNet's prediction at the first timestep (B, C, h, w), and all timesteps.

        Both are None and [] if the program hides them.
        """
        ...


class Tiue:
    """A bundle through tiue_runtime."""

    def __init__(
        self, directory: Path, device: str, threads: int, *, memory: Any = "parallel", vae: Any = "kl", **options: Any
    ):
        """Load a bundle.

        Args:
            directory: the bundle.
            device: as in `Pipeline.load`.
            threads: of the CPU.
            memory: of each request.
            vae: the kind of image decoder; by default that of the peers.
            **options: other options of `Pipeline.load`.
        """
        from tiue_runtime import Pipeline

        self._pipe = Pipeline.load(directory, device=device, vae=vae, memory=memory, threads=threads, **options)
        self._memory: Any = memory
        self._to_record = options.get("cuda_graphs", False)
        self._recorded: set[tuple[int, ...]] = set()

    def picture(self, latents: Float32, steps: int) -> tuple[Float32, dict[str, float]]:
        """See Contender. With cuda_graphs, the first request of a shape also records it.

        Raises:
            MemoryError: memory sufficed only for a slower mode.
        """
        if self._to_record and latents.shape not in self._recorded:
            count, _, height, width = latents.shape
            pixels = self._pipe.bundle.manifest.pixels_per_latent
            self._pipe.warmup(
                num_images=count, steps=steps, height=height * pixels, width=width * pixels, memory=self._memory
            )
            self._recorded.add(latents.shape)
        result = self._pipe(
            PROMPT, num_images=len(latents), latents=latents, steps=steps, memory=self._memory, output_type="np"
        )
        if result.memory != {"low": "sequential", "auto": result.memory}.get(self._memory, self._memory):
            raise MemoryError(f"expected memory={self._memory!r}, got {result.memory!r}: memory ran out")
        return result.images, {name: seconds for name, seconds in result.timings.items() if name != "total"}

    def latents(self, latents: Float32, steps: int) -> Float32:
        """See Contender."""
        return self._pipe(
            PROMPT, num_images=len(latents), latents=latents, steps=steps, memory=self._memory, output_type="latent"
        ).images

    def first_eps(self, latents: Float32, steps: int) -> tuple[Float32, list[int]]:
        """See Contender. A preview is w_0 z_T + (w_1 + ... + w_N) eps_1 after the first step."""
        from tiue_runtime import Cancelled, Progress

        previews: list[Float32] = []

        def first_estimate(progress: Progress) -> bool:
            """Keep the first estimate of z_0, and stop the request."""
            previews.extend([] if progress.latents is None else [progress.latents])
            return bool(previews)

        with suppress(Cancelled):
            self._pipe(
                PROMPT,
                num_images=len(latents),
                latents=latents,
                steps=steps,
                memory="low" if self._memory == "low" else "sequential",
                output_type="latent",
                callback=first_estimate,
            )
        schedule = self._pipe.bundle.manifest.schedules[steps]
        eps = (previews[0] - schedule.noise_weight * latents) / sum(schedule.step_weights)
        return eps.astype(np.float32), list(schedule.timesteps)


def make(kind: str, directory: Path, device: str, threads: int, options: dict[str, Any]) -> Contender:
    """Load a contender. `kind` is a key of `kinds.KINDS`."""
    if kind == "tiue":
        return Tiue(directory, device, threads, **options)
    if kind == "torch":
        return EagerStudent(directory, device, threads, **options)
    if kind == "diffusers":
        return diffusers(directory, threads, device, **options)
    return {"optimum": optimum, "openvino": OpenVino, "sdcpp": StableDiffusionCpp}[kind](directory, threads, **options)


def answer(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    noise, steps = np.load(request["noise"]), request["steps"]
    reply: dict[str, Any] = {}
    start = time.perf_counter()
    if request["do"] == "eps":
        array, reply["timesteps"] = contender.first_eps(noise, steps)
    elif request["do"] == "latents":
        array = contender.latents(noise, steps)
    else:
        array, reply["stages"] = contender.picture(noise, steps)
    reply["seconds"] = time.perf_counter() - start
    reply |= {"shape": None, "finite": True} if array is None else _about(array)
    if "png" in request:
        from PIL import Image

        Image.fromarray((array[0] * 255).round().astype(np.uint8)).save(request["png"], format="png")
    if "save" in request and array is not None:
        np.save(request["save"], array)
    return reply


def _about(array: Float32) -> dict[str, Any]:
    return {"shape": array.shape, "finite": bool(np.isfinite(array).all())}


def main(argument: str, requests: TextIO, replies: TextIO) -> int:
    """Serve requests until their stream ends. Returns 0.

    Args:
        argument: JSON with kind, directory, device, threads and options.
        requests: one JSON object a line.
        replies: the same.
    """
    given = json.loads(argument)
    # Some libraries start threads of their own. All of them respect a limit on cores.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given["threads"]])
    given["directory"] = Path(given["directory"])

    def reply(content: dict[str, Any]) -> None:
        print(json.dumps(content | {"peak_bytes": peak_bytes()}), file=replies, flush=True)

    contender = make(**given)
    reply({})
    for line in requests:
        reply(answer(contender, json.loads(line)))
    return 0


if __name__ == "__main__":
    # Output of libraries on stdout must not mix with the replies, so it goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(sys.argv[1], sys.stdin, out))
