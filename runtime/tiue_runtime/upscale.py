"""The upscaler: it enlarges finished pictures in tiles, one at a time.

Tiles have a fixed size, so that a picture does not depend on the free memory. Smaller ones follow only where memory
runs out.
"""

from tiue_runtime.bundle import ENLARGED, IMAGE, UPSCALER, Manifest
from tiue_runtime.decode import run_in_parts
from tiue_runtime.graphs import Turns
from tiue_runtime.ort.graph import Float32, Graph
from tiue_runtime.tiling import Plan

TILE = 256  # pixels of a side, before enlarging
LEAST = 64


def enlarge(
    turns: Turns, graph: Graph, manifest: Manifest, image: Float32, scale: int
) -> tuple[Float32, tuple[int, int] | None]:
    """Enlarge pictures.

    Args:
        turns: runs the graph.
        graph: the upscaler.
        manifest: of the bundle.
        image: float32 (B, 3, H, W) in [-1, 1].
        scale: the factor of the upscaler.

    Returns:
        The pictures (B, 3, scale * H, scale * W), and (height, width) of tiles before enlarging, if there were any.

    Raises:
        InferenceError: the image is not finite, or the graph failed. OutOfMemoryError is a subclass.
        Cancelled: the caller wants to stop.
    """
    remedy = turns.graphs.overflow_remedy()

    def run_part(part: Float32) -> Float32:
        count, channels, height, width = part.shape
        enlarged = turns(UPSCALER, graph, {IMAGE: part})[ENLARGED]
        graph.check_output(ENLARGED, enlarged, (count, channels, height * scale, width * scale), remedy)
        return enlarged

    ways = plans(manifest, image.shape)
    made, plan = run_in_parts(turns, graph, UPSCALER, UPSCALER, run_part, image, ways, scale, ways[:1])
    return made, (plan.height, plan.width) if plan.tiled else None


def plans(manifest: Manifest, shape: tuple[int, ...]) -> list[Plan]:
    """List the ways to cut pictures (B, 3, H, W), each in less memory than the one before."""
    _, _, height, width = shape
    multiple = manifest.size_multiple  # A tile's sides are sides that the bundle allows for pictures.
    ways: list[Plan] = []
    side = TILE
    while side >= LEAST:
        down, across = (min(max(side // multiple, 1) * multiple, whole) for whole in (height, width))
        plan = Plan(1, down, across, tiled=(down, across) != (height, width))
        if plan not in ways:
            ways.append(plan)
        side //= 2
    return ways
