"""The last stage, from latents to pictures: all at once where memory suffices, else one at a time or in tiles."""

import warnings

import numpy as np

from tiue_runtime.budget import Budget
from tiue_runtime.bundle import IMAGE, LATENTS, VAE_DECODER, Manifest
from tiue_runtime.errors import LoadingError, OutOfMemoryError
from tiue_runtime.ort.graph import Graph
from tiue_runtime.run import Run
from tiue_runtime.tiling import Float32, Plan, decode, plans


class ImageDecoder:
    """A loaded image decoder."""

    def __init__(self, graph: Graph, name: str, manifest: Manifest, budget: Budget, remedy: str) -> None:
        """Take a loaded graph and its name in the bundle; remedy is what helps against values that are not finite."""
        self.graph = graph
        self._name = name
        self._manifest = manifest
        self._budget = budget
        self._remedy = remedy

    def __call__(self, z_0: Float32, tiling: bool | None, run: Run) -> tuple[Float32, tuple[int, int] | None]:
        """z_0 (B,C,h,w) => image float32 (B,3,H,W) in [-1,1], and (height, width) of its tiles in pixels, if any.

        tiling: as in `tiling.plans`. Raises InferenceError, OutOfMemoryError, Cancelled.
        """
        manifest = self._manifest
        latents = z_0 / np.float32(manifest.vae_scaling_factor) + np.float32(manifest.vae_shift_factor)
        pixels = manifest.pixels_per_latent

        def decode_part(part: Float32) -> Float32:
            count, _, height, width = part.shape
            with run.timed(VAE_DECODER):
                image = self.graph({LATENTS: part}, cancelled=run.cancelled)[IMAGE]
            self.graph.check_output(IMAGE, image, (count, 3, height * pixels, width * pixels), self._remedy)
            return image

        ways = plans(manifest, z_0.shape, tiling)
        first = next((i for i, plan in enumerate(ways) if self._fits(plan)), len(ways) - 1)
        why = f"{self._name} would run out of memory on {self.graph.device}, by the bundle's estimate"
        for plan in ways[first:]:
            if plan is not ways[first] or (plan.tiled and tiling is None):
                warnings.warn(f"{why}: {plan.describe(pixels)}", stacklevel=3)
            try:
                image = decode(decode_part, latents, plan, pixels)
            except LoadingError:
                raise  # for a tile, too
            except OutOfMemoryError as error:
                self._budget.released(self._name)
                why = str(error)
                continue
            if self.graph.keeps:
                self._budget.succeeded(self._name, plan.rows, plan.height * plan.width)
            return image, (plan.height * pixels, plan.width * pixels) if plan.tiled else None
        raise OutOfMemoryError(why)

    def fits_whole(self, shape: tuple[int, ...], before: tuple[str, int, int]) -> bool:
        """Whether latents (B,C,h,w) can be decoded one at a time, untiled, beside what the run `before` keeps.

        before: (graph, rows, h*w).
        """
        return self._budget.fits(self._name, 1, shape[2] * shape[3], before)

    def _fits(self, plan: Plan) -> bool:
        return self._budget.fits(self._name, plan.rows, plan.height * plan.width)
