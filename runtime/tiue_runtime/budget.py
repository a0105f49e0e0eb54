"""How much memory a run will take and how much is free, so that requests are split before they fail."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

from tiue_runtime.bundle import CUDA, PORTABLE, Manifest
from tiue_runtime.host.memory import free_memory
from tiue_runtime.modes import MODES, Mode, timesteps_at_once
from tiue_runtime.ort.devices import Device

# The part of the free memory that a run may be planned to take. The rest is for what the estimate, measured on another
# machine, does not know (fragments of ONNX Runtime's arena, workspaces of convolutions) and for other programs.
USABLE = 0.8

_MIB = 2**20


class Budget:
    """Whether runs of a bundle's graphs fit into the free memory of a device, by the estimates in its manifest.

    Without an estimate, or where the free memory is not known, everything fits.
    """

    def __init__(self, manifest: Manifest, variant: str, device: Device) -> None:
        self._manifest = manifest
        self._variant = variant
        self._device = device
        self._held: dict[str, float] = {}
        self._lock = Lock()
        self._requests = 0

    @contextmanager
    def request(self) -> Generator[None]:
        """Around a request: of several at once, none can count on what a graph keeps."""
        with self._lock:
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1

    def fits(self, graph: str, rows: int, latents: int, before: tuple[str, int, int] | None = None) -> bool:
        """Whether a run of `rows` rows of `latents` = h*w latent pixels fits, also beside what a run `before` keeps."""
        need = self._more(graph, rows, latents)
        if need <= 0:
            return True
        free = free_memory(self._device.index if self._device.is_gpu else None)
        if free is not None and before is not None:
            free -= max(self._more(*before), 0)
        return free is None or need <= USABLE * free

    def _more(self, graph: str, rows: int, latents: int) -> float:
        """What a run needs beyond what its graph has kept. 0 where nothing is known."""
        kept = self._held.get(graph, 0) if self._requests <= 1 else 0
        return (self._need(graph, rows, latents) or 0) - kept

    def held(self, graph: str, rows: int, latents: int) -> None:
        """Note a run whose memory its graph holds for the next one."""
        self._held[graph] = max(self._held.get(graph, 0), self._need(graph, rows, latents) or 0)

    def freed(self, graph: str) -> None:
        """Note that a graph gave its memory back."""
        self._held.pop(graph, None)

    def fastest_mode(self, graph: str, steps: int, images: int, latents: int) -> Mode:
        """The first mode whose decoder runs fit; the last one if none does."""
        for mode in MODES:
            if self.fits(graph, timesteps_at_once(mode, steps) * images, latents):
                return mode
        return "sequential"

    def _need(self, graph: str, rows: int, latents: int) -> float | None:
        for variant in (self._variant, PORTABLE):
            use = self._manifest.memory.get(variant, {}).get(graph)
            if use is not None:
                # Estimated by the portable graph, whose attention maps CUDA's fused attention does not keep.
                fused = self._variant == CUDA and variant == PORTABLE
                return (replace(use, per_latent_squared=0) if fused else use).bytes(rows, latents)
        return None
