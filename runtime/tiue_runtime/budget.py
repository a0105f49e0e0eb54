"""The memory that runs need, that graphs hold, and that is free: requests are split before they fail."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace

from tiue_runtime.bundle import CUDA, PORTABLE, Manifest
from tiue_runtime.errors import OutOfMemoryError, RequestError
from tiue_runtime.host.forks import ForkSafeLock
from tiue_runtime.host.memory import free_memory
from tiue_runtime.modes import MODES, Mode, timesteps_at_once
from tiue_runtime.ort.devices import Device

# The fraction of the free memory that a run may take. The rest is for other programs, and for needs beyond the
# estimate: fragments of ONNX Runtime's arena, and workspaces of convolutions on another machine.
USABLE = 0.8

# A request is refused only if the estimate exceeds the free memory by this factor. The estimate was measured with one
# provider, and another may take less.
HOPELESS = 2.0

# Smaller requests are never refused: to look up the free memory would take longer than to draw their noise.
LITTLE = 2**26


class Budget:
    """The memory that the graphs of a pipeline hold. It says whether their next runs fit into the device's free memory.

    The needs of runs come from the manifest's estimates. Without an estimate, or if the free memory is unknown, every
    run fits.

    Args:
        manifest: of the bundle.
        variant: of the graphs.
        device: where they run.
    """

    def __init__(self, manifest: Manifest, variant: str, device: Device) -> None:
        self._manifest, self._variant, self._device = manifest, variant, device
        self._held: dict[str, float] = {}
        self._lock = ForkSafeLock()
        self._requests = 0

    @contextmanager
    def request(self) -> Generator[None]:
        """Count a request while it runs. If several run at once, none may rely on memory that a graph holds."""
        with self._lock.hold():
            self._requests += 1
        try:
            yield
        finally:
            with self._lock.hold():
                self._requests -= 1

    def fits(self, graph: str, rows: int, latents: int, before: tuple[str, int, int] | None = None) -> bool:
        """Say whether a run fits into free memory.

        Args:
            graph: the name of the graph.
            rows: of the run, k * B: pictures times the timesteps of each.
            latents: h*w.
            before: graph, rows and latents of an earlier run whose memory will still be held.
        """
        need = self._more(graph, rows, latents)
        if need <= 0:
            return True
        free = self._free()
        if free is not None and before is not None:
            free -= max(self._more(*before), 0)
        return free is None or need <= USABLE * free

    def _more(self, graph: str, rows: int, latents: int) -> float:
        """Return the bytes that a run needs beyond the memory that its graph holds; 0 if unknown."""
        held = self._held.get(graph, 0) if self._requests <= 1 else 0
        return (self._need(graph, rows, latents) or 0) - held

    @contextmanager
    def run(self, graph: str, rows: int, latents: int, keeps: Callable[[], bool]) -> Generator[None]:
        """Record the memory that a graph holds after the run in this `with` block.

        Args:
            graph: the name of the graph.
            rows: as in `fits`.
            latents: h*w.
            keeps: called after the run. Says whether the graph keeps the run's memory for the next run.
        """
        try:
            yield
        except OutOfMemoryError:
            self.freed(graph)
            raise
        if keeps():
            self._held[graph] = max(self._held.get(graph, 0), self._need(graph, rows, latents) or 0)
        else:
            self.freed(graph)

    def freed(self, graph: str) -> None:
        """Record that a graph holds no memory."""
        self._held.pop(graph, None)

    def fastest_mode(self, graph: str, steps: int, images: int, latents: int) -> Mode:
        """Return the first mode whose decoder runs fit, or the last one if none does."""
        for mode in MODES:
            if self.fits(graph, timesteps_at_once(mode, steps) * images, latents):
                return mode
        return "sequential"

    def refuse_excess(
        self, shape: tuple[int, ...], fields: str, smallest: tuple[str, int, int], enlarged: int = 1
    ) -> None:
        """Refuse a request that fits into memory in no mode.

        Args:
            shape: of its latents, (B, C, h, w).
            fields: names of the options that the shape comes from, for the message.
            smallest: graph, rows and latents of the smallest run that can do the work.
            enlarged: the factor of the upscaler, 1 without it, or 0 if the request ends with latents.

        Raises:
            RequestError: the noise and the pictures alone exceed the free memory, or the smallest run exceeds it by
                far.
        """
        count, channels, height, width = shape
        scale = self._manifest.pixels_per_latent
        pixels = count * height * width * scale**2
        # Bytes of a pixel: z_T and z_0; then the decoder's image, the same in [0, 1], and the picture.
        arrays = pixels * (2 * 4 * channels / scale**2 + 3 * (4 + 4 + 1) * enlarged**2)
        work = max(self._more(*smallest), 0)
        if arrays + work <= LITTLE:
            return
        needs = [(arrays, free_memory(None), 1.0)]
        needs += [(work, self._free(), HOPELESS)] if self._device.is_gpu else [(arrays + work, needs[0][1], HOPELESS)]
        for need, free, factor in needs:
            if free is not None and need > factor * free:
                side = scale * max(enlarged, 1)
                size = f"{width * side}x{height * side}"
                pictures = f"{count} picture{'' if count == 1 else 's'} of {size} pixels"
                raise RequestError(
                    f"{fields}: {pictures} need {need / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; "
                    "ask for fewer or smaller ones"
                )

    def _free(self) -> int | None:
        """Return the free bytes of the device."""
        return free_memory(self._device.index if self._device.is_gpu else None)

    def _need(self, graph: str, rows: int, latents: int) -> float | None:
        for variant in (self._variant, PORTABLE):
            use = self._manifest.memory.get(variant, {}).get(graph)
            if use is not None:
                # The estimate is of the portable graph. Its attention maps do not exist in CUDA's fused attention.
                fused = self._variant == CUDA and variant == PORTABLE
                return (replace(use, per_latent_squared=0) if fused else use).bytes(rows, latents)
        return None
