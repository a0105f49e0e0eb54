"""From z_0 to pixels: the image decoder's graph, in one run or, where memory is short, in parts."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

from tiue_runtime.bundle import IMAGE, LATENTS, VAE_DECODER, Manifest
from tiue_runtime.errors import LoadingError, OutOfMemoryError
from tiue_runtime.graphs import Turns
from tiue_runtime.ort.graph import Float32, Graph
from tiue_runtime.tiling import Plan, decode_parts, plans


def decode_image(
    turns: Turns, manifest: Manifest, z_0: Float32, tiling: bool | None
) -> tuple[Float32, tuple[int, int] | None]:
    """Decode latents.

    Args:
        turns: runs the graph.
        manifest: of the bundle.
        z_0: float32 (B, C, h, w).
        tiling: as in `tiling.plans`. If a plan runs out of memory, the next one follows, with a warning.

    Returns:
        The image, float32 (B, 3, H, W) in [-1, 1], and (height, width) of its tiles in pixels, if any.

    Raises:
        InferenceError: the image is not finite, or the graph failed. OutOfMemoryError is a subclass.
        Cancelled: the caller wants to stop.
    """
    graph, name = turns.graphs.vae_decoder, turns.graphs.vae_name
    pixels = manifest.pixels_per_latent
    remedy = turns.graphs.overflow_remedy(vae=True)

    def run_part(part: Float32) -> Float32:
        count, _, height, width = part.shape
        image = turns(VAE_DECODER, graph, {LATENTS: part})[IMAGE]
        graph.check_output(IMAGE, image, (count, 3, height * pixels, width * pixels), remedy)
        return image

    ways = plans(manifest, z_0.shape, tiling)
    wanted = [plan for plan in ways if tiling is not None or not plan.tiled]
    image, plan = run_in_parts(turns, graph, name, VAE_DECODER, run_part, z_0, ways, pixels, wanted)
    return image, (plan.height * pixels, plan.width * pixels) if plan.tiled else None


def run_in_parts(
    turns: Turns,
    graph: Graph,
    name: str,
    stage: str,
    run_part: Callable[[Float32], Float32],
    array: Float32,
    ways: Sequence[Plan],
    scale: int,
    wanted: Sequence[Plan],
) -> tuple[Float32, Plan]:
    """Run a graph on parts of an array by the first plan that fits into memory.

    Args:
        turns: of the request.
        graph: the graph.
        name: its name in the bundle.
        stage: its stage in the request.
        run_part: runs the graph on (rows, C, h, w).
        array: float32 (B, C, h, w).
        ways: plans, each in less memory than the one before. If one runs out of memory, the next follows, with a
            warning.
        scale: pixels of the result on a side of a pixel of the array.
        wanted: plans that need no warning if they are the first to fit.

    Returns:
        The result (B, 3, scale * h, scale * w), and the plan.

    Raises:
        InferenceError: the graph failed. OutOfMemoryError is a subclass.
        Cancelled: the caller wants to stop.
    """
    budget = turns.graphs.budget
    fitting = (i for i, plan in enumerate(ways) if budget.fits(name, plan.rows, plan.height * plan.width))
    first = next(fitting, len(ways) - 1)
    why = f"{name} would run out of memory on {graph.device}, by the bundle's estimate"
    for plan in ways[first:]:
        if plan is not ways[first] or plan not in wanted:
            warnings.warn(f"{why}: {plan.describe(scale)}", stacklevel=5)
        try:
            with budget.run(name, plan.rows, plan.height * plan.width, keeps=lambda: graph.keeps):
                made = decode_parts(run_part, array, plan, scale, partial(turns.run.report, stage))
        except LoadingError:
            raise  # The graph cannot be loaded for a tile either.
        except OutOfMemoryError as error:
            if error is turns.run.raised:
                raise
            why = str(error)
            continue
        return made, plan
    raise OutOfMemoryError(why)
