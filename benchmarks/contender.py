"""One contender in a process of its own, so that its peak memory is its own: JSON lines in, JSON lines out.

Requests: {"do": "picture" | "eps", "shape": of one image's latents, "batch", "steps"[, "save": a .npy path]}.
Replies carry seconds, peak_bytes and what was asked for; the first, before any request, says that the model is loaded.
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

from .machine import peak_bytes
from .peers import PROMPT, diffusers, optimum

Float32 = NDArray[np.float32]
SEED = 0


class Contender(Protocol):
    """Something that makes pictures from our noise."""

    def picture(self, latents: Float32, steps: int) -> tuple[Float32, dict[str, float]]:
        """z_T (B,C,h,w) => images (B,H,W,3) in [0,1], seconds by stage."""
        ...

    def first_eps(self, latents: Float32, steps: int) -> tuple[Float32, list[int]]:
        """What the UNet predicts at the first timestep (B,C,h,w), and all the timesteps."""
        ...


class Tiue:
    """A bundle through tiue_runtime."""

    def __init__(self, directory: Path, device: str, *, memory: Any = "parallel", vae: Any = "kl", **options: Any):
        """memory: of each request; vae: by default the kind that the peers have; options: others of `Pipeline.load`."""
        from tiue_runtime import Pipeline

        self._pipe = Pipeline.load(directory, device=device, vae=vae, **options)
        self._memory: Any = memory
        self._to_record = options.get("cuda_graphs", False)
        self._recorded: set[tuple[int, ...]] = set()

    def picture(self, latents: Float32, steps: int) -> tuple[Float32, dict[str, float]]:
        """See Contender. The first of a shape, with cuda_graphs, also records it.

        Raises MemoryError where memory sufficed only for a slower mode.
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
        if result.memory != self._memory:
            raise MemoryError(f"asked for memory={self._memory!r}, which ran out: {result.memory!r} was used")
        return result.images, {name: seconds for name, seconds in result.timings.items() if name != "total"}

    def first_eps(self, latents: Float32, steps: int) -> tuple[Float32, list[int]]:
        """See Contender. A preview is w_0 z_T + (w_1 + ... + w_N) eps_1 after the first step."""
        from tiue_runtime import Cancelled

        previews: list[Float32] = []
        with suppress(Cancelled):  # after the first step
            self._pipe(
                PROMPT,
                num_images=len(latents),
                latents=latents,
                steps=steps,
                memory="sequential",
                output_type="latent",
                callback=lambda step, steps, preview: previews.append(preview),
                cancel=lambda: bool(previews),
            )
        schedule = self._pipe.bundle.manifest.schedules[steps]
        eps = (previews[0] - schedule.noise_weight * latents) / sum(schedule.step_weights)
        return eps.astype(np.float32), list(schedule.timesteps)


def make(kind: str, directory: Path, device: str, threads: int, options: dict[str, Any]) -> Contender:
    """Load a contender: kind is "tiue", "optimum" or "diffusers"."""
    if kind == "tiue":
        return Tiue(directory, device, **options)
    if kind == "optimum":
        return optimum(directory, threads, **options)
    return diffusers(directory, threads, device)


def answer(contender: Contender, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for, from the noise of seeds SEED, SEED + 1 ..."""
    from tiue_runtime.noise import gaussian

    latents = np.stack([gaussian(SEED + i, tuple(request["shape"])) for i in range(request["batch"])])
    start = time.perf_counter()
    if request["do"] == "eps":
        array, timesteps = contender.first_eps(latents, request["steps"])
        reply: dict[str, Any] = {"timesteps": timesteps}
    else:
        array, stages = contender.picture(latents, request["steps"])
        reply = {"stages": stages}
    reply |= {"seconds": time.perf_counter() - start, "shape": array.shape, "finite": bool(np.isfinite(array).all())}
    if "save" in request:
        np.save(request["save"], array)
    return reply


def main(argument: str, requests: TextIO, replies: TextIO) -> int:
    """Serve requests until there are no more. argument: JSON with kind, directory, device, threads, options."""
    given = json.loads(argument)
    # The cores are the limit that both keep to: tiue_runtime starts as many threads as it may use cores.
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
    # What libraries print to stdout must not get between the replies.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(sys.argv[1], sys.stdin, out))
